"""Training loop: from a config to a trained network in a run folder, resumable at every step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastresnet.callbacks import Callback
from fastresnet.config import CAPTURED, COMPILE, TrainConfig, in_turn
from fastresnet.console import PlainConsole
from fastresnet.device import (
    DTYPES,
    explained_failures,
    resolve_compile,
    resolve_device,
    resolve_precision,
    synchronize,
)
from fastresnet.distributed import World, connected, world_of_torchrun
from fastresnet.evaluation import Evaluation, Evaluator, open_evaluation
from fastresnet.models import OWN, find_model
from fastresnet.models.batchnorm import synchronize_batch_norms
from fastresnet.models.stochastic_depth import seed_stochastic_depth
from fastresnet.models.summary import flops_per_image
from fastresnet.provenance import environment
from fastresnet.recipes import RECIPES
from fastresnet.run_folder import Progress, RunFolder, inexact_changes, run_path
from fastresnet.signals import recorded_stops
from fastresnet.threads import fastest_threads, use_threads
from fastresnet.training.execution import Execution, choose_backend
from fastresnet.training.extension import check_extension, extends, has_ended
from fastresnet.training.kernels import check_kernels, choose_kernels, explained
from fastresnet.training.loggers import (
    Status,
    open_loggers,
    report_end,
    report_epoch,
    report_first_batch,
    report_status,
)
from fastresnet.training.loss import balanced_weights
from fastresnet.training.mixing import Mixer
from fastresnet.training.network import (
    checked_network,
    create_network,
    fit_whitening,
    start_from_weights,
    use_training_mode,
    with_identified_weights,
)
from fastresnet.training.optimizer import create_optimizers, lr_factors
from fastresnet.training.step import TrainStep
from pipelines import choose_pipeline, open_pipeline
from pipelines.base import Batch, Pipeline
from pipelines.errors import RunError, UsageError, UserError, check_choice, note, reason_of
from pipelines.store import Dataset

# Reading the metrics waits for a GPU, which then idles; on a CPU it costs nothing.
STATUS_EVERY = {"cpu": 1, "cuda": 100}
"""Steps between readings of the metrics."""

_COLD_START = ("import", "data", "model", "threads", "compile", "first_step")


class StoppedError(UserError):
    """Stop of a run by a signal, after it was saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def train(
    config: TrainConfig,
    dataset: Dataset,
    console: PlainConsole,
    spent: dict[str, float] | None = None,
    *,
    network: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Run `config` on `dataset` and return the contents of `summary.json`.

    `spent` has the caller's seconds before: `import` and `data`. `network` replaces that of `config`. Raises
    `StoppedError` after a signal, `RunError` if loss or gradients are not finite or memory runs out, and `UsageError`
    if the config does not match machine or run folder.
    """
    clock, device, asked = Stopwatch(spent), resolve_device(config.device), config
    origin = {**environment(device), "ranks": world_of_torchrun().world_size}
    with contextlib.ExitStack() as resources:
        run = RunFolder(run_path(config, dataset.name), writes=world_of_torchrun().is_main, callbacks=callbacks)
        log = functools.partial(_log, console, run)
        resources.enter_context(run.locked())
        resources.enter_context(explained_failures(_less_memory(config)))
        world = resources.enter_context(connected(device))

        checkpoint = run.read_checkpoint(resume=config.resume)
        config, pipeline_reason = resolve(config, dataset, device, world, started=checkpoint is not None)
        progress, before = Progress(), config
        if checkpoint is not None:
            progress = checkpoint.progress
            config, before = run.continued(config, checkpoint, dataset, threads_matter=_threads_matter(device, world))
            if not extends(config, before) and (summary := run.read_summary()) is not None:
                log(f"{run.path} is finished after {progress.epoch} epochs.")
                return summary
            if changed := inexact_changes(config, before):
                log(f"Note: changed since the run began: {', '.join(changed)}. The last bits will differ too.")

        pipeline, evaluated = resources.enter_context(open_pipelines(config, dataset, world))
        total_steps, epoch_steps = config.total_steps(len(pipeline)), len(pipeline)
        clock.enter("model")
        factors, sides = lr_factors(config, total_steps), config.sides(total_steps)
        step = create_step(config, dataset, factors, world, network=network, fresh=checkpoint is None)
        if checkpoint is not None:
            check_extension(run.path, before, config, progress, epoch_steps)
            with checkpoint.checked(total_steps, epoch_steps):
                step.load_state_dict(checkpoint.tensors, steps=progress.step, scaler=checkpoint.scaler)
            run.write_metrics(progress.rows)  # the run may have been killed between the checkpoint and this
        log(announcement(config, step.model, dataset, world, total_steps, pipeline_reason, progress.step))

        config, execution = create_execution(config, step, pipeline, progress, world, log, clock)
        loggers = resources.enter_context(open_loggers(config, run, console, total_steps, progress.step, callbacks))
        report_first_batch(loggers, config, dataset, pipeline, step)
        run.begin(config, asked, dataset, progress.epoch)
        clock.earlier, status_every = dataclasses.replace(progress), STATUS_EVERY[device.type]

        def save(*, wait: bool) -> None:
            _check_finite(step, epoch_steps, run)  # waits for the device, so the time up to here counts as steps
            clock.update(progress)
            phase = clock.phase
            clock.enter("saving")
            run.save(step.state_dict(), progress, step.scaler.state_dict(), wait=wait)
            clock.enter(phase)

        def stop_on_signal() -> None:
            if signum := world.highest(signals.received, device):
                save(wait=True)
                run.draw_curves(progress.rows)
                world.wait()  # when one process exits, torchrun stops the others
                raise StoppedError(signum, _stopped(signum, progress, run)) if run.writes else SystemExit(128 + signum)

        pixels = list(itertools.accumulate(side**2 for side in sides))  # up to each step
        status = functools.partial(_status, config, progress, step, clock, factors, pixels)
        evaluator = functools.partial(_evaluator, config, dataset, world)
        evaluate = evaluator(step.eval_model, evaluated, captured=execution.backend in CAPTURED)
        with recorded_stops() as signals:
            if extends(config, before):
                save(wait=True)  # with the new settings
            while not has_ended(config, progress, epoch_steps):
                clock.begin_epoch(progress)
                use_training_mode(step.model)
                start = progress.step - progress.epoch * epoch_steps  # batches of this epoch already taken
                for _ in execution.steps(progress.epoch, start, min(epoch_steps - start, total_steps - progress.step)):
                    progress.step += 1
                    if clock.first_step is None:
                        log(_cold_start(clock, device))
                    if progress.step % status_every == 0:
                        _check_finite(step, epoch_steps, run)
                        report_status(loggers, status())
                    if config.checkpoint_steps and progress.step % config.checkpoint_steps == 0:
                        save(wait=True)
                    if world.is_single or progress.step % status_every == 0:  # several ranks wait to agree
                        stop_on_signal()
                _check_finite(step, epoch_steps, run)

                clock.enter("evaluation")
                world.broadcast(step.eval_model.buffers())  # statistics of batch norm, which differ between ranks
                result = evaluate(stop_on_signal)
                world.sum(step.totals)
                now = status()
                progress.rows.append(_row(progress, now, result, int(step.overflows[0]), config))
                progress.epoch += 1
                step.reset()
                if progress.best_accuracy is None or result.accuracy > progress.best_accuracy:
                    progress.best_accuracy = result.accuracy
                    run.keep_best(step.eval_model)
                save(wait=has_ended(config, progress, epoch_steps))
                if world.highest(report_epoch(loggers, progress.rows[-1], now), device):
                    progress.stopped = True
                    save(wait=True)

            if progress.step < total_steps:
                log(f"stopped after epoch {progress.epoch}, by {'a callback' if progress.stopped else '--early-stop'}")
            run.save_weights("model.safetensors", step.eval_model)
            run.draw_curves(progress.rows)
            log("evaluating with shift TTA")
            test = resources.enter_context(_evaluation(config, dataset, world)) if config.val_split else evaluated
            final, best = evaluator(step.eval_model, test, tta="shift")(stop_on_signal), progress.best_accuracy
            if config.val_split:  # the test set is used once, after all choices
                best = evaluator(run.load_weights("best.ckpt", step.eval_model), test)(stop_on_signal).accuracy
            summary = _summary(config, step.model, sides, dataset, progress, final, best, clock, origin)
            return report_end(loggers, run.write_summary(summary), dataset.classes, final.confusion)


# --- parts of a training -----------------------------------------------------------------------------------------


def resolve(
    config: TrainConfig, dataset: Dataset, device: torch.device, world: World, *, started: bool = False
) -> tuple[TrainConfig, str]:
    """Resolve `auto` for `device`, except where it is measured later; return the reason for the pipeline too.

    The weights to start from are identified, unless the run has `started`. Raises `UsageError` if the machine does not
    support `config`, and the errors of `with_identified_weights`.
    """
    check_choice("recipe", config.recipe, RECIPES)
    pipeline, reason = config.pipeline, ""
    if pipeline == "auto":
        pipeline, why = choose_pipeline(dataset, device, config.decode)
        reason = f" ({why})"
    resolved = dataclasses.replace(
        with_identified_weights(config, started=started),
        device="cuda" if device.type == "cuda" else "cpu",
        precision=resolve_precision(config.precision, device),
        compile=resolve_compile(config.compile, device, single=world.is_single),
        pipeline=pipeline,
    )
    return resolved, reason


@contextlib.contextmanager
def open_pipelines(config: TrainConfig, dataset: Dataset, world: World) -> Iterator[tuple[Pipeline, Pipeline]]:
    """Open the training split and the one evaluated after each epoch. The block runs with `config.threads` threads."""
    training, evaluated = dataset.hold_out(config.val_split) if config.val_split else (dataset, dataset)
    with contextlib.ExitStack() as resources:
        resources.callback(torch.set_num_threads, torch.get_num_threads())
        if config.threads != "auto":
            use_threads(config.threads)
        pipeline = open_pipeline(
            config.pipeline,
            training,
            train=True,
            batch_size=config.batch_size,
            device=torch.device(config.device),
            dtype=DTYPES[config.precision],
            seed=config.seed,
            augmentation=config.augmentation,
            decode=config.decode,
            rank=world.rank,
            world_size=world.world_size,
        )
        resources.callback(pipeline.close)
        yield pipeline, resources.enter_context(_evaluation(config, evaluated, world))


def _evaluation(config: TrainConfig, dataset: Dataset, world: World) -> contextlib.closing[Pipeline]:
    device = torch.device(config.device)
    return contextlib.closing(
        open_evaluation(dataset, config.normalization, config.precision, device, config.pipeline, world)
    )


def _evaluator(
    config: TrainConfig, dataset: Dataset, world: World, model: nn.Module, pipeline: Pipeline, **options: Any
) -> Evaluator:
    device = torch.device(config.device)
    return Evaluator(model, pipeline, dataset.classes, config.precision, device, world=world, **options)


def create_step(
    config: TrainConfig,
    dataset: Dataset,
    lr_factors: Sequence[float],
    world: World,
    *,
    network: nn.Module | None = None,
    fresh: bool = True,
) -> TrainStep:
    """Create network, optimisers and the step that trains them; `lr_factors` has one for each step of the run.

    A `network` of the user is trained itself. Only a `fresh` run reads the weights that it starts from.
    """
    device, rows = torch.device(config.device), world.rows(config.batch_size)
    if (rows.stop - rows.start) % config.accumulate:
        raise UsageError(
            f"--accumulate {config.accumulate} does not divide the {rows.stop - rows.start} images of each process."
        )
    torch.manual_seed(config.seed)
    model = create_network(config, dataset) if network is None else checked_network(network, config, dataset)
    training = dataset.hold_out(config.val_split)[0] if config.val_split else dataset
    fit_whitening(model, training, config.normalization)
    if config.init_from is not None and fresh:
        start_from_weights(model, config, dataset)
    model.to(device).to(memory_format=torch.channels_last)
    if config.sync_bn and not world.is_single:
        synchronize_batch_norms(model)
    step = TrainStep(
        model,
        create_optimizers(model, config),
        lr_factors,
        precision=config.precision,
        device=device,
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
        label_smoothing=config.label_smoothing,
        class_weights=(
            balanced_weights(training.train, len(dataset.classes), device)
            if config.class_weights == "balanced"
            else None
        ),
        accumulate=config.accumulate,
        mixer=_create_mixer(config, rows, device, world),
        world=world,
        batch_size=config.batch_size,
    )
    seed_stochastic_depth(model, config.seed, step.count, step.row)
    return step


def _create_mixer(config: TrainConfig, rows: slice, device: torch.device, world: World) -> Mixer | None:
    if not config.mixup and not config.cutmix:
        return None
    if rows.start % 2 or (rows.stop - rows.start) // config.accumulate % 2:
        raise UsageError(
            f"--batch-size {config.batch_size}: mixup and CutMix mix pairs; give each of {world.world_size} processes "
            "an even number."
        )
    return Mixer(mixup=config.mixup, cutmix=config.cutmix, seed=config.seed, device=device)


def _threads_matter(device: torch.device, world: World) -> bool:
    """Return True if this process chooses the number of threads, which affects the last bits."""
    return device.type == "cpu" and world.is_single


def create_execution(
    config: TrainConfig,
    step: TrainStep,
    pipeline: Pipeline,
    progress: Progress,
    world: World,
    log: Callable[[str], None],
    clock: Stopwatch,
) -> tuple[TrainConfig, Execution]:
    """Prepare the execution of the steps after `progress`, compiled if requested.

    On a CPU, trial steps resolve `auto` for threads and compilation; the returned config has their results.
    """
    clock.enter("data")
    batch, sides = next(pipeline.epoch(progress.epoch)), config.sides(config.total_steps(len(pipeline)))
    left = sides[progress.step :]
    steps = len(left)
    step.side = max(left, default=None)  # for the trial steps
    if config.threads == "auto" and _threads_matter(torch.device(config.device), world) and steps:
        clock.enter("threads")
        threads, reason = fastest_threads(
            lambda images: step.trial(batch.images[:images], batch.labels[:images]), len(batch.labels), steps
        )
        use_threads(threads)
        config = dataclasses.replace(config, threads=threads)
        if reason:
            log(reason)
    clock.enter("compile")
    if config.compile == "auto":
        backend, why = choose_backend(step, batch, steps, sizes=len(set(left)))
        compile_ = {backend: value for value, backend in COMPILE.items()}[backend]
        config, reason = dataclasses.replace(config, compile=compile_), f": {why}"
    else:
        reason = ""
    backend = COMPILE[config.compile]
    if steps:  # a run may have been stopped after its last step
        config = _settle_kernels(config, step, batch, world, log)
    execution = Execution(step, pipeline, backend, sides)
    if steps:
        execution.prepare(batch, progress.step)
    log(f"backend {backend}{reason}")
    clock.enter("other")
    return config, execution


def _settle_kernels(
    config: TrainConfig, step: TrainStep, batch: Batch, world: World, log: Callable[[str], None]
) -> TrainConfig:
    """Make `step` use the kernels of `config`, for `auto` the faster ones. On a GPU they must agree with PyTorch's."""
    on_gpu, reason = config.device == "cuda", ""
    kernels = config.kernels
    if kernels == "auto" and not on_gpu:
        return config
    if kernels == "auto" and world.is_single:
        kernels, reason = choose_kernels(step, batch, captured=COMPILE[config.compile] in CAPTURED)
    elif kernels == "auto":
        kernels, reason = "torch", "several processes share the training"
    elif kernels == "own" and on_gpu and world.is_single:
        try:
            check_kernels(step, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver may raise anything
            raise RunError(
                f"this program's kernels do not work here: {explained(error)}. Use --kernels torch."
            ) from error
    step.use_kernels(kernels == "own")
    log(f"kernels {kernels}" + (f": {reason}" if reason else ""))
    return dataclasses.replace(config, kernels=kernels)


# --- time, messages ---------------------------------------------------------------------------------------------


def _log(console: PlainConsole, run: RunFolder, line: str) -> None:
    """Print `line`, and append it to train.log."""
    console.print(line, soft_wrap=True)
    run.log(line)


class Stopwatch:
    """Seconds by phase of a run: the time up to the next reading belongs to the current phase."""

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        """Begin in phase `data`; `spent` has seconds from before."""
        self.seconds = defaultdict(float, {"import": 0.0, "data": 0.0, **(spent or {})})
        self.earlier = Progress()
        """Position, and seconds, before the first step of this process."""
        self._epoch_start = Progress()
        self.first_step: float | None = None
        self.phase, self._mark = "data", time.perf_counter()

    def enter(self, phase: str) -> None:
        """Begin `phase`."""
        self.read()
        self.phase = phase

    def read(self) -> float:
        """Add the time since the last reading to the current phase; return the seconds of all phases."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._mark
        self._mark = now
        return sum(self.seconds.values())

    def update(self, progress: Progress) -> None:
        """Update the seconds of `progress`."""
        progress.total_seconds = self.earlier.total_seconds + self.read()
        progress.train_seconds = self.earlier.train_seconds + self.seconds["training"]

    def begin_epoch(self, progress: Progress) -> None:
        """Enter phase `training` at `progress`, where an epoch begins or goes on."""
        self.update(progress)
        self.phase = "training"
        self._epoch_start = dataclasses.replace(progress)

    def steps_per_s(self, progress: Progress) -> float:
        """Return the steps per second since `begin_epoch`, or of the whole run if there were none since."""
        start = self._epoch_start if progress.step > self._epoch_start.step else Progress()
        return (progress.step - start.step) / (progress.train_seconds - start.train_seconds)

    def cold_start(self) -> dict[str, float]:
        """Return the seconds up to the end of the first step of this process, by phase; it may have taken no step."""
        phases = {name: self.seconds[name] for name in _COLD_START if name in self.seconds}
        return phases if self.first_step is None else {**phases, "first_step": self.first_step}


def announcement(
    config: TrainConfig,
    model: nn.Module,
    dataset: Dataset,
    world: World,
    total_steps: int,
    pipeline_reason: str,
    step: int = 0,
) -> str:
    """Describe the run, which continues after step `step`."""
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    if config.freeze_backbone:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        parameters += f", {trained:,} of them trained"
    start = f", from {config.init_from}" if config.init_from and not step else ""
    shortcut = f", shortcut {config.shortcut}" if find_model(config.model).uses_shortcut else ""
    rows, each = world.rows(config.batch_size), ""
    if not world.is_single:
        each = f" ({rows.stop - rows.start} on each of {world.world_size} processes)"
    if config.accumulate > 1:
        each += f" in {config.accumulate} parts"
    limit = " (--iterations)" if total_steps == config.iterations else ""
    scaled = f"learning rate {config.lr:g} x {config.lr_scale:g}; " if config.lr_batch_size else ""
    return (
        f"{config.model} ({parameters}{shortcut}{start}) on {dataset.name}, recipe {config.recipe}: "
        f"{total_steps:,} steps{limit} of {config.batch_size} images{each}{in_turn(config.resolutions)}; {scaled}"
        f"{config.pipeline} pipeline{pipeline_reason}, {config.precision} on {config.device}; run folder "
        f"{run_path(config, dataset.name)}" + (f"\nresuming after step {step:,}" if step else "")
    )


def _less_memory(config: TrainConfig) -> str:
    """Advise on settings that need less memory than those of `config`."""
    parts = 2 * config.accumulate
    in_parts = "" if config.batch_size % parts else f"--accumulate {parts}, which computes it in parts, or "
    smaller = f"{in_parts}--batch-size {max(config.batch_size // 2, 1)}"
    another = "(and another --out, if the run has started)"
    return f"--batch-size {config.batch_size} is too large; try {smaller} {another}"


def _cold_start(clock: Stopwatch, device: torch.device) -> str:
    """Read the time of the first step, which has just been taken, and describe the start."""
    synchronize(device)
    clock.read()
    clock.first_step = clock.seconds["training"]
    parts = (f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in clock.cold_start().items())
    return f"cold start: {', '.join(parts)}"


def _status(
    config: TrainConfig,
    progress: Progress,
    step: TrainStep,
    clock: Stopwatch,
    factors: Sequence[float],
    pixels: Sequence[int],
) -> Status:
    """Update the seconds of `progress` and describe it; `pixels` has, for each step, those of one image up to it."""
    clock.update(progress)
    last = progress.step - 1
    loss, accuracy = step.metrics()
    return Status(
        epoch=progress.epoch + 1,
        step=progress.step,
        loss=loss,
        accuracy=accuracy,
        lr=config.lr * factors[last],
        side=config.side(last, len(pixels)),
        images_per_s=config.batch_size * clock.steps_per_s(progress),
        eta_s=progress.train_seconds * (pixels[-1] / pixels[last] - 1),
    )


def _row(progress: Progress, status: Status, result: Evaluation, overflows: int, config: TrainConfig) -> dict[str, Any]:
    split = "val" if config.val_split else "test"
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": status.lr,
        "train_loss": status.loss,
        "train_accuracy": status.accuracy,
        f"{split}_loss": result.loss,
        f"{split}_accuracy": result.accuracy,
        "overflows": overflows,
    }


def _summary(
    config: TrainConfig,
    model: nn.Module,
    sides: Sequence[int],
    dataset: Dataset,
    progress: Progress,
    last: Evaluation,
    best_accuracy: float | None,
    clock: Stopwatch,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Describe the finished run.

    After resuming, `steps`, `images_per_s` and the times cover the whole run. What a killed process did after its last
    checkpoint counts in neither. `cold_start` and `environment` are those of the last start.
    """
    clock.update(progress)
    return {
        "schema": 1,
        "recipe": config.recipe,
        "model": config.model,
        "data": dataset.name,
        "seed": config.seed,
        "epochs": progress.epoch,
        "steps": progress.step,
        "test_accuracy": last.accuracy,
        "test_accuracy_mirror": last.mirror_accuracy,
        "test_accuracy_shift": last.shift_accuracy,
        "best_accuracy": best_accuracy,
        "best_chosen_on": "validation" if config.val_split else "test",
        "images_per_s": progress.step * config.batch_size / progress.train_seconds,
        "train_seconds": progress.train_seconds,
        "total_seconds": progress.total_seconds,
        "cold_start": clock.cold_start(),
        "flops": _flops(config, model, sides[: progress.step]),
        "settings": config.to_dict(),
        "environment": {**origin, "threads": torch.get_num_threads()},
    }


def _flops(config: TrainConfig, model: nn.Module, sides: Sequence[int]) -> int | None:
    """Count the floating-point operations of steps with images of these `sides`, if `model` can compute without values.

    It cannot if it is a user's, and depends on the values of its tensors or keeps some outside its state.
    """
    try:
        each = {side: flops_per_image(model, training=True, side=side) for side in set(sides)}
    except Exception as error:
        if not config.model.startswith(OWN):
            raise
        note(f"the FLOPs of {config.model} are not counted: {reason_of(error)}")
        return None
    return config.batch_size * sum(each[side] for side in sides)


def _check_finite(step: TrainStep, epoch_steps: int, run: RunFolder) -> None:
    """Raise `RunError` if a step has failed. Waits for the device."""
    if (failed := step.failed_at()) is None:
        return
    raise RunError(
        f"the loss or its gradients were not finite at step {failed + 1} (epoch {failed // epoch_steps + 1}); the "
        f"weights were not updated with it, and {run.saved_state()} ({run.path}). Try a lower --lr with another "
        "--out, or --precision fp32."
    )


def _stopped(signum: int, progress: Progress, run: RunFolder) -> str:
    return (
        f"stopped by {signal.Signals(signum).name} after step {progress.step}; saved {run.path / 'last.ckpt'}. Repeat "
        "the command with --resume to continue."
    )
