"""The data set of the runs in tiny_runs.py."""

import pytest

from pipelines.prepare import prepare


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    """80 training and 30 test images, five steps an epoch: a few steps are all that these runs need."""
    root = tmp_path_factory.mktemp("tiny")
    prepare("shapes10", root, lambda *_: None, train_images=80, test_images=30)
    return root
