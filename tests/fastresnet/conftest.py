"""Fixtures that several tests of this folder share."""

import dataclasses

import pytest
import torch

from fastresnet import models
from pipelines.prepare import prepare


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    """Prepare 40 training and 20 test images, five steps an epoch, for the runs in tiny_runs.py."""
    root = tmp_path_factory.mktemp("tiny")
    prepare("shapes10", root, lambda *_: None, train_images=40, test_images=20)
    return root


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread: the networks are small, and more threads would wait for other work on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shallow(monkeypatch):
    """Give networks of 20 layers one block in each stage: the first stage keeps its width, and the others do not."""
    for name, spec in models.MODELS.items():
        if spec.depth == 20:
            monkeypatch.setitem(models.MODELS, name, dataclasses.replace(spec, depth=8))


@pytest.fixture(scope="module")
def small_runs():
    """Give ResNet-20 one block in each stage, which takes a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "resnet20", dataclasses.replace(models.MODELS["resnet20"], depth=8))
        yield
