"""Caches of compiled code: a folder that only its user can change, or a temporary one with a note."""

import atexit
import getpass
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from fastresnet import compilation
from fastresnet.compilation import name_user, torch_compile, use_private_caches
from pipelines.errors import Note, RunError

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, in an environment that sets nothing about caches; what the test sets in it is undone."""
    rest = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "XDG_CACHE_HOME")}
    monkeypatch.setattr(os, "environ", {**rest, "HOME": str(tmp_path / "home")})
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def caches():
    """Set the variables, without a note; return the folder of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_private_caches()
    return [Path(os.environ[name]) for name in VARIABLES]


def mode(folder):
    return folder.stat().st_mode & 0o7777


def test_caches_are_in_a_folder_of_the_users_own(home):
    inductor, triton = caches()
    assert inductor.parent == home / ".cache" / "fastresnet"
    assert triton == inductor / "triton"
    assert mode(home / ".cache") == mode(home / ".cache" / "fastresnet") == 0o700
    os.umask(os.umask(0o002))
    assert caches() == [inductor, triton]


@pytest.mark.parametrize("value", ["absolute", "relative"])
def test_xdg_cache_home_counts_if_it_is_absolute(home, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "xdg") if value == "absolute" else "xdg"
    expected = tmp_path / "xdg" if value == "absolute" else home / ".cache"
    assert caches()[0].parent == expected / "fastresnet"


def test_a_link_above_the_folder_is_resolved_once(home, tmp_path):
    (tmp_path / "scratch").mkdir()
    (home / ".cache").symlink_to(tmp_path / "scratch")
    assert caches()[0].parent == tmp_path / "scratch" / "fastresnet"


@pytest.mark.parametrize("given", VARIABLES)
def test_pytorchs_own_variables_win(home, tmp_path, given):
    os.environ[given] = str(tmp_path / "mine")
    inductor, triton = caches()
    if given == "TORCHINDUCTOR_CACHE_DIR":
        assert (inductor, triton) == (tmp_path / "mine", tmp_path / "mine" / "triton")
        assert not (home / ".cache").exists()
    else:
        assert (inductor.parent, triton) == (home / ".cache" / "fastresnet", tmp_path / "mine")


def test_the_default_that_pytorch_itself_puts_into_the_variables_does_not_win(home):
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    os.environ["TRITON_CACHE_DIR"] = triton_cache_dir(0)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == cache_dir()
    inductor, triton = caches()
    assert inductor.is_relative_to(home)
    assert triton.is_relative_to(home)


def plant_link(folder):
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def plant_open_folder(folder):
    folder.mkdir()
    folder.chmod(0o777)


def plant_readable_folder(folder):
    folder.mkdir()
    folder.chmod(0o755)


def plant_under_open_folder(folder):
    folder.mkdir(mode=0o700)
    folder.parent.chmod(0o777)


def plant_foreign_folder(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 4321, 4321)


def plant_under_foreign_folder(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder.parent, 4321, 4321)


FOREIGN = [
    (plant_foreign_folder, "fastresnet belongs to another user (4321)"),
    (plant_under_foreign_folder, "other users can change {cache}, and fastresnet in it"),
]
"""Cases that only root can set up, by giving folders away."""


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (plant_link, "fastresnet is not a folder but a link or a file"),
        (Path.touch, "fastresnet is not a folder but a link or a file"),
        (plant_open_folder, "fastresnet is open to other users (mode 777, not 700)"),
        (plant_readable_folder, "fastresnet is open to other users (mode 755, not 700)"),
        (plant_under_open_folder, "other users can change {cache}, and fastresnet in it"),
        *([] if os.geteuid() else FOREIGN),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_folder_is_not_used(home, plant, reason):
    (home / ".cache").mkdir(mode=0o700)
    plant(home / ".cache" / "fastresnet")
    with pytest.warns(Note) as notes:
        use_private_caches()
    (note,) = [str(note.message) for note in notes]
    assert reason.format(cache=home / ".cache") in note
    assert "XDG_CACHE_HOME" in note
    assert "\n" not in note
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent
    assert str(folder) in note
    assert mode(folder) == 0o700
    assert not folder.is_relative_to(home)
    folder.rmdir()


