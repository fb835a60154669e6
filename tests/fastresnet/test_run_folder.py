"""Lock of a run folder: one training at a time, however it ends. Saves in the background."""

import errno
import os
import signal
import subprocess
import threading
import types

import pytest
import torch
from torch import nn

from fastresnet import run_folder
from fastresnet.checkpoint import load_tensors, save_tensors
from fastresnet.run_folder import Progress, RunFolder
from pipelines import files
from pipelines.errors import DataError, UsageError

HOLDER = """
import os, sys, time
from pathlib import Path
from fastresnet.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    if os.fork() == 0:  # a loader's worker, which may outlive its parent
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(python, tmp_path):
    """The process id of a training in `run`, and a function that waits for its end."""
    command = [python, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        holder = types.SimpleNamespace(pid=int(program.stdout.readline()), wait=program.wait)
        yield holder
        os.killpg(holder.pid, signal.SIGKILL)  # and its worker


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_second_training_in_a_folder_is_refused_with_the_pid_of_the_first(run, holder, tmp_path, resume):
    code, _, err = run("train", "smoke", "--data", "shapes10", "--out", tmp_path / "run", *resume)
    assert code == 2
    assert f"in use by another training, process {holder.pid} on " in err
    assert "--out" in err
    assert "Slurm" not in err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_tasks_that_slurm_has_started_without_torchrun_get_a_hint(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UsageError, match="Slurm has started several tasks"), RunFolder(tmp_path / "run").locked():
        pass
    for tasks in ("", "1"):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        with pytest.raises(UsageError, match=r"--out\.$"), RunFolder(tmp_path / "run").locked():
            pass
    monkeypatch.setenv("SLURM_NTASKS", "2(x2)")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"--out\.$"), RunFolder(tmp_path / "run").locked():
        pass


def test_kill_releases_the_lock_while_a_worker_still_runs(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with RunFolder(tmp_path / "run").locked():
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} on ")
    assert not list((tmp_path / "run").iterdir())


def test_second_training_in_the_same_process_is_refused(tmp_path):
    with RunFolder(tmp_path / "run").locked():
        with pytest.raises(UsageError, match=f"process {os.getpid()}, this one"), RunFolder(tmp_path / "run").locked():
            pass
        assert (tmp_path / "run" / ".lock").exists()
    with RunFolder(tmp_path / "run").locked():
        pass


def test_second_training_by_another_name_of_the_folder_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with RunFolder(tmp_path / "run").locked():
        for other in (tmp_path / "link" / "run", tmp_path / "run" / ".." / "run"):
            with pytest.raises(UsageError, match="this one"), RunFolder(other).locked():
                pass


def test_a_lock_that_another_user_holds_is_respected(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / ".lock").write_text("123 on there")
    monkeypatch.setattr(run_folder, "open_file", denied)
    with pytest.raises(UsageError, match="belongs to another user"), RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize(("link", "words"), [(os.symlink, "is a symbolic link"), (os.link, "is a hard link")])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path, link, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("someone's")
    link(tmp_path / "file", tmp_path / "run" / ".lock")
    with (
        pytest.raises(OSError, match=f"{words}, which is not followed" if link is os.symlink else words),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
    assert (tmp_path / "file").read_text() == "someone's"


REPEATED_LOCKS = """
import sys, time
from pathlib import Path
from fastresnet.run_folder import RunFolder
from pipelines.errors import DataError, UsageError
folder, until, taken = Path(sys.argv[1]), time.time() + 2, 0
while time.time() < until:
    try:
        with RunFolder(folder).locked():
            (folder / "held").mkdir()
            (folder / "held").rmdir()
            taken += 1
    except UsageError:
        pass
