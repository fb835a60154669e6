"""Search for the learning rate, weight decay and label smoothing of a recipe, with Optuna (docs/sweeps.md)."""

import argparse
import dataclasses
import inspect
import os
import shlex
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage, journal
from optuna.trial import TrialState

import fastresnet
from fastresnet.training.trials import find_lr


class Pruner(fastresnet.Callback):
    """Reports of each epoch to Optuna. A run ends if it is worse than the median of the others at the same epoch."""

    def __init__(self, trial: optuna.Trial):
        self.trial, self.accuracy, self.pruned = trial, 0.0, False

    def epoch_end(self, row: dict[str, float]) -> None:
        self.accuracy = row["val_accuracy"]
        self.trial.report(self.accuracy, step=int(row["epoch"]))
        self.pruned = self.trial.should_prune()
        if self.pruned:
            raise fastresnet.StopTraining


def settings(config: fastresnet.TrainConfig, lr: float, **others: float) -> dict[str, float]:
    """Return settings in three digits. The recipe's other learning rates keep their ratio to `lr`."""
    names = ("lr", "sgd_lr", "norm_lr") if config.optimizer == "muon" else ("lr",)
    rates = {name: rate for name in names if (rate := getattr(config, name)) is not None}
    values = {name: rate * lr / config.lr for name, rate in rates.items()} | others
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def main(recipe: str = "fast", data: str = "cifar10", val_split: int = 5000, epochs: int = 5, trials: int = 20) -> None:
    """Try settings in short trainings, and choose them on held-out training images, never on the test set.

    Repeat the command to continue a study, or start it several times at once to share its trials.
    """
    fixed = {"data": data, "val_split": val_split, "epochs": epochs}
    config = dataclasses.replace(fastresnet.create_config(recipe), iterations=None, **fixed)
    dataset = fastresnet.load_dataset(data)
    folder = Path(
        os.environ.get("FASTRESNET_RUNS") or "runs", f"sweep-{recipe}-{dataset.name}-val{val_split}-epochs{epochs}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(journal.JournalFileBackend(str(folder / "study.journal"))),
        study_name=folder.name,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=(epochs + 1) // 2),
        direction="maximize",
    )
    if "lr_range" not in study.user_attrs:
        test = find_lr(config, dataset, lambda *_: None)
        rates = (config.lr, test.steepest, test.tenth_of_lowest)
        study.set_user_attr("lr_range", (min(rates) / 3, max(rates) * 3))
        own = {"weight_decay": max(config.weight_decay, 1e-5), "label_smoothing": config.label_smoothing}
        study.enqueue_trial({"lr": config.lr, **own}, skip_if_exists=True)
    low, high = study.user_attrs["lr_range"]
    print(f"{folder}: learning rates from {low:.2g} to {high:.2g}", flush=True)

    while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) < trials:
        trial = study.ask()
        trial.suggest_float("lr", low, high, log=True)
        trial.suggest_float("weight_decay", 1e-5, 1e-2, log=True)
        trial.suggest_float("label_smoothing", 0.0, 0.2)
        tried, run, pruner = settings(config, **trial.params), folder / f"trial{trial.number}", Pruner(trial)
        try:
            fastresnet.train(recipe, quiet=True, callbacks=[pruner], out=run, **fixed, **tried)
        except fastresnet.RunError as error:  # such as a loss that is not finite
            print(f"trial {trial.number}: {error}")
            pruner.pruned = True
        study.tell(trial, *((None, TrialState.PRUNED) if pruner.pruned else (pruner.accuracy,)))
        end = " (stopped early)" if pruner.pruned else ""
        print(f"trial {trial.number}: {pruner.accuracy:.2f} %{end} {tried}", flush=True)

    best = sorted(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda trial: trial.value, reverse=True)
    if not best:
        raise fastresnet.RunError("no trial has reached its last epoch.")
    print("\nbest on held-out images:")
    for trial in best[:5]:
        print(f"{trial.value:6.2f} %  trial {trial.number:<3} {settings(config, **trial.params)}")
    flags = (f"--{name.replace('_', '-')} {value:g}" for name, value in settings(config, **best[0].params).items())
    print(f"\nfastresnet train {recipe} --data {shlex.quote(data)} {' '.join(flags)} --seeds 0-4")


if __name__ == "__main__":
    try:
        parser = argparse.ArgumentParser(description=main.__doc__)
        for name, parameter in inspect.signature(main).parameters.items():
            flag, default = f"--{name.replace('_', '-')}", parameter.default
            parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("sweep: stopped; the same command continues the study with another trial.")
    except (fastresnet.UsageError, fastresnet.DataError, fastresnet.RunError) as error:
        sys.exit(f"sweep: {error}")
