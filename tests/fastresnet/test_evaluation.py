import contextlib
import copy
import dataclasses
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fastresnet
from fastresnet.checkpoint import save_tensors
from fastresnet.config import TrainConfig
from fastresnet.evaluation import (
    BATCH_SIZE,
    Evaluator,
    evaluate,
    find_dataset_for,
    match_classes,
    open_evaluation,
    predict,
)
from fastresnet.models import create_model
from fastresnet.pretrained import pretrained_file
from fastresnet.weights import Normalized, Weights, load_weights
from pipelines.cifar import CIFAR10_CLASSES
from pipelines.errors import DataError, Note, RunError, UsageError
from pipelines.resident import DevicePipeline
from pipelines.sources import read_source
from pipelines.store import RawData, write_store

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
    confusion = np.zeros((10, 10), np.int64)
    for label, predicted in zip(labels, logits.argmax(1), strict=True):
        confusion[label, predicted] += 1
    return 100 * hits.mean().item(), F.cross_entropy(logits, labels).item(), per_class, confusion


@pytest.mark.parametrize("pipeline", ["resident", "torchvision"])
@pytest.mark.parametrize("batch_size", [7, 32, 45, BATCH_SIZE])
def test_evaluation_counts_every_image_once_whatever_the_batch_size(
    network, dataset, monkeypatch, batch_size, pipeline
):
    result = evaluate_small(network, dataset, monkeypatch, batch_size, pipeline=pipeline)
    accuracy, loss, per_class, confusion = expected_figures(network, dataset)
    assert result.accuracy == pytest.approx(accuracy)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.per_class == pytest.approx(per_class)
    np.testing.assert_array_equal(result.confusion, confusion)


def test_evaluation_counts_no_matrix_of_very_many_classes(dataset):
    """It would take 8 GB."""
    classes = tuple(map(str, range(32_768)))
    many = dataclasses.replace(dataset, classes=classes)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1), nn.ConstantPad1d((0, len(classes) - 1), -9.0))
    result = evaluate(network, open_evaluation(many, "half", "fp32", CPU), classes, precision="fp32", device=CPU)
    assert result.confusion is None
    assert result.per_class["0"] == 100


