"""Choice of the number of CPU threads: its result, its cost, and its use on resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import _global_forward_pre_hooks

import fastresnet
from fastresnet import cli, threads
from fastresnet.checkpoint import load_tensors, save_tensors
from fastresnet.config import from_toml
from fastresnet.threads import fastest_threads
from fastresnet.training import loop
from fastresnet.training.step import TrainStep
from pipelines.errors import UsageError

SMALL = (
    "train", "smoke", "--data", "shapes10", "--batch-size", 4, "--precision", "fp32",
    "--iterations", 2,
)  # fmt: skip
LAYERS = 20


class Machine:
    """Simulated machine with its own clock: a step has 20 layers and calls the forward hooks of a network."""

    def __init__(self, slowdown):
        """`slowdown(threads)` is how many times as long as with one thread a step takes."""
        self.now, self.slowdown, self.layer, self.tried = 0.0, slowdown, torch.nn.Identity(), {}

    def clock(self):
        return self.now

    def step(self, images, seconds_per_image=0.002):
        used = torch.get_num_threads()
        self.tried[used] = self.tried.get(used, 0) + 1
        for _ in range(LAYERS):
            self.layer(None)
            self.now += images * seconds_per_image * self.slowdown(used) / LAYERS


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch):
    """Simulate eight processors, without OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_processors", lambda: 8)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def idle_machine(used):
    return 0.1 + 0.9 / used


def one_core_busy(used):
    return idle_machine(used) * (20 if used == 8 else 1)


def all_cores_busy(used):
    return 1 if used == 1 else 20


@pytest.mark.parametrize(
    ("slowdown", "fastest", "message"),
    [
        (
            idle_machine,
            8,
            "threads 8: trial steps reach 500 images/s with 1, 1,538 images/s with 4, 2,353 images/s with 8",
        ),
        (one_core_busy, 4, "threads 4: trial steps reach 500 images/s with 1, 1,538 images/s with 4, too slow with 8"),
        (all_cores_busy, 1, "threads 1: trial steps reach 500 images/s with 1, too slow with 4, too slow with 8"),
    ],
)
def test_fastest_number_is_chosen_within_two_seconds(slowdown, fastest, message):
    machine, before = Machine(slowdown), torch.get_num_threads()
    assert fastest_threads(machine.step, 128, 100, clock=machine.clock) == (fastest, message)
    assert set(machine.tried) == {1, 4, 8}
    assert machine.now <= 2
    assert torch.get_num_threads() == before
    assert not _global_forward_pre_hooks


@pytest.mark.parametrize("slowdown", [idle_machine, one_core_busy, all_cores_busy])
def test_a_long_run_may_spend_two_percent_on_the_choice(slowdown):
    machine = Machine(slowdown)
    fastest_threads(lambda images: machine.step(images, 0.5), 256, 1000, clock=machine.clock)
    assert 2 < machine.now <= 0.02 * 1000 * 256 * 0.5


def test_one_slow_trial_step_does_not_change_the_choice():
    machine, steps = Machine(idle_machine), iter(range(1000))

    def disturbed(images):
        machine.step(images, 0.002 * (1.8 if torch.get_num_threads() == 8 and next(steps) == 1 else 1))

    assert fastest_threads(disturbed, 128, 100, clock=machine.clock)[0] == 8


