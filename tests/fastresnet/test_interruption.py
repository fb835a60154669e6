"""Runs that are killed, stopped or out of disk space: real processes, resumed and compared bit by bit."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from fastresnet.checkpoint import load_tensors
from tests.fastresnet.tiny_runs import ARGUMENTS, assert_same_run

# Runs the command line with a fault armed: when training step {step} begins, {fault} happens.
PROGRAM = """
import os, resource, signal, sys, time
import fastresnet.training.loop as loop
from fastresnet import cli, run_folder
from fastresnet.training.step import TrainStep
from tests.fastresnet import tiny_runs
original = TrainStep.__call__
def armed(self, images, labels):
    if int(self.count) == {step}:
        {fault}
    original(self, images, labels)
TrainStep.__call__ = armed
tiny_runs.shorten_runs()
run_folder.SAVE_EVERY_S = {save_every_s}
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def start(python, tiny_root):
    def start_process(
        folder, *, step=-1, fault="pass", save_every_s=10, resume=False, expect, arguments=(), preamble=""
    ):
        program = preamble + PROGRAM.format(step=step, fault=fault, save_every_s=save_every_s)
        command = [python, "-c", program, *ARGUMENTS, "--out", str(folder)]
        command += arguments
        done = subprocess.run(
            command + ["--resume"] * resume,
            env={**os.environ, "FASTRESNET_DATA": str(tiny_root)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            start_new_session=True,
        )
        assert done.returncode == expect, done.stderr
        return done

    return start_process


@pytest.fixture(scope="module")
def uninterrupted(python, tmp_path_factory, tiny_root):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(
        [python, "-c", PROGRAM.format(step=-1, fault="pass", save_every_s=10), *ARGUMENTS, "--out", folder],
        env={**os.environ, "FASTRESNET_DATA": str(tiny_root)},
        check=True,
        timeout=120,
    )
    return folder


@pytest.mark.parametrize(
    ("step", "resumed_from"),
    [(1, None), (5, 4)],
    ids=["before any checkpoint", "at an epoch's start"],
)
def test_killed_run_resumes_to_the_uninterrupted_result(start, uninterrupted, tmp_path, step, resumed_from):
    folder = tmp_path / "run"
    kill = {"fault": "os.kill(os.getpid(), signal.SIGKILL)", "expect": -signal.SIGKILL}
    start(folder, step=step, save_every_s=1000, **kill)
    assert (folder / "last.ckpt").exists() == (resumed_from is not None)
    if resumed_from is not None:
        assert load_tensors(folder / "last.ckpt")[1]["progress"]["step"] == resumed_from
    done = start(folder, resume=True, expect=0)
    assert (f"resuming after step {resumed_from}" in done.stdout) == (resumed_from is not None)
    assert_same_run(folder, uninterrupted)


def test_repeatedly_killed_run_resumes_to_the_uninterrupted_result(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    for step in (4, 7, 12):
        start(folder, step=step, fault="os.kill(os.getpid(), signal.SIGKILL)", resume=True, expect=-signal.SIGKILL)
    start(folder, resume=True, expect=0)
    assert_same_run(folder, uninterrupted)


IN_THE_BACKGROUND = ("--checkpoint-steps", "0")
"""Saves at the end of epochs, that is after steps 5, 10 and 15."""


def first_save(folder):
    """Return a statement that waits for the end of the first save in `folder`."""
    return f"while not os.path.exists({str(folder / 'metrics.csv')!r}): time.sleep(0.01)"


@pytest.mark.parametrize("number", range(1, 6))
def test_run_killed_at_a_rename_of_a_background_save_resumes_to_the_same_result(start, uninterrupted, tmp_path, number):
    """Each save renames best.ckpt if there is a new one, last.ckpt to previous.ckpt, then last.ckpt and metrics.csv."""
    folder = tmp_path / "run"
    fault = (
        f"{first_save(folder)}\n"
        "        import itertools, pipelines.files as files\n"
        "        calls, replace = itertools.count(1), files.os.replace\n"
        f"        files.os.replace = lambda *a: os.kill(os.getpid(), 9) if next(calls) == {number} else replace(*a)"
    )
    start(folder, step=6, fault=fault, save_every_s=0, arguments=IN_THE_BACKGROUND, expect=-signal.SIGKILL)
    assert start(folder, arguments=IN_THE_BACKGROUND, resume=True, expect=0).stdout.count("resuming after step") == 1
    assert_same_run(folder, uninterrupted)


def killed_in_the_third_epoch(start, folder):
    """Kill a run after its first save; the next would come later than the end of the second epoch."""
    kill = {"fault": f"{first_save(folder)}\n        os.kill(os.getpid(), signal.SIGKILL)", "expect": -signal.SIGKILL}
    start(folder, step=12, save_every_s=1000, arguments=IN_THE_BACKGROUND, **kill)


def test_killed_run_resumes_from_its_last_save_in_the_background(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    killed_in_the_third_epoch(start, folder)
    assert load_tensors(folder / "last.ckpt")[1]["progress"]["step"] == 5
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    done = start(folder, arguments=IN_THE_BACKGROUND, resume=True, expect=0)
    assert "resuming after step 5" in done.stdout
    assert_same_run(folder, uninterrupted)


def test_signal_saves_all_files_that_were_to_be_written_later(start, uninterrupted, tmp_path):
    stop = {"step": 12, "fault": "os.kill(os.getpid(), signal.SIGTERM)", "expect": 143}
    start(tmp_path / "run", save_every_s=1000, arguments=IN_THE_BACKGROUND, **stop)
    start(tmp_path / "at once", **stop)
    for name in ("last.ckpt", "best.ckpt"):
        (found, _), (expected, description) = (load_tensors(tmp_path / run / name) for run in ("run", "at once"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert description.get("progress", {"step": 13})["step"] == 13
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    start(tmp_path / "run", arguments=IN_THE_BACKGROUND, resume=True, expect=0)
    assert_same_run(tmp_path / "run", uninterrupted)


EVERYTHING = [
    *("--flip", "alternating", "--cutout", "8", "--mixup", "0.4", "--cutmix", "1", "--label-smoothing", "0.1"),
    *("--drop-path", "0.3", "--ema-decay", "0.9", "--clip-norm", "1", "--schedule", "cosine", "--warmup", "0.2"),
    *("--resolutions", "20", "32"),
]


@pytest.mark.parametrize(
    "optimizer", [["muon", "--sgd-momentum", "0.5", "--nesterov"], ["adamw"]], ids=["muon", "adamw"]
)
def test_killed_run_with_all_features_resumes_to_the_uninterrupted_result(start, tmp_path, optimizer):
    arguments = [*EVERYTHING, "--optimizer", *optimizer]
    start(tmp_path / "uninterrupted", arguments=arguments, expect=0)
    kill = {"fault": "os.kill(os.getpid(), signal.SIGKILL)", "expect": -signal.SIGKILL}
    start(tmp_path / "run", arguments=arguments, step=8, **kill)
    start(tmp_path / "run", arguments=arguments, resume=True, expect=0)
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize("moment", ["checkpoint", "evaluation"])
def test_run_killed_in_checkpoint_or_evaluation_resumes_to_the_same_result(start, uninterrupted, tmp_path, moment):
    """The kill comes when half of the new checkpoint is in its temporary file, or after the first evaluation batch."""
    folder = tmp_path / "run"
    half = (
        "import pipelines.files as files; "
        "files.os.replace = lambda a, b: (os.truncate(a, os.path.getsize(a) // 2), os.kill(os.getpid(), 9))"
    )
    evaluation = "loop.Evaluator.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    fault = {"checkpoint": half, "evaluation": evaluation}[moment]
    start(folder, step=6, fault=fault, expect=-signal.SIGKILL)
    start(folder, resume=True, expect=0)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_signal_saves_after_the_step_and_names_the_resume_flag(start, uninterrupted, tmp_path, name, code):
    folder = tmp_path / "run"
    done = start(folder, step=8, fault=f"os.kill(os.getpid(), signal.{name})", expect=code)
    assert f"stopped by {name} after step 9" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_tensors(folder / "last.ckpt")[1]["progress"]["step"] == 9
    assert (folder / "curves.png").exists()
    if name == "SIGTERM":  # the others have the same handler
        start(folder, resume=True, expect=0)
        assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_signal_to_the_process_group_keeps_loader_workers_until_the_save(start, uninterrupted, tmp_path, name, code):
    """A terminal that closes and schedulers signal worker processes too."""
    folder = tmp_path / "run"
    fault = f"os.killpg(0, signal.{name}); time.sleep(0.5)"
    done = start(folder, step=7, fault=fault, expect=code, arguments=["--pipeline", "torchvision"])
    assert f"stopped by {name} after step 8" in done.stderr
    assert "Traceback" not in done.stderr
    if name == "SIGTERM":
        start(folder, resume=True, expect=0)
        assert_same_run(folder, uninterrupted)


def test_signals_that_are_ignored_at_the_start_do_not_stop_the_run(start, uninterrupted, tmp_path):
    """`nohup` ignores SIGHUP, and a shell without job control ignores SIGINT of its jobs in the background."""
    each = "for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1): "
    ignore = f"import signal\n{each}signal.signal(number, signal.SIG_IGN)\n"
    start(tmp_path / "run", step=8, fault=f"{each}os.kill(os.getpid(), number)", preamble=ignore, expect=0)
    assert_same_run(tmp_path / "run", uninterrupted)


CLOSED = "import os\nreading, writing = os.pipe()\nos.dup2(writing, {number})\nos.close(reading)\nos.close(writing)\n"
FULL = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), {number})\n"


@pytest.mark.parametrize(
    ("lose", "reason"), [(CLOSED, "Broken pipe"), (FULL, "No space left on device")], ids=["closed pipe", "full disk"]
)
def test_run_outlives_its_standard_output(start, uninterrupted, tmp_path, lose, reason):
    """As in `fastresnet train | head -1`."""
    done = start(tmp_path / "run", preamble=lose.format(number=1), expect=0)
    assert done.stderr == f"fastresnet: note: standard output is lost ({reason}); the run goes on.\n"
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("lose", [CLOSED, FULL], ids=["closed pipe", "full disk"])
def test_run_outlives_both_of_its_outputs(start, uninterrupted, tmp_path, lose):
    start(tmp_path / "run", preamble=lose.format(number=1) + lose.format(number=2), expect=0)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_run_whose_outputs_are_closed_at_the_start_writes_no_text_into_its_files(start, uninterrupted, tmp_path):
    """The next files that it opens would have the numbers of standard output and standard error.

    Python has no streams for files that are closed when it starts.
    """
    close = "import os, sys\nos.close(1); os.close(2)\nsys.stdout = sys.stderr = None\n"
    start(tmp_path / "run", step=6, fault="os.write(1, b'text'); os.write(2, b'text')", preamble=close, expect=0)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_repeated(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    fault = (
        "evaluate = loop.Evaluator.__call__; "
        "loop.Evaluator.__call__ = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*a))[1]"
    )
    start(folder, step=9, fault=fault, expect=143)
    assert load_tensors(folder / "last.ckpt")[1]["progress"] | {"rows": [], "train_seconds": 0, "total_seconds": 0} == {
        "step": 10,
        "epoch": 1,
        "rows": [],
        "best_accuracy": load_tensors(uninterrupted / "last.ckpt")[1]["progress"]["rows"][0]["test_accuracy"],
        "train_seconds": 0,
        "total_seconds": 0,
        "stopped": False,
    }
    start(folder, resume=True, expect=0)
    assert_same_run(folder, uninterrupted)


def test_a_full_disk_is_named_and_the_previous_checkpoint_stays(start, uninterrupted, tmp_path):
    """Files may grow to 0.2 MB only from step 6 on; a checkpoint has more than 0.6 MB."""
    folder = tmp_path / "run"
    done = start(folder, step=6, fault="resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))", expect=1)
    assert "cannot read or write" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_tensors(folder / "last.ckpt")[1]["progress"]["step"] == 6
    start(folder, resume=True, expect=0)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(
    ("call", "code"), [("os.fsync", "EIO"), ("os.replace", "EROFS")], ids=["I/O error", "read-only folder"]
)
def test_a_checkpoint_that_cannot_be_written_is_named_and_the_last_one_stays(
    start, uninterrupted, tmp_path, call, code
):
    """The system call fails from step 6 on; the checkpoint after step 6 is there then."""
    folder = tmp_path / "run"
    fault = (
        "import errno, pipelines.files as files\n"
        f"        def fail(*_): raise OSError(errno.{code}, os.strerror(errno.{code}))\n"
        f"        files.{call} = fail"
    )
    done = start(folder, step=6, fault=fault, expect=1)
    message = os.strerror(getattr(errno, code))
    assert done.stderr.strip() == f"fastresnet: cannot read or write {folder / 'last.ckpt'}: {message}."
    assert load_tensors(folder / "last.ckpt")[1]["progress"]["step"] == 6
    start(folder, resume=True, expect=0)
    assert_same_run(folder, uninterrupted)


def test_a_background_save_that_fails_is_named_and_the_one_before_stays(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    fault = (
        "import errno, pipelines.files as files\n"
        "        def fail(*_): raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        f"        while not os.path.exists({str(folder / 'metrics.csv')!r}): time.sleep(0.01)\n"
        "        files.os.fsync = fail"
    )
    done = start(folder, step=6, fault=fault, save_every_s=0, arguments=IN_THE_BACKGROUND, expect=1)
    message = os.strerror(errno.EIO)
    names = [folder / name for name in ("metrics.csv", "best.ckpt", "last.ckpt")]  # the first is flushed last
    assert done.stderr.strip() in [f"fastresnet: cannot read or write {name}: {message}." for name in names]
    assert load_tensors(folder / "last.ckpt")[1]["progress"]["step"] == 5
    start(folder, resume=True, arguments=IN_THE_BACKGROUND, expect=0)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_signal_while_writing_a_data_set_leaves_no_partial_files(python, tmp_path, name, code):
    program = (
        "import os, signal, sys, pipelines.store as store\nfrom fastresnet import cli\n"
        "write = store._write_files\n"
        f"def armed(*arguments): write(*arguments); os.kill(os.getpid(), signal.{name})\n"
        "store._write_files = armed\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [python, "-c", program, "prepare", "--data", "shapes10", "--train-images", "80", "--test-images", "20"]
    assert subprocess.run([*command, "--root", tmp_path], timeout=120, check=False).returncode == code
    assert [entry.name for entry in tmp_path.iterdir()] == [".shapes10.lock"]


def test_a_run_folder_that_is_a_link_is_refused(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    code, _, err = run(*ARGUMENTS, "--out", tmp_path / "run")
    assert code == 2
    assert "is a symbolic link" in err
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("options", [(), ("--seeds", "1")], ids=["one run", "--seeds"])
@pytest.mark.parametrize("place", ["pipe", "device"])
def test_a_run_folder_with_a_pipe_or_device_is_refused(run, tmp_path, options, place):
    folder = tmp_path / "run"
    (target := folder / "seed1" if options else folder).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    (target / "last.ckpt").symlink_to(tmp_path / "pipe" if place == "pipe" else "/dev/zero")
    code, _, err = run(*ARGUMENTS, *options, "--out", folder, "--resume")
    assert code == 2
    assert f"{target / 'last.ckpt'} is a pipe or a device. Remove it" in err


def test_a_link_in_the_place_of_the_log_is_not_followed(run, tmp_path):
    (tmp_path / "run" / "seed1").mkdir(parents=True)
    (tmp_path / "precious").write_text("text")
    log = tmp_path / "run" / "seed1" / "train.log"
    log.symlink_to(tmp_path / "precious")
    code, _, err = run(*ARGUMENTS, "--seeds", "1", "--out", tmp_path / "run")
    assert code == 2
    assert f"{log} is a link or a folder. Remove it" in err
    assert (tmp_path / "precious").read_text() == "text"


def test_memory_exhaustion_names_the_batch_size(start, tmp_path):
    """The address space may grow by 64 MB only from step 2 on."""
    limit = "int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (64 << 20)"
    fault = f"resource.setrlimit(resource.RLIMIT_AS, ({limit},) * 2); images = images.repeat(256, 1, 1, 1)"
    done = start(tmp_path / "run", step=2, fault=fault, expect=1)
    assert "out of memory: --batch-size 8 is too large; try --accumulate 2, which" in done.stderr
    assert "Traceback" not in done.stderr


def damage(file):
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 4
    file.write_bytes(contents)


@pytest.mark.parametrize("harm", [damage, Path.unlink], ids=["damaged", "missing"])
def test_resume_falls_back_to_the_previous_checkpoint(start, uninterrupted, tmp_path, harm):
    """Checkpoints are written after steps 6 and 8."""
    folder = tmp_path / "run"
    start(folder, step=9, fault="os.kill(os.getpid(), signal.SIGKILL)", expect=-signal.SIGKILL)
    harm(folder / "last.ckpt")
    done = start(folder, resume=True, expect=0)
    assert "resuming after step 6" in done.stdout
    (note,) = done.stderr.splitlines()
    assert str(folder / "last.ckpt") in note
    assert "the steps after 6 are repeated" in note
    assert_same_run(folder, uninterrupted)


def test_resuming_is_refused_where_both_checkpoints_are_damaged(start, run, tmp_path):
    folder = tmp_path / "run"
    start(folder, step=8, fault="os.kill(os.getpid(), signal.SIGTERM)", expect=143)
    for name in ("last.ckpt", "previous.ckpt"):
        damage(folder / name)
    code, _, err = run(*ARGUMENTS, "--out", folder, "--resume")
    assert code == 3
    assert str(folder / "previous.ckpt") in err
    assert "SHA-256" in err
