"""Lock of a run folder: one training at a time, however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from fastresnet.run_folder import RunFolder
from pipelines.errors import UsageError

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
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == f"{process.pid}\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("someone's")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic links"), RunFolder(tmp_path / "run").locked():
        pass
    assert (tmp_path / "file").read_text() == "someone's"


REPEATED_LOCKS = """
import sys, time
from pathlib import Path
from fastresnet.run_folder import RunFolder
from pipelines.errors import UsageError
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


def test_concurrent_locks_of_a_short_lived_folder_are_exclusive(tmp_path):
    command = [sys.executable, "-c", REPEATED_LOCKS, str(tmp_path / "a" / "run")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == ["", "", ""]
    assert not (tmp_path / "a" / "run" / ".lock").exists()


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
