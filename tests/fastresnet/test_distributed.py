"""Training as several processes under torchrun, against the same training in one."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastresnet import distributed
from fastresnet.checkpoint import load_tensors
from fastresnet.distributed import SINGLE, world_of_torchrun
from pipelines import LIBRARIES, PIPELINES
from pipelines.base import is_installed
from tests.fastresnet import rank_program, tiny_runs
from tests.fastresnet.tiny_runs import assert_same_run

ROOT = Path(__file__).parents[2]
# FFCV compiles for seconds in each rank: test_pipelines.py joins the batches of its ranks in one process.
IN_RANKS = [name for name in PIPELINES if name != "ffcv"]
INSTALLED = [name for name in IN_RANKS if is_installed(LIBRARIES.get(name, "torch"))]


def torchrun(python, processes, *arguments, root, restarts=0):
    """Start `processes` of a program; its output goes to a pipe."""
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # A rank that has lost another has time to report it before torchrun, which polls at this interval, stops it.
    command += ["--monitor-interval=0.5", f"--max-restarts={restarts}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTRESNET_DATA": str(root), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process, timeout=240):
    """Return exit code, stdout and stderr, and leave no process running."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


# --- components --------------------------------------------------------------------------------------------------


def results_of(python, processes, pipelines, out, dataset, root):
    """Read the results of every rank."""
    process = torchrun(python, processes, Path(rank_program.__file__), dataset.folder, out, *pipelines, root=root)
    code, _, err = finish(process)
    assert code == 0, err
    return [torch.load(out / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def two_ranks(python, tmp_path_factory, data_root, dataset):
    return results_of(python, 2, INSTALLED, tmp_path_factory.mktemp("two"), dataset, data_root)


@pytest.fixture(scope="module")
def four_ranks(python, tmp_path_factory, data_root, dataset):
    return results_of(python, 4, ["resident"], tmp_path_factory.mktemp("four"), dataset, data_root)


@pytest.fixture(params=["two_ranks", "four_ranks"])
def rank_results(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("ranks", "pipeline"),
    [*(("two_ranks", name) for name in IN_RANKS), ("four_ranks", "resident")],
)
def test_joined_samples_of_ranks_equal_those_of_one_process(request, need, dataset, ranks, pipeline):
    need(pipeline)
    rank_results, expected = request.getfixturevalue(ranks), rank_program.samples(dataset, "resident", SINGLE)
    assert len(expected) == 6
    for step, (images, labels) in enumerate(expected):
        parts = [results["samples"][pipeline][step] for results in rank_results]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


@pytest.mark.parametrize(
    ("name", "settings", "tolerance"),
    [
        ("mixed", {"dtype": torch.float64, "batch_size": 16, "mix": True}, 1e-12),
        ("uneven", {"dtype": torch.float64, "batch_size": 15, "mix": False}, 1e-9),
        ("single", {"dtype": torch.float32, "batch_size": 16, "mix": True, "lr": 1e-4}, 1e-5),
    ],
    ids=["float64", "float64, ranks with more images than others", "float32"],
)
def test_synchronized_batch_norm_gives_the_weights_of_one_process(rank_results, name, settings, tolerance):
    """Rounding errors grow from step to step: only float64 leaves room for a tight tolerance.

    The loss is in float32, and a rank's share of it is rounded unless all ranks have the same share.
    """
    expected = rank_program.train(world=SINGLE, **settings)
    for results in rank_results:
        assert results[name].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(results[name][key], value, rtol=0, atol=tolerance, msg=lambda m, k=key: k + m)


def test_the_ranks_evaluate_every_image_once(rank_results, dataset):
    expected = rank_program.evaluation(dataset, SINGLE)
    for results in rank_results:
        assert results["evaluation"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert {**results["evaluation"], "loss": 0.0} == {**expected, "loss": 0.0}


def test_highest_is_the_maximum_over_all_ranks(rank_results):
    assert [results["highest"] for results in rank_results] == [7 * (len(rank_results) - 1)] * len(rank_results)


def test_a_process_that_torchrun_did_not_start_is_single(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_of_torchrun() == SINGLE
    assert SINGLE.is_single
    assert SINGLE.is_main


# --- whole runs --------------------------------------------------------------------------------------------------

# The command line, with a fault armed in one rank: when training step {step} begins, {fault} happens there, once.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from fastresnet import cli
from fastresnet.training.step import TrainStep
from tests.fastresnet import tiny_runs
original, done = TrainStep.__call__, Path({done!r})
def armed(self, images, labels):
    if int(self.count) == {step} and os.environ["RANK"] == "{rank}" and not done.exists():
        done.touch()
        {fault}
    original(self, images, labels)
TrainStep.__call__ = armed
tiny_runs.shorten_runs()
sys.exit(cli.main(sys.argv[1:]))
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
WAIT = "import time; time.sleep(0.1)"  # for the signal
ARGUMENTS = [*tiny_runs.ARGUMENTS, "--lr", "0.01"]


@pytest.fixture(scope="module")
def start(python, tmp_path_factory, tiny_root):
    def start_ranks(processes, folder, *arguments, step=-1, rank=1, fault="pass", restarts=0):
        program = tmp_path_factory.mktemp("program") / "program.py"
        program.write_text(PROGRAM.format(step=step, rank=rank, fault=fault, done=str(program.with_suffix(".done"))))
        given = [*ARGUMENTS, *arguments, "--out", folder]
        return torchrun(python, processes, program, *given, root=tiny_root, restarts=restarts)

    return start_ranks


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """A run of two ranks to its end."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, out, err = finish(start(2, folder))
    assert code == 0, err
    assert "steps of 8 images (4 on each of 2 processes)" in out
    assert out.count("epoch   1") == 1
    return folder


def test_run_resumed_after_a_rank_is_killed_equals_uninterrupted_run(start, uninterrupted, tmp_path):
    began = time.monotonic()
    code, _, err = finish(start(2, tmp_path / "run", step=7, fault=KILL))
    assert code != 0
    assert time.monotonic() - began < 60  # of which the start takes a part
    assert "rank 0: lost the connection to another rank" in err
    assert load_tensors(tmp_path / "run" / "last.ckpt")[1]["progress"]["step"] == 6
    code, out, err = finish(start(2, tmp_path / "run", "--resume"))
    assert code == 0, err
    assert "resuming after step 6" in out
    assert_same_run(tmp_path / "run", uninterrupted)


def test_run_restarted_by_torchrun_equals_uninterrupted_run(start, uninterrupted, tmp_path):
    code, _, err = finish(start(2, tmp_path / "run", "--resume", step=8, rank=0, fault=KILL, restarts=1))
    assert code == 0, err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_to_torchrun_saves_the_same_step_of_all_ranks(start, uninterrupted, tmp_path):
    """The signal reaches each rank separately, and within a step."""
    process = start(2, tmp_path / "run", step=8, fault=f"os.kill(int(os.environ['PARENT']), signal.SIGTERM); {WAIT}")
    code, _, err = finish(process)
    assert code != 0
    assert err.count("stopped by SIGTERM after step") == 1
    assert 8 < load_tensors(tmp_path / "run" / "last.ckpt")[1]["progress"]["step"] <= 15
    code, _, err = finish(start(2, tmp_path / "run", "--resume"))
    assert code == 0, err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_signal_to_one_rank_saves_the_same_step_of_all_ranks(start, tmp_path):
    """As Slurm's `--signal=USR1@60` may reach them, after torchrun."""
    code, _, err = finish(start(2, tmp_path / "run", step=8, rank=1, fault="os.kill(os.getpid(), signal.SIGUSR1)"))
    assert code != 0
    assert err.count("stopped by SIGUSR1 after step") == 1
    assert load_tensors(tmp_path / "run" / "last.ckpt")[1]["progress"]["step"] == 9


def test_run_of_two_ranks_resumes_on_four_and_on_one(start, tmp_path, tiny_root):
    """The samples stay the same, so the losses do, up to roundings: batch norm is synchronised."""
    code, _, err = finish(start(2, tmp_path / "run", "--sync-bn", step=7, rank=0, fault=KILL))
    assert code != 0
    code, out, err = finish(start(4, tmp_path / "run", "--sync-bn", "--resume", step=11, rank=0, fault=KILL))
    assert code != 0
    assert "resuming after step 6" in out
    code, out, err = finish(start(1, tmp_path / "run", "--sync-bn", "--resume"))
    assert code == 0, err
    assert "resuming after step 10" in out
    code, _, err = finish(start(1, tmp_path / "alone", "--sync-bn"))
    assert code == 0, err
    mixed, alone = (load_tensors(tmp_path / name / "last.ckpt")[1]["progress"]["rows"] for name in ("run", "alone"))
    assert [row["train_loss"] for row in mixed] == pytest.approx([row["train_loss"] for row in alone], rel=0.01)


def test_the_failure_of_one_rank_stops_all_with_its_message(start, tmp_path):
    fault = "raise OSError(28, 'No space left on device', '/full')"
    code, _, err = finish(start(2, tmp_path / "run", step=3, fault=fault))
    assert code == 1
    assert "fastresnet: rank 1: cannot read or write /full: No space left on device." in err
    assert "fastresnet: rank 0: lost the connection to another rank" in err
    assert load_tensors(tmp_path / "run" / "last.ckpt")[1]["progress"]["step"] == 2


def test_a_batch_with_an_odd_number_of_images_per_rank_is_refused(python, tiny_root, tmp_path):
    """Runs the command as from a shell."""
    command = ["-m", "fastresnet", *ARGUMENTS, "--batch-size", "14", "--mixup", "1", "--out", tmp_path / "run"]
    code, _, err = finish(torchrun(python, 2, *command, root=tiny_root))
    assert code != 0
    assert "give each of 2 processes an even number" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "backend", "gpu"), [("cuda", "nccl", torch.device("cuda", 1)), ("cpu", "gloo", None)])
def test_nccl_gets_the_gpu_of_its_rank(monkeypatch, kind, backend, gpu):
    """Otherwise NCCL guesses it at the first barrier, with a warning."""
    given = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: given.update(current=number))
    monkeypatch.setattr(distributed, "_store", lambda: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *names, **rest: given.update(rest, names=names))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    with distributed.connected(torch.device(kind)):
        pass
    assert (given["names"], given["rank"], given["device_id"]) == ((backend,), 3, gpu)
    assert given.get("current") == (gpu.index if gpu else None)