assert taken
"""


def test_concurrent_locks_of_a_short_lived_folder_are_exclusive(python, tmp_path):
    command = [python, "-c", REPEATED_LOCKS, str(tmp_path / "a" / "run")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(5)]
    assert [process.communicate()[1] for process in processes] == 5 * [""]
    assert not (tmp_path / "a" / "run" / ".lock").exists()


def test_folder_that_vanishes_just_after_it_was_found_is_created_again(tmp_path, monkeypatch):
    """`Path.mkdir` then reports that the folder exists."""
    mkdir, vanished = os.mkdir, []

    def vanish(path, mode):
        if not vanished:
            vanished.append(path)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        mkdir(path, mode)

    monkeypatch.setattr(run_folder.os, "mkdir", vanish)
    with RunFolder(tmp_path / "run").locked():
        assert (tmp_path / "run" / ".lock").exists()


def test_folders_that_stay_empty_are_removed_and_others_kept(tmp_path):
    with RunFolder(tmp_path / "a" / "b" / "run").locked():
        assert (tmp_path / "a" / "b" / "run" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    with RunFolder(tmp_path / "a" / "run").locked():
        (tmp_path / "a" / "run" / "config.toml").touch()
    assert [file.name for file in (tmp_path / "a" / "run").iterdir()] == ["config.toml"]


def test_ranks_that_do_not_write_create_no_folder(tmp_path):
    with RunFolder(tmp_path / "run", writes=False).locked() as run:
        run.write_metrics([{"epoch": 1}])
        run.write_summary({})
    assert not (tmp_path / "run").exists()


# --- saves -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless its only element, the time in seconds, is changed."""
    now = [1000.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    return now


def save(run, step, *, wait=False, value=None):
    """Save a tensor of `value`, and as many epochs as steps."""
    rows = [{"epoch": epoch + 1} for epoch in range(step)]
    tensor = torch.tensor(float(step) if value is None else value)
    run.save({"x": tensor}, Progress(step=step, rows=rows), {}, wait=wait)


def saved(folder, name="last.ckpt"):
    """The step and the tensor of a checkpoint."""
    tensors, description = load_tensors(folder / name)
    return description["progress"]["step"], float(tensors["x"])


def test_save_is_of_the_moment_of_its_call_and_does_not_wait_for_the_disk(tmp_path, monkeypatch, clock):
    released = threading.Event()

    def slow(*arguments, **settings):
        assert released.wait(60)
        save_tensors(*arguments, **settings)

    monkeypatch.setattr(run_folder, "save_tensors", slow)
    tensor, rows = torch.tensor(1.0), [{"epoch": 1}]
    with RunFolder(tmp_path / "run").locked() as run:
        run.save({"x": tensor}, Progress(step=1, rows=rows), {}, wait=False)
        tensor.fill_(2)
        rows.append({"epoch": 2})
        released.set()
    assert saved(tmp_path / "run") == (1, 1.0)
    assert (tmp_path / "run" / "metrics.csv").read_text() == "epoch\n1\n"


def test_saves_are_at_least_ten_seconds_apart_unless_the_training_waits(tmp_path, clock):
    folder = tmp_path / "run"
    with RunFolder(folder).locked() as run:
        for step, after in enumerate((0.0, 9.9, 0.1, 9.9), start=1):
            clock[0] += after
            save(run, step)
        run.saved_state()  # waits
        assert saved(folder) == (3, 3.0)
        assert saved(folder, "previous.ckpt") == (1, 1.0)
        assert (folder / "metrics.csv").read_text() == "epoch\n1\n2\n3\n"
        save(run, 5, wait=True)
        assert saved(folder) == (5, 5.0)
        assert saved(folder, "previous.ckpt") == (3, 3.0)


def test_best_weights_are_those_of_their_epoch_even_if_they_are_written_later(tmp_path, clock):
    model = nn.Linear(2, 1)
    with RunFolder(tmp_path / "run").locked() as run:
        save(run, 1)
        best = model.weight.detach().clone()
        run.keep_best(model)
        save(run, 2)
        with torch.no_grad():
            model.weight.add_(1)
        run.saved_state()  # waits
        assert not (tmp_path / "run" / "best.ckpt").exists()
        save(run, 3, wait=True)
        assert torch.equal(load_tensors(tmp_path / "run" / "best.ckpt")[0]["weight"], best)


def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def end(run, clock):
    pass


def next_save(run, clock):
    clock[0] += 10
    save(run, 3)


def failure(run, clock):
    raise MemoryError


def question(run, clock):
    run.saved_state()
    raise AssertionError("not reported")


def fail_and_continue(run, monkeypatch, clock, then):
    """Make the second save fail."""
    with run.locked():
        save(run, 1)
        run.saved_state()  # waits
        monkeypatch.setattr(files.os, "fsync", fail)
        clock[0] += 10
        save(run, 2)
        then(run, clock)


@pytest.mark.parametrize("then", [end, next_save, failure, question])
def test_failed_save_is_reported_later_with_the_name_of_the_file(tmp_path, monkeypatch, clock, then):
    with pytest.raises(OSError, match="No space left") as caught:
        fail_and_continue(RunFolder(tmp_path / "run"), monkeypatch, clock, then)
    assert caught.value.filename == str(tmp_path / "run" / "last.ckpt")
    assert saved(tmp_path / "run") == (1, 1.0)
    with RunFolder(tmp_path / "run").locked():
        pass


def test_lock_is_held_until_the_last_save_is_complete(tmp_path, monkeypatch):
    held = []

    def slow(path, *arguments, **settings):
        held.append((path.parent / ".lock").exists())
        save_tensors(path, *arguments, **settings)
        held.append((path.parent / ".lock").exists())

    monkeypatch.setattr(run_folder, "save_tensors", slow)
    with RunFolder(tmp_path / "run").locked() as run:
        save(run, 1)
    assert held == [True, True]
    assert saved(tmp_path / "run") == (1, 1.0)


def test_a_save_that_is_waited_for_replaces_one_that_has_failed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "SAVE_EVERY_S", 0)
    with RunFolder(tmp_path / "run").locked() as run:
        run.save({"x": torch.tensor(1.0)}, Progress(step=1), {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            run.save({"x": torch.tensor(2.0)}, Progress(step=2), {}, wait=False)
            run._saving.exception()
        run.save({"x": torch.tensor(3.0)}, Progress(step=3), {}, wait=True)  # there is space again
    assert load_tensors(tmp_path / "run" / "last.ckpt")[1]["progress"]["step"] == 3


SAVED = {"progress": {}, "scaler": {}, "config": {}, "data": "x"}


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"progress": {}},
        {"progress": {"step": 1, "odd": 2}, "scaler": {}, "config": {}, "data": "x"},
        {"progress": []},
        *({**SAVED, name: [1]} for name in ("config", "scaler", "progress")),
        *({**SAVED, "progress": {"step": step}} for step in ("x", 10**30, -1, 1.5, True)),
        *({**SAVED, "progress": {"rows": rows}} for rows in (5, ["x"], [{}], [{"epoch": 1}])),
        *({**SAVED, "progress": odd} for odd in ({"epoch": "x"}, {"best_accuracy": "x"}, {"total_seconds": None})),
    ],
)
def test_file_that_is_no_checkpoint_is_refused_in_words(tmp_path, description):
    save_tensors(tmp_path / "last.ckpt", {"a": torch.zeros(1)}, description)
    with pytest.raises(DataError, match=r"last.ckpt is no checkpoint of a run"):
        RunFolder(tmp_path).read_checkpoint(resume=True)