def test_a_sticky_folder_above_is_safe(home):
    (home / ".cache").mkdir()
    (home / ".cache").chmod(0o1777)
    assert caches()[0].parent == home / ".cache" / "fastresnet"


@pytest.mark.parametrize("home_folder", ["/proc/nowhere", None], ids=["not writable", "none"])
def test_without_a_home_the_folder_is_temporary_and_removed_by_its_process(home, monkeypatch, home_folder):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    if home_folder is None:
        monkeypatch.setattr(Path, "home", lambda: Path("~").expanduser())
        os.environ["HOME"] = "~"  # what expanduser returns where there is none
    else:
        os.environ["HOME"] = home_folder
    with pytest.warns(Note, match="XDG_CACHE_HOME to a folder of your own"):
        use_private_caches()
    inductor, triton = caches()  # says nothing a second time
    assert triton.is_relative_to(inductor)
    inductor.mkdir()
    (remove,) = at_exit
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: 1)
        remove()
    assert inductor.exists()
    remove()
    assert not inductor.parent.exists()


def test_nothing_is_made_in_a_home_that_others_can_change(home):
    home.chmod(0o777)
    with pytest.warns(Note, match=f"other users can change {home}"):
        use_private_caches()
    assert not (home / ".cache").exists()


def test_a_temporary_folder_that_others_can_replace_is_not_used(home, tmp_path, monkeypatch):
    os.environ["HOME"] = "/proc/nowhere"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "open"))
    with pytest.raises(RunError, match=r"other users can change .*open"):
        use_private_caches()


def test_nowhere_to_compile_is_an_error_in_words(home, monkeypatch):
    def fail(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    os.environ["HOME"] = "/proc/nowhere"
    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(RunError, match=r"no folder to compile in .* Set TMPDIR or XDG_CACHE_HOME"):
        use_private_caches()


def test_a_user_without_a_name_gets_one(home, monkeypatch):
    def unknown():
        raise KeyError("getpwuid(): uid not found: 1234")

    name_user()
    assert os.environ.get("LOGNAME") != f"uid_{os.getuid()}"
    monkeypatch.setattr(getpass, "getuser", unknown)
    name_user()
    assert os.environ["LOGNAME"] == f"uid_{os.getuid()}"


PLANTED = """
import os, tempfile, torch
from fastresnet.compilation import torch_compile
tempfile.tempdir = None  # as in a new process
constant = os.getpid()  # nobody has compiled this function
print(int(torch_compile(lambda x: x.sin() + constant, fullgraph=True)(torch.zeros(8)).sum()) == 8 * constant)
"""


def test_pytorchs_folder_in_the_temporary_one_is_not_used(python, tmp_path):
    """A file in its place: whatever used it, also for headers, would fail."""
    (tmp_path / f"torchinductor_{getpass.getuser()}").touch()
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run([python, "-c", PLANTED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_kernels_are_kept_apart_by_the_instructions_of_the_processor(home, monkeypatch, tmp_path):
    folders = set()
    for flags in ("avx2", "avx512f", None):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        monkeypatch.setattr(compilation, "PROCESSOR", tmp_path / str(flags))
        if flags:
            (tmp_path / flags).write_text(f"model name\t: a processor\nflags\t\t: {flags}\n")
        folders.add(caches()[0])
    assert len(folders) == 3


class Scale:
    """A function and a method to compile."""

    def __init__(self, factor):
        self.factor = factor

    def scaled(self, x, *, offset=1):
        return self.factor * x + offset


def test_graphs_of_one_function_do_not_count_for_another_of_the_same_code(home):
    """PyTorch refuses the ninth graph of a code object; two networks with five sizes of images have ten."""

    def through_closure(x):
        return factor * x + 1

    for factor in (2, 3):
        for function in (Scale(factor).scaled, through_closure):
            compiled = torch_compile(function, backend="eager", fullgraph=True, dynamic=False)
            for size in range(2, 7):
                assert compiled(torch.ones(size)).tolist() == [factor + 1] * size