def test_omp_num_threads_is_used_without_trials(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    machine = Machine(idle_machine)
    assert fastest_threads(machine.step, 128, 100) == (3, "threads 3: PyTorch's default, as OMP_NUM_THREADS is set")
    assert not machine.tried


def test_single_batch_or_single_processor_needs_no_trial(monkeypatch):
    machine = Machine(idle_machine)
    torch.set_num_threads(2)
    assert fastest_threads(machine.step, 128, 1) == (2, "")
    monkeypatch.setattr(threads, "usable_processors", lambda: 1)
    assert fastest_threads(machine.step, 128, 100) == (2, "")
    assert not machine.tried


def test_steps_too_long_for_a_trial_get_one_thread():
    """They may be long because of other work, beside which several threads are slower still."""
    machine = Machine(idle_machine)
    torch.set_num_threads(2)
    choice = fastest_threads(lambda images: machine.step(images, 0.3), 128, 2, clock=machine.clock)
    assert choice[0] == 1
    assert "trial steps would take too long" in choice[1]
    assert set(machine.tried) == {1}


def test_custom_network_gets_whole_batches_only(data_root, dataset):
    sizes = []

    def network(images):
        sizes.append(len(images))
        return torch.zeros(len(images), len(dataset.classes))

    module = torch.nn.Module()
    module.forward = network
    fastresnet.evaluate(module, data="shapes10", root=data_root)
    assert sizes == [len(dataset.test)]


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
@pytest.mark.parametrize("number", ["0", "1025", "two"])
def test_impossible_numbers_are_refused(run, tmp_path, command, number):
    files = {"train": (), "eval": ("--weights", "pretrained:resnet20"), "predict": (tmp_path,)}[command]
    code, _, err = run(command, *files, "--threads", number)
    assert code == 2
    assert number in err
    for impossible in (0, True):
        with pytest.raises(UsageError, match=f"^threads {impossible}"):
            fastresnet.evaluate("pretrained:resnet20", threads=impossible)


# --- a run keeps its number: two steps, the second of which fails at first -------------------------------------------


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(data_root, tmp_path_factory):
    """Run folders of an undisturbed run with 1 and with 2 threads."""
    folders = {number: tmp_path_factory.mktemp("uninterrupted") / "run" for number in (1, 2)}
    for number, folder in folders.items():
        arguments = (*SMALL, "--root", data_root, "--threads", number, "--out", folder)
        assert cli.main([str(argument) for argument in arguments]) == 0
    assert not same(weights(folders[1]), weights(folders[2]))  # or the tests below could not fail
    return folders


@pytest.fixture
def interrupted(run, tmp_path, monkeypatch):
    """A run that chose 2 threads, and failed after a checkpoint; and what it said."""
    machine, taken = Machine(lambda used: 1 / used), TrainStep.__call__
    steps = iter(range(1000))

    def choose(work, images, repetitions):
        def timed_step(count):
            work(count)
            machine.step(count, 0.0625)

        choice = fastest_threads(timed_step, images, repetitions, clock=machine.clock)
        monkeypatch.setattr(TrainStep, "__call__", failing)
        return choice

    def failing(*arguments):
        if next(steps) == 1:
            raise MemoryError
        taken(*arguments)

    monkeypatch.setattr(threads, "usable_processors", lambda: 2)
    monkeypatch.setattr(loop, "fastest_threads", choose)
    before = torch.get_num_threads()
    code, out, _ = run(*SMALL, "--checkpoint-steps", 1, "--out", tmp_path / "run")
    assert code == 1
    assert torch.get_num_threads() == before
    monkeypatch.setattr(TrainStep, "__call__", taken)
    monkeypatch.setattr(loop, "fastest_threads", None)
    return tmp_path / "run", out


def test_resumed_run_keeps_the_chosen_number_and_equals_uninterrupted_run(run, monkeypatch, interrupted, uninterrupted):
    folder, out = interrupted
    assert "threads 2: trial steps reach 16 images/s with 1, 32 images/s with 2\n" in out
    assert from_toml(folder / "config.toml").threads == "auto"  # as asked, for other machines
    assert load_tensors(folder / "last.ckpt")[1]["config"]["threads"] == 2
    monkeypatch.setattr(threads, "usable_processors", lambda: 1)
    code, out, err = run(*SMALL, "--resume", "--out", folder)
    assert code == 0
    assert "resuming after step 1" in out
    assert "2 threads are more than the usable processors (1)" in err
    assert same(weights(folder), weights(uninterrupted[2]))
    assert json.loads((folder / "summary.json").read_text())["environment"]["threads"] == 2


def test_run_without_a_threads_setting_resumes_with_pytorchs_number(run, interrupted, uninterrupted):
    folder, _ = interrupted
    tensors, description = load_tensors(folder / "last.ckpt")
    del description["config"]["threads"]
    save_tensors(folder / "last.ckpt", tensors, description)
    torch.set_num_threads(2)
    code, out, _ = run(*SMALL, "--resume", "--out", folder)
    assert code == 0
    assert "changed since the run began" not in out
    assert same(weights(folder), weights(uninterrupted[2]))


def test_resuming_with_another_number_notes_that_bits_will_differ(run, interrupted, uninterrupted):
    folder, _ = interrupted
    code, out, _ = run(*SMALL, "--resume", "--threads", 1, "--out", folder)
    assert code == 0
    assert "changed since the run began: threads. The last bits will differ too." in out
    assert not same(weights(folder), weights(uninterrupted[2]))


def test_evaluation_computes_with_the_number_given(run, tmp_path, uninterrupted):
    before = torch.get_num_threads()
    code, _, err = run(
        "eval", "--weights", uninterrupted[1] / "model.safetensors", "--threads", 3, "--json", tmp_path / "eval.json"
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "eval.json").read_text())["environment"]["threads"] == 3
    assert torch.get_num_threads() == before