@pytest.mark.parametrize(("step", "epoch"), [(21, 2), (11, 0), (9, 1), (20, 1000)])
def test_position_that_a_run_does_not_have_is_refused(tmp_path, step, epoch):
    description = {**SAVED, "progress": {"step": step, "epoch": epoch}}
    save_tensors(tmp_path / "last.ckpt", {"a": torch.zeros(1)}, description)
    checkpoint = RunFolder(tmp_path).read_checkpoint(resume=True)
    with pytest.raises(DataError, match=r"last.ckpt is at step .* --out"), checkpoint.checked(20, 10):
        pass


@pytest.mark.parametrize(("step", "epoch", "total"), [(0, 0, 20), (10, 0, 20), (10, 1, 20), (20, 2, 20), (15, 2, 15)])
def test_tensors_that_do_not_fit_are_refused(tmp_path, step, epoch, total):
    description = {**SAVED, "progress": {"step": step, "epoch": epoch}}
    save_tensors(tmp_path / "last.ckpt", {"weight": torch.zeros(3)}, description)
    checkpoint = RunFolder(tmp_path).read_checkpoint(resume=True)
    with pytest.raises(DataError, match=r"last.ckpt has other tensors .* --out"), checkpoint.checked(total, 10):
        nn.Linear(2, 2).load_state_dict(checkpoint.tensors)
