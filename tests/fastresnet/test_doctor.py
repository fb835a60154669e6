"""Findings of `fastresnet doctor`, with and without injected faults."""

import json
import shutil
import warnings
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch

from fastresnet import device, doctor, provenance
from pipelines.errors import Note


def findings(run, tmp_path, *arguments):
    code, out, err = run("doctor", "--all", "--json", tmp_path / "doctor.json", *arguments)
    found = {each["what"]: each for each in json.loads((tmp_path / "doctor.json").read_text())["findings"]}
    assert code == int(any(each["state"] == "broken" for each in found.values())), err
    assert all(each["what"] in out for each in found.values())
    assert all(bool(each["remedy"]) == (each["state"] != "works") for each in found.values())
    return found


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
    """Replace torch.compile, which takes ten seconds; only one test uses it."""
    monkeypatch.setattr(doctor.torch, "compile", lambda function, **_: function)


def test_healthy_machine_lacks_at_most_gpu_and_cifar10(run, tmp_path, need, monkeypatch, data_root):
    need("dali"), need("ffcv")
    monkeypatch.undo()
    found = findings(run, tmp_path, "--root", data_root)
    assert {what for what, each in found.items() if each["state"] != "works"} <= {"GPU", "data cifar10"}
    assert torch.__version__.partition("+")[0] in found["libraries"]["detail"]
    assert "171 training and 50 test images, verified" in found["data shapes10"]["detail"]


def test_missing_gpu_is_reported_with_its_reason(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "NVIDIA_CONTROL", Path("no/such/file"))
    for version, driver, reason in (
        (None, None, "built for CPUs"),
        ("13.0", None, "no driver"),
        ("13.0", "470", "470"),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(doctor, "_driver", lambda driver=driver: driver)
        gpu = findings(run, tmp_path)["GPU"]
        assert gpu["state"] == "missing"
        assert reason in gpu["detail"]


@pytest.mark.parametrize("pipeline", ["dali", "ffcv"])
def test_pipeline_without_its_library_is_reported_missing(run, tmp_path, need, break_import, pipeline):
    need(pipeline)
    break_import(pipeline, ModuleNotFoundError(f"No module named {pipeline!r}", name=pipeline))
    found = findings(run, tmp_path)[f"pipeline {pipeline}"]
    assert found["state"] == "missing"
    assert found["detail"].startswith(f"{pipeline.upper()} is not installed")
    assert f"fastresnet[{pipeline}]" in found["remedy"]
    assert "fastresnet[" not in found["detail"]


def test_pipeline_with_a_broken_library_is_reported_broken(run, tmp_path, monkeypatch):
    def pipeline_class(name, device, original=doctor.pipeline_class):
        if name == "torchvision":
            raise OSError("libfoo.so: cannot open shared object file")
        return original(name, device)

    monkeypatch.setattr(doctor, "pipeline_class", pipeline_class)
    found = findings(run, tmp_path)["pipeline torchvision"]
    assert (found["state"], found["detail"]) == ("broken", "libfoo.so: cannot open shared object file")
    assert found["remedy"] == "pip install --force-reinstall torchvision"


def test_missing_compilers_are_reported(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nmore")

    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(doctor.torch, "compile", fail)
    found = findings(run, tmp_path)
    assert "no-such-compiler" in found["C loops"]["detail"]
    assert found["torch.compile"]["state"] == "broken"
    assert found["torch.compile"]["detail"] == "InvalidCxxCompiler: no working C++ compiler"


@pytest.mark.parametrize(("name", "source"), [("shapes10", ""), ("cats", " --source PATH")])
def test_damaged_data_set_is_reported_with_its_remedy(run, tmp_path, data_root, name, source):
    shutil.copytree(data_root / "shapes10", tmp_path / "data" / name)
    labels = tmp_path / "data" / name / "test_labels.npy"
    labels.write_bytes(labels.read_bytes()[:-1])
    found = findings(run, tmp_path, "--root", tmp_path / "data")[f"data {name}"]
    assert found["state"] == "broken"
    assert str(labels) in found["detail"]
    assert found["remedy"] == f"fastresnet prepare --data {name} --root {tmp_path / 'data'}{source}"


def test_low_disk_space_and_memory_are_reported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**7))
    monkeypatch.setattr(doctor, "free_memory", lambda _: 2 * 10**8)
    found = findings(run, tmp_path)
    assert (found["disk"]["state"], found["disk"]["detail"]) == ("broken", "0.0 GB free")
    assert (found["memory"]["state"], found["memory"]["detail"]) == ("broken", "0.2 GB free")


def test_a_library_that_is_not_installed_has_no_version(run, tmp_path, monkeypatch):
    def version(name, original=metadata.version):
        if name == "torchvision":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", version)
    versions = provenance.environment(torch.device("cpu"))["versions"]
    assert "torchvision" not in versions
    assert versions["numpy"] == numpy.__version__
    libraries = findings(run, tmp_path)["libraries"]["detail"]
    assert f"numpy {numpy.__version__}" in libraries
    assert "torchvision" not in libraries


def test_torchvision_pipeline_without_torchvision_is_reported_missing(run, tmp_path, break_import):
    break_import("torchvision", ModuleNotFoundError("No module named 'torchvision'"))
    found = findings(run, tmp_path)["pipeline torchvision"]
    assert (found["state"], found["remedy"]) == ("missing", "pip install torchvision")


@pytest.mark.parametrize(
    ("built_for", "visible", "reason_given"),
    [
        ("13.0", None, "too old for CUDA 13.0"),
        (None, None, "built for CPUs"),
        ("13.0", "0", "too old for CUDA 13.0"),
        ("13.0", "", None),
        ("13.0", "-1", None),
    ],
)
def test_note_explains_why_pytorch_does_not_find_the_gpu(tmp_path, monkeypatch, built_for, visible, reason_given):
    """There is no note where the environment hides the GPU."""
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(device, "NVIDIA_CONTROL", tmp_path)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        assert device.resolve_device("auto").type == "cpu"
    assert [note.category for note in notes] == [Note] * (reason_given is not None)
    assert reason_given is None or reason_given in str(notes[0].message)


def test_a_driver_without_nvidia_smi_is_not_called_missing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    monkeypatch.setattr(doctor, "NVIDIA_CONTROL", tmp_path)
    gpu = findings(run, tmp_path)["GPU"]
    assert "CUDA 13.0 does not start" in gpu["detail"]
    assert "newer driver" in gpu["remedy"]