class Scrambled(nn.Module):
    """A network whose logits for two views of an image have nothing in common."""

    def __init__(self, seed):
        super().__init__()
        weights = torch.randn(3 * 32 * 32, 10, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.Parameter(weights)

    def forward(self, x):
        return torch.sin(x.flatten(1) @ self.weights)


@pytest.mark.parametrize("batch_size", [7, BATCH_SIZE])
def test_augmented_accuracies_are_those_of_the_weighted_views(dataset, monkeypatch, batch_size):
    """Ten networks: a wrong view or weight changes the number of hits of one of them."""
    monkeypatch.setattr("fastresnet.evaluation.BATCH_SIZE", batch_size)
    batches = open_evaluation(dataset, "half", "fp32", CPU)
    padded = np.pad(dataset.test.images / 127.5 - 1, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    center, shifts = padded[:, 1:-1, 1:-1], (padded[:, :-2, :-2], padded[:, 2:, 2:])
    labels = torch.from_numpy(dataset.test.labels.copy())

    @torch.no_grad()
    def both(network, images):
        views = (torch.from_numpy(view.copy()).permute(0, 3, 1, 2).float() for view in (images, images[:, :, ::-1]))
        return sum(network(view) for view in views)

    def percent(logits):
        return pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())

    for network in map(Scrambled, range(10)):
        flip = both(network, center)
        shift = 0.25 * flip + 0.125 * sum(both(network, images) for images in shifts)
        expected = {"none": (None, None), "flip": (percent(flip), None), "shift": (percent(flip), percent(shift))}
        for tta, figures in expected.items():
            result = evaluate(network, batches, dataset.classes, precision="fp32", device=CPU, tta=tta)
            assert (result.mirror_accuracy, result.shift_accuracy) == figures
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


@pytest.mark.parametrize("tta", ["none", "shift"])
def test_recorded_evaluation_gives_the_numbers_of_the_eager_one_while_weights_change(
    network, dataset, monkeypatch, tta
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
        Evaluator(network, pipeline, dataset.classes, "fp32", CPU, tta=tta, captured=captured)
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


# --- classes by name ---------------------------------------------------------------------------------------------

PLANES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def write(tmp_path, dataset):
    """Write the test images of the drawn data set as one with other classes, `order[i]` of the old as number i."""

    def write_data(name, classes, order=range(10)):
        number = np.argsort(list(order))
        labels = {split: number[getattr(dataset, split).labels] for split in ("train", "test")}
        raw = RawData(
            tuple(classes), dataset.train.images, labels["train"], np.asarray(dataset.test.images), labels["test"]
        )
        write_store(tmp_path / name, raw, source="a test", version="0")
        return name

    return write_data


@pytest.fixture(scope="module")
def varied(network, dataset):
    """Give the network another bias, so that it predicts more than one class."""
    network, images = copy.deepcopy(network), torch.from_numpy(np.array(dataset.test.images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        network.fc.bias -= network((images - 0.5) / 0.5).mean(0)
    return network


def own_file(network, path, classes, data="cifar10"):
    config = TrainConfig(precision="fp32", data=data).to_dict()
    description = {"config": config, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_tensors(path, network.state_dict(), description | ({} if classes is None else {"classes": classes}))
    return path


def accuracies(file, data, root):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        result = fastresnet.evaluate(file, data=data, root=root, device="cpu", threads=1)
    return result, [str(note.message) for note in notes]


RENAMED = {
    "same": CIFAR10_CLASSES,
    "short": PLANES,
    "case and blanks": [name.title() + " " for name in CIFAR10_CLASSES],
    "plural": [f"{name}s" for name in PLANES],
    "aeroplane": ["aeroplane", "auto", *CIFAR10_CLASSES[2:]],
}


@pytest.mark.parametrize("classes", RENAMED.values(), ids=RENAMED)
def test_classes_are_matched_by_name_whatever_their_order(varied, tmp_path, write, classes):
    file = own_file(varied, tmp_path / "w.ckpt", CIFAR10_CLASSES)
    expected, _ = accuracies(file, write("original", CIFAR10_CLASSES), tmp_path)
    assert len({round(value) for value in expected.per_class.values()}) > 2  # another order would give others
    order = sorted(range(10), key=lambda number: classes[number])  # as ImageFolder
    data = write("renamed", [classes[number] for number in order], order)
    found, notes = accuracies(file, data, tmp_path)
    assert found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.per_class == {classes[number]: expected.per_class[CIFAR10_CLASSES[number]] for number in order}
    assert notes == []


@pytest.mark.parametrize("layout", ["CLASS", "test/CLASS", "train/CLASS and test/CLASS"])
def test_images_by_class_are_evaluated_without_a_store(varied, tmp_path, write, dataset, layout):
    file = own_file(varied, tmp_path / "w.ckpt", CIFAR10_CLASSES)
    expected, _ = accuracies(file, write("cifar-like", CIFAR10_CLASSES), tmp_path)
    top = tmp_path / "images" / ("" if layout == "CLASS" else "test")
    for row, (image, label) in enumerate(zip(dataset.test.images, dataset.test.labels, strict=True)):
        folder = top / CIFAR10_CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row}.png")
    if "train" in layout:
        (tmp_path / "images" / "train" / "truck").mkdir(parents=True)
        Image.fromarray(dataset.train.images[0]).save(tmp_path / "images" / "train" / "truck" / "1.png")
    found, notes = accuracies(file, str(tmp_path / "images"), tmp_path)
    assert (found.accuracy, found.per_class, notes) == (expected.accuracy, expected.per_class, [])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_images_of_some_classes_are_evaluated(varied, tmp_path, dataset):
    file = own_file(varied, tmp_path / "w.ckpt", CIFAR10_CLASSES)
    some = [row for row, label in enumerate(dataset.test.labels) if label in (1, 9)][:40]
    for row in some:
        folder = tmp_path / "images" / {1: "car", 9: "truck"}[int(dataset.test.labels[row])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.test.images[row]).save(folder / f"{row}.png")
    images = torch.from_numpy(dataset.test.images[some] / 255).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        predicted = load_weights(file).model((images - 0.5) / 0.5).argmax(1).numpy()
    labels = np.asarray(dataset.test.labels)[some]
    found, notes = accuracies(file, str(tmp_path / "images"), tmp_path)
    assert found.accuracy == pytest.approx(100 * (predicted == labels).mean())
    assert found.per_class == {
        CIFAR10_CLASSES[label]: pytest.approx(100 * (predicted[labels == label] == label).mean()) for label in (1, 9)
    }
    assert notes == []
    (tmp_path / "images" / "tram").mkdir()
    Image.fromarray(dataset.test.images[0]).save(tmp_path / "images" / "tram" / "1.png")
    with pytest.raises(DataError, match=r"other classes .*\(car, tram, truck\)"):
        accuracies(file, str(tmp_path / "images"), tmp_path)


def test_a_folder_without_training_images_is_normalised_as_predict_does(varied, tmp_path, dataset):
    torch.save(varied.state_dict(), tmp_path / "w.pt")
    for name in CIFAR10_CLASSES:
        (tmp_path / "dark" / name).mkdir(parents=True)
        Image.fromarray(np.asarray(dataset.test.images[len(name)]) // 2).save(tmp_path / "dark" / name / "1.png")
    weights = load_weights(tmp_path / "w.pt")
    images = [np.asarray(dataset.test.images[len(name)]) // 2 for name in CIFAR10_CLASSES]
    with torch.no_grad():
        logits = Normalized(weights)(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)
    expected = F.cross_entropy(logits, torch.arange(10)).item()
    result = fastresnet.evaluate(tmp_path / "w.pt", data=str(tmp_path / "dark"), device="cpu", threads=1)
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_a_constant_channel_is_evaluated_too(varied, tmp_path):
    for name in CIFAR10_CLASSES:
        (tmp_path / "grey" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "grey" / name / "1.png")
    result = fastresnet.evaluate(varied, data=str(tmp_path / "grey"), device="cpu")
    assert result.accuracy == 10  # one prediction for equal images


def test_another_data_set_of_the_same_name_is_noted(varied, tmp_path, dataset, data_root):
    file, config = tmp_path / "w.ckpt", TrainConfig(precision="fp32", data="shapes10").to_dict()
    description = {"config": config, "mean": [0.5] * 3, "std": [0.5] * 3, "classes": list(dataset.classes)}
    save_tensors(file, varied.state_dict(), {**description, "data_sha256": dataset.digest})
    assert accuracies(file, None, data_root)[1] == []
    save_tensors(file, varied.state_dict(), {**description, "data_sha256": "0" * 64})
    (note,) = accuracies(file, None, data_root)[1]
    assert note.startswith(f"{dataset.folder} is not the shapes10 on which {file} was trained")
    assert accuracies(file, "shapes10", data_root)[1] == []


def counts(file, data, root):
    """Confusion matrix of the network in `file` on the test set of `data`."""
    weights, dataset = find_dataset_for(load_weights(file), file, data, root)
    with contextlib.closing(open_evaluation(dataset, weights.normalization, "fp32", CPU)) as pipeline:
        predicted, _, labels = predict(weights.model, pipeline, "fp32", CPU)
    return np.histogram2d(labels, predicted, bins=len(dataset.classes), range=2 * [(0, len(dataset.classes))])[0]


def test_matched_logits_and_confusion_are_bit_equal(varied, tmp_path, write):
    file = own_file(varied, tmp_path / "w.ckpt", CIFAR10_CLASSES)
    expected = counts(file, write("original", CIFAR10_CLASSES), tmp_path)
    order = [2, 9, 0, 1, 8, 3, 4, 7, 6, 5]
    data = write("renamed", [PLANES[number] for number in order], order)
    np.testing.assert_array_equal(counts(file, data, tmp_path), expected[np.ix_(order, order)])
    images = torch.randn(3, 3, 32, 32)
    weights, _ = find_dataset_for(load_weights(file), file, data, tmp_path)
    with torch.no_grad():
        assert torch.equal(weights.model(images), load_weights(file).model(images)[:, order])


def test_other_classes_are_refused_with_both_lists(varied, tmp_path, write, dataset, data_root):
    file = own_file(varied, tmp_path / "w.ckpt", dataset.classes)
    with pytest.raises(DataError, match=r"other classes.*circle, ring.*airplane, automobile.*truck"):
        accuracies(file, write("cifar-like", CIFAR10_CLASSES), tmp_path)
    with pytest.raises(DataError, match=r"other classes.*airplane, automobile.*circle, ring"):
        accuracies("pretrained:resnet20", "shapes10", data_root)
    toads = [name.replace("frog", "toad") for name in CIFAR10_CLASSES]
    with pytest.raises(DataError, match=r"other classes.*frog.*toad"):
        accuracies("pretrained:resnet20", write("toads", toads), tmp_path)


def test_lists_of_many_classes_are_cut_to_their_differences(varied, tmp_path, write):
    many = [f"kind {number:03}" for number in range(1000)]
    weights = dataclasses.replace(
        load_weights(own_file(varied, tmp_path / "w.ckpt", CIFAR10_CLASSES)),
        classes=(*many[:-20], *(f"other {number}" for number in range(20))),
        num_classes=1000,
    )
    named = SimpleNamespace(name="many", classes=tuple(many))
    with pytest.raises(DataError) as caught:
        match_classes(weights, "w.ckpt", named)
    assert "other 11 and 8 more" in str(caught.value)
    assert "kind 980" in str(caught.value)
    assert "kind 979" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "classes", "message"),
    [
        (None, CIFAR10_CLASSES, "w.ckpt does not name its classes: taken in the order of data's"),
        ([str(number) for number in range(10)], PLANES, "w.ckpt does not name its classes"),
        (CIFAR10_CLASSES, [str(number) for number in range(10)], "data does not name its classes"),
        ([1, 2], PLANES, "w.ckpt does not name its classes"),
    ],
)
def test_without_names_on_one_side_the_order_is_assumed_with_a_note(varied, tmp_path, write, given, classes, message):
    file = own_file(varied, tmp_path / "w.ckpt", given, data="mine")
    found, notes = accuracies(file, write("data", classes), tmp_path)
    assert set(found.per_class) <= set(classes)
    (note,) = notes
    assert message in note


def test_a_foreign_file_is_assumed_to_have_the_order_with_a_note(varied, tmp_path, write):
    torch.save(varied.state_dict(), tmp_path / "w.pt")
    _, notes = accuracies(tmp_path / "w.pt", write("data", CIFAR10_CLASSES), tmp_path)
    assert len([note for note in notes if "does not name its classes" in note]) == 1


def test_ten_nameless_outputs_are_those_of_cifar10_for_its_classes(varied, tmp_path, write):
    torch.save(varied.state_dict(), tmp_path / "w.pt")
    expected, _ = accuracies(tmp_path / "w.pt", write("original", CIFAR10_CLASSES), tmp_path)
    order = sorted(range(10), key=lambda number: PLANES[number])
    data = write("renamed", [PLANES[number] for number in order], order)
    found, notes = accuracies(tmp_path / "w.pt", data, tmp_path)
    assert found.per_class == {PLANES[number]: expected.per_class[CIFAR10_CLASSES[number]] for number in order}
    assert [note for note in notes if note.endswith("does not name its classes: CIFAR-10's are assumed")]


def test_numbers_stand_for_names_in_the_order_of_numbers():
    """Folders of numbers are sorted as text: 10 and 11 are before 2."""
    numbers, names = sorted(map(str, range(12))), [f"kind {number:02}" for number in range(12)]

    def outputs(theirs, ours):
        given = {"model": nn.Identity(), "num_classes": 12, "classes": tuple(theirs), "named": True}
        weights = Weights(**given, name="", shortcut="", training=None, mean=torch.zeros(3), std=torch.ones(3))
        with pytest.warns(Note, match="does not name its classes"):
            matched = match_classes(weights, "w.ckpt", SimpleNamespace(name="data", classes=tuple(ours)))
        return matched.model(torch.arange(12)[None])[0].tolist()

    assert outputs(names, numbers) == [0, 1, 10, 11, *range(2, 10)]
    assert outputs(numbers, names) == [numbers.index(str(number)) for number in range(12)]


def test_numbers_on_both_sides_are_matched_as_names(varied, tmp_path, write):
    numbers = [str(number) for number in range(10)]
    order = [0, 1, 9, 2, 3, 4, 5, 6, 7, 8]
    file = own_file(varied, tmp_path / "w.ckpt", numbers)
    expected, notes = accuracies(file, write("original", numbers), tmp_path)
    found, more = accuracies(file, write("other", [numbers[n] for n in order], order), tmp_path)
    assert (found.accuracy, notes, more) == (expected.accuracy, [], [])


def test_names_that_only_differ_in_an_alias_stay_different(varied, tmp_path, write):
    """A data set may have both words."""
    both = ["car", "automobile", *CIFAR10_CLASSES[2:]]
    file = own_file(varied, tmp_path / "w.ckpt", both)
    order = [1, 0, *range(2, 10)]
    expected, _ = accuracies(file, write("original", both), tmp_path)
    found, _ = accuracies(file, write("other", [both[n] for n in order], order), tmp_path)
    assert found.accuracy == expected.accuracy
    with pytest.raises(DataError, match="other classes"):
        accuracies(file, write("cifar-like", CIFAR10_CLASSES), tmp_path)


def test_images_of_cifar10_in_folders_have_the_accuracy_of_the_original(run, tmp_path, cifar10_folder):
    """200 test images, once in folders of CIFAR-10's names and once of those that PyTorch's tutorial uses."""
    data = read_source(cifar10_folder, lambda *_: None)
    rows = np.concatenate([np.flatnonzero(data.test_labels == number)[:20] for number in range(10)])
    shown = {}
    for name, classes in (("original", CIFAR10_CLASSES), ("renamed", PLANES)):
        for split, row in ((split, row) for split in ("train", "test") for row in rows):
            folder = tmp_path / name / split / classes[data.test_labels[row]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.test_images[row]).save(folder / f"{row}.png")
        root = ("--root", tmp_path / "data", "--data", name)
        assert run("prepare", "--source", tmp_path / name, *root)[0] == 0
        assert run("eval", "--weights", "pretrained:resnet20", *root, "--json", tmp_path / f"{name}.json")[0] == 0
        shown[name] = json.loads((tmp_path / f"{name}.json").read_text())
    images, labels = torch.from_numpy(data.test_images[rows]).permute(0, 3, 1, 2) / 255, data.test_labels[rows]
    with torch.no_grad():
        weights = load_weights(pretrained_file("resnet20"))
        predicted = Normalized(weights)(images).argmax(1).numpy()
    assert shown["original"]["test_accuracy"] == 100 * (predicted == labels).mean()
    assert shown["renamed"]["test_accuracy"] == shown["original"]["test_accuracy"] > 90
    names = dict(zip(CIFAR10_CLASSES, PLANES, strict=True))
    per_class = {names[name]: value for name, value in shown["original"]["per_class"].items()}
    assert shown["renamed"]["per_class"] == per_class


# --- networks of a user ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda logits: logits[:, :5], r"maps 50 images to \[50, 5\]; expected are logits \[50, 10\]"),
        (lambda logits: logits.repeat(1, 10), r"to \[50, 100\]"),
        (lambda logits: logits[:, :, None], r"to \[50, 10, 1\]"),
        (lambda logits: (logits, logits), "to a tuple"),
    ],
)
def test_a_network_of_other_outputs_is_refused(network, data_root, outputs, message):
    class Other(nn.Module):
        def forward(self, images):
            return outputs(network(images))

    with pytest.raises(UsageError, match=message):
        fastresnet.evaluate(Other(), data="shapes10", root=data_root, device="cpu")


def test_another_order_of_the_classes_of_cifar10_is_noted(varied, tmp_path, write):
    """A network has no names for its outputs."""
    assert accuracies(varied, write("original", PLANES), tmp_path)[1] == []
    order = sorted(range(10), key=lambda number: PLANES[number])
    (note,) = accuracies(varied, write("sorted", [PLANES[number] for number in order], order), tmp_path)[1]
    assert "taken in the order of sorted's: bird, car, cat, deer, dog, frog, horse, plane, ship, truck" in note


def test_the_training_mode_of_every_module_is_restored(network, data_root):
    mine = copy.deepcopy(network).train()
    mine.layer1.eval()
    mine.fc.train()
    before = [module.training for module in mine.modules()]
    assert len(set(before)) == 2
    fastresnet.evaluate(mine, data="shapes10", root=data_root, device="cpu")
    assert [module.training for module in mine.modules()] == before
    mine.fc = nn.Linear(64, 5)
    with pytest.raises(UsageError):
        fastresnet.evaluate(mine, data="shapes10", root=data_root, device="cpu")
    assert mine.training
    assert not mine.layer1.training


def test_logits_that_are_not_finite_have_no_accuracy(network, data_root):
    mine = copy.deepcopy(network)
    nn.init.constant_(mine.fc.bias, 1e38)
    nn.init.constant_(mine.fc.weight, 1e38)
    with pytest.raises(RunError, match="not finite in fp32"):
        fastresnet.evaluate(mine, data="shapes10", root=data_root, device="cpu")
