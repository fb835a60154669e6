import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastresnet.evaluation import BATCH_SIZE, Evaluator, evaluate, open_evaluation
from fastresnet.models import create_model
from pipelines.resident import DevicePipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = create_model("resnet20")
    network(torch.randn(64, 3, 32, 32))  # gives the batch norms statistics of their own
    return network.eval()


def evaluate_small(network, dataset, monkeypatch, batch_size, normalization="half", pipeline="resident"):
    monkeypatch.setattr("fastresnet.evaluation.BATCH_SIZE", batch_size)
    batches = open_evaluation(dataset, normalization, "fp32", CPU, pipeline)
    return evaluate(network, batches, dataset.classes, precision="fp32", device=CPU)


@torch.no_grad()
def expected_figures(network, dataset):
    images = torch.from_numpy(dataset.test.images / 255).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(dataset.test.labels.copy())
    logits = network((images - 0.5) / 0.5)
    hits = (logits.argmax(1) == labels).double()
    per_class = {name: 100 * hits[labels == i].mean().item() for i, name in enumerate(dataset.classes)}
    return 100 * hits.mean().item(), F.cross_entropy(logits, labels).item(), per_class


@pytest.mark.parametrize("pipeline", ["resident", "torchvision"])
@pytest.mark.parametrize("batch_size", [7, 32, 45, BATCH_SIZE])
def test_evaluation_counts_every_image_once_whatever_the_batch_size(
    network, dataset, monkeypatch, batch_size, pipeline
):
    result = evaluate_small(network, dataset, monkeypatch, batch_size, pipeline=pipeline)
    accuracy, loss, per_class = expected_figures(network, dataset)
    assert result.accuracy == pytest.approx(accuracy)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.per_class == pytest.approx(per_class)


@pytest.mark.parametrize("batch_size", [7, BATCH_SIZE])
def test_mirror_accuracy_sums_the_logits_of_both_views(network, dataset, monkeypatch, batch_size):
    monkeypatch.setattr("fastresnet.evaluation.BATCH_SIZE", batch_size)
    batches = open_evaluation(dataset, "half", "fp32", CPU)
    result = evaluate(network, batches, dataset.classes, precision="fp32", device=CPU, mirror=True)
    images = torch.from_numpy(dataset.test.images / 127.5 - 1).permute(0, 3, 1, 2).float()
    mirrored = torch.from_numpy(dataset.test.images[:, :, ::-1] / 127.5 - 1).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        predicted = (network(images) + network(mirrored)).argmax(1)
    hits = (predicted == torch.from_numpy(dataset.test.labels.copy())).double()
    assert result.mirror_accuracy == pytest.approx(100 * hits.mean().item())
    assert result.accuracy == pytest.approx(expected_figures(network, dataset)[0])


def test_classes_without_images_are_left_out(network, dataset, monkeypatch):
    kept = np.flatnonzero(dataset.test.labels != 3)
    partial = dataclasses.replace(dataset, test=dataclasses.replace(dataset.test, ids=kept))
    result = evaluate_small(network, partial, monkeypatch, 32)
    assert set(dataset.classes) - set(result.per_class) == {dataset.classes[3]}


def test_evaluation_does_not_change_the_network(network, dataset, monkeypatch):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate_small(network, dataset, monkeypatch, 32)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def open_resident(dataset, device, monkeypatch):
    """Open the test split as on a GPU, in batches of 7: the last one has a single image."""
    monkeypatch.setattr("fastresnet.evaluation.BATCH_SIZE", 7)
    if device.type == "cpu":
        monkeypatch.setattr("pipelines.resident.HostPipeline", DevicePipeline)
    return open_evaluation(dataset, "half", "fp32", device)


def figures(evaluation):
    return dataclasses.replace(evaluation, images_per_s=0)


@pytest.mark.parametrize("mirror", [False, True])
def test_recorded_evaluation_gives_the_numbers_of_the_eager_one_while_weights_change(
    network, dataset, monkeypatch, mirror
):
    """A stand-in for the recording runs the work three times before, as the recording does, and then as a replay."""
    runs = []

    def record(work):
        def replay():
            runs.append(work)
            work()

        for _ in range(3):
            replay()
        return replay

    monkeypatch.setattr("fastresnet.evaluation.recorded", record)
    pipeline, network = open_resident(dataset, CPU, monkeypatch), copy.deepcopy(network)
    captured, eager = (
        Evaluator(network, pipeline, dataset.classes, "fp32", CPU, mirror=mirror, captured=captured)
        for captured in (True, False)
    )
    for _ in range(2):
        assert figures(captured()) == figures(eager())
        assert eager().accuracy == pytest.approx(expected_figures(network, dataset)[0])
        with torch.no_grad():
            network.fc.weight.normal_()
    assert len(runs) == 3 + 2 * 8


def test_only_a_pipeline_that_gathers_batches_is_recorded(network, dataset, monkeypatch):
    monkeypatch.delattr("fastresnet.evaluation.recorded")
    batches = open_evaluation(dataset, "half", "fp32", CPU, "torchvision")
    evaluate_captured = Evaluator(network, batches, dataset.classes, "fp32", CPU, captured=True)
    assert evaluate_captured().loss == pytest.approx(expected_figures(network, dataset)[1], rel=1e-5)


@pytest.mark.gpu
def test_recorded_evaluation_gives_the_numbers_of_the_eager_one_on_the_gpu(network, dataset, monkeypatch):
    gpu = torch.device("cuda")
    pipeline, network = open_resident(dataset, gpu, monkeypatch), copy.deepcopy(network).to(gpu)
    captured, eager = (
        Evaluator(network, pipeline, dataset.classes, "fp32", gpu, captured=captured) for captured in (True, False)
    )
    for _ in range(2):
        assert figures(captured()) == figures(eager())
        with torch.no_grad():
            network.fc.weight.normal_()
