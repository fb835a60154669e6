"""Training and evaluation from Python give what the commands give."""

import dataclasses
import errno
import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastresnet
import pipelines
from fastresnet import cli
from fastresnet.api import _in_words_of_python
from fastresnet.checkpoint import load_tensors
from fastresnet.run_folder import RunFolder
from fastresnet.weights import load_weights
from pipelines.errors import DataError, Note, UsageError

ROOT = Path(__file__).parents[2]
SMALL = {"data": "shapes10", "batch_size": 8, "precision": "fp32", "iterations": 3}


pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def data_root(tiny_root):
    """Five steps an epoch."""
    return tiny_root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root, small_runs):
    return fastresnet.train("smoke", root=data_root, out=tmp_path_factory.mktemp("api") / "run", quiet=True, **SMALL)


def test_train_function_gives_the_same_run_as_the_command(run, trained, tmp_path, capsys):
    arguments = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert run("train", "smoke", *arguments, "--out", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (trained.folder / "metrics.csv").read_bytes()
    assert trained.summary["steps"] == 3
    assert trained.rows[0]["train_loss"] > 0


def test_quiet_training_prints_nothing(data_root, tmp_path, capfd):
    fastresnet.train("smoke", root=data_root, out=tmp_path / "run", quiet=True, **{**SMALL, "iterations": 1})
    assert capfd.readouterr() == ("", "")


def test_training_outlives_standard_output(data_root, tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("sys.stdout", Closed())
    run = fastresnet.train("smoke", root=data_root, out=tmp_path / "run", **SMALL)
    assert run.summary["steps"] == 3
    note = "fastresnet: note: standard output is lost (Broken pipe); the run goes on.\n"
    assert capsys.readouterr().err == note


class Broken:
    """Stream without a file."""

    def write(self, _):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("stream", "note"),
    [
        (Broken, "fastresnet: note: standard output is lost (Input/output error); the run goes on.\n"),
        (closed, ""),
        (lambda: None, ""),
    ],
    ids=["broken, without a file", "closed", "none, as in pythonw"],
)
def test_training_needs_no_standard_output(data_root, tmp_path, monkeypatch, capsys, stream, note):
    monkeypatch.setattr("sys.stdout", before := stream())
    run = fastresnet.train("smoke", root=data_root, out=tmp_path / "run", **{**SMALL, "iterations": 1})
    assert run.summary["steps"] == 1
    assert sys.stdout is before
    assert capsys.readouterr().err == note


def test_names_that_standard_output_cannot_encode_do_not_end_a_training(data_root, tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    run = fastresnet.train("smoke", root=data_root, out=tmp_path / "é猫", **{**SMALL, "iterations": 1})
    assert run.summary["steps"] == 1
    assert rb"run folder " + str(tmp_path).encode() + b"/\xe9\\u732b\n" in written.getvalue()


def test_home_folder_is_expanded_in_settings(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTRESNET_RUNS", "~/runs")
    small = {**SMALL, "iterations": 1, "root": data_root, "quiet": True}
    assert fastresnet.train("smoke", out="~/run", **small).folder == tmp_path / "run"
    assert fastresnet.train("smoke", **small).folder.parent == tmp_path / "runs"


def test_settings_accept_command_line_and_python_types(data_root, tmp_path):
    settings = {**SMALL, "iterations": 1, "lr": 1, "milestones": (0.25, 0.5), "lr_batch_size": None}
    settings |= {"seed": np.int64(2), "momentum": np.float32(0.5), "nesterov": np.bool_(True)}
    run = fastresnet.train("smoke", root=str(data_root), out=str(tmp_path / "run"), quiet=True, **settings)
    assert run.folder == tmp_path / "run"
    assert (run.summary["settings"]["lr"], run.summary["settings"]["milestones"]) == (1.0, [0.25, 0.5])
    assert [run.summary["settings"][name] for name in ("seed", "momentum", "nesterov")] == [2, 0.5, True]


def test_evaluate_gives_the_result_of_the_command_for_file_and_network(run, trained, data_root):
    file = trained.folder / "model.safetensors"
    of_file = fastresnet.evaluate(file, data="shapes10", root=data_root, tta="shift")
    network = load_weights(file).model
    of_network = fastresnet.evaluate(network, data="shapes10", root=data_root, normalization="half", tta="shift")
    changing = {"images_per_s": 0.0}
    assert dataclasses.replace(of_file, **changing) == dataclasses.replace(of_network, **changing)
    _, out, _ = run("eval", "--weights", file, "--tta", "shift", "--precision", "fp32")
    for value in (of_file.accuracy, of_file.mirror_accuracy, of_file.shift_accuracy):
        assert f"{value:.2f} %" in out
    assert of_file.accuracy == pytest.approx(trained.summary["test_accuracy"])
    assert fastresnet.evaluate(file, root=data_root).loss == of_file.loss  # on the data set that the file names
    assert fastresnet.evaluate(file, root=data_root, threads=np.int64(1)).accuracy == of_file.accuracy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": 0}, "^epochs 0 is not in"),
        ({"model": torch.nn.Identity()}, "Identity has no parameters to train"),
        ({"model": torch.nn.Conv2d(3, 10, 3)}, r"the network maps 2 images to \[2, 10, 30, 30\]; expected are logits"),
        ({"model": torch.nn.Conv2d(3, 10, 3), "init_from": "w.pt"}, "^init_from is for networks of this program"),
        ({"model": "own-Net"}, "own-Net is a network of a Python program"),
        ({"callbacks": [print]}, "which is no instance of fastresnet.Callback"),
        ({"data": "shapes11"}, "did you mean 'shapes10'"),
        ({"freeze_backbone": True}, "the other weights with init_from"),
        ({"epochs": "3"}, "epochs = '3': expected int"),
        ({"milestones": 0.5}, "milestones = 0.5: expected a list"),
        ({"model": "resnet21"}, "did you mean 'resnet20'"),
    ],
)
def test_invalid_settings_are_usage_errors(data_root, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        fastresnet.train("smoke", root=data_root, out=tmp_path / "run", **{**SMALL, **settings})
    assert isinstance(caught.value, fastresnet.UsageError | fastresnet.DataError)
    assert "--" not in str(caught.value).partition("fastresnet prepare")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tta": "Shift"}, "did you mean 'shift'"),
        ({"tta": True}, "unknown tta"),
        ({"precision": "fp23"}, "did you mean 'fp32'"),
    ],
)
def test_invalid_options_of_an_evaluation_are_usage_errors(trained, data_root, settings, message):
    with pytest.raises(UsageError, match=message):
        fastresnet.evaluate(trained.folder / "model.safetensors", root=data_root, **settings)


def test_unknown_recipe_existing_run_and_missing_file_are_refused(trained, data_root):
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        fastresnet.train("smokey")
    with pytest.raises(
        UsageError, match=r"already holds a run. Continue it with resume=True, or give another .* with out"
    ):
        fastresnet.train("smoke", root=data_root, out=trained.folder, quiet=True, **SMALL)
    with pytest.raises(DataError, match="not a readable file"):
        fastresnet.evaluate("nothing.pt", data="shapes10", root=data_root)


def test_packages_are_marked_as_typed():
    for package in ("fastresnet", "pipelines"):
        assert (ROOT / package / "py.typed").exists()


# --- what a program brings along ---------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def test_an_own_network_is_trained_in_place_and_resumed(data_root, tmp_path):
    settings = {**SMALL, "root": data_root, "quiet": True, "milestones": (), "seed": 3}

    def create():
        torch.manual_seed(1)
        return Net()

    network = create()
    run = fastresnet.train("smoke", model=network, out=tmp_path / "a", **settings)
    assert run.summary["model"] == "own-Net"
    assert not torch.equal(network.head.weight, create().head.weight)
    saved = load_file(run.folder / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in network.state_dict().items())
    forward = 8 * 27 * 8 * 8 + 80
    assert (
        run.summary["flops"] == 2 * (2 * forward + 80) * 8 * 3
    )  # gradients: all weights, and the linear layer's input
    accuracy = fastresnet.evaluate(network, data="shapes10", root=data_root, normalization="half").accuracy
    assert accuracy == run.summary["test_accuracy"]

    whole = create()
    settings["iterations"] = 10
    fastresnet.train("smoke", model=whole, out=tmp_path / "b", epochs=2, **settings)
    parts = create()
    fastresnet.train("smoke", model=parts, out=tmp_path / "c", **{**settings, "iterations": 5})
    parts = create()
    fastresnet.train("smoke", model=parts, out=tmp_path / "c", resume=True, epochs=2, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    with pytest.raises(fastresnet.DataError, match=r"has the weights of own-Net, a network of a Python program"):
        fastresnet.evaluate(run.folder / "model.safetensors", data="shapes10", root=data_root)


class Odd(Net):
    """Network with what is rare: a weight that two layers share, a scalar, an unused convolution, and values read."""

    def __init__(self):
        super().__init__()
        self.body[1] = torch.nn.Identity()
        self.again = torch.nn.Linear(8, 10)
        self.again.weight = self.head.weight
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.unused = torch.nn.Conv2d(3, 3, 1)

    def forward(self, images):
        features = self.body(images).mean((2, 3)) * self.scale
        return self.head(features) if features.mean().item() < 0 else self.again(features)


def test_networks_with_rare_parts_train_to_the_end(data_root, tmp_path):
    settings = {**SMALL, "root": data_root, "quiet": True, "ema_decay": 0.5}
    for recipe in ("smoke", "fast"):
        network = Odd()
        with pytest.warns(Note, match="the FLOPs of own-Odd are not counted"):
            run = fastresnet.train(recipe, model=network, out=tmp_path / recipe, **settings)
        assert network.scale.item() != 1
        assert run.summary["flops"] is None
        accuracy = run.summary["test_accuracy"]
        normalization = "half" if recipe == "smoke" else "channel"
        found = fastresnet.evaluate(network, data="shapes10", root=data_root, normalization=normalization)
        assert found.accuracy == accuracy  # with the averaged weights, which were evaluated
        other = Odd()
        fastresnet.train(recipe, model=other, out=tmp_path / recipe, resume=True, **settings)
        assert torch.equal(other.scale, network.scale)  # of the finished run
        assert cli.main(["plot", str(tmp_path / recipe), "--out", str(tmp_path / "curves.png")]) == 0
    with pytest.raises(fastresnet.DataError, match="has the weights of another network"):
        fastresnet.train("smoke", model=type("Odd", (Net,), {})(), out=tmp_path / "smoke", resume=True, **settings)


class OnlyWhole(Net):
    def forward(self, images):
        return super().forward(images.view(-1, 3, 32, 32))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Net().double(), r"Net has parameters of torch.float64. Convert them: .float\(\)."),
        (Net().to("meta"), "Net has tensors without values, on device meta: body.0.weight"),
        (OnlyWhole(), r"OnlyWhole fails for images \[2, 3, 28, 28\] \(for whole images alone: resolutions=\(32,\)\)"),
        (Net(5), r"expected are logits \[2, 10\]"),
        (Net, "model = <class .*Net.>: expected str"),
        (3, "model = 3: expected str"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused_at_the_start(data_root, tmp_path, network, message):
    with pytest.raises(ValueError, match=message):
        fastresnet.train("fast", model=network, root=data_root, out=tmp_path / "run", quiet=True, **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_complex_buffer_is_refused(data_root, tmp_path):
    network = Net()
    network.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(fastresnet.UsageError, match="a state that checkpoints cannot keep: phase"):
        fastresnet.train("smoke", model=network, root=data_root, out=tmp_path / "run", quiet=True, **SMALL)


class Recorder(fastresnet.Callback):
    def __init__(self, epochs=99):
        self.rows, self.saved, self.epochs = [], [], epochs

    def epoch_end(self, row):
        self.rows.append(row)
        if len(self.rows) == self.epochs:
            raise fastresnet.StopTraining

    def checkpoint(self, path):
        self.saved.append((path, load_tensors(path)[1]["progress"]["step"]))


def test_callbacks_see_epochs_and_checkpoints_and_can_stop(data_root, tmp_path):
    settings = {**SMALL, "iterations": None, "epochs": 4, "root": data_root, "quiet": True, "checkpoint_steps": 4}
    stopper, other = Recorder(epochs=2), Recorder()
    run = fastresnet.train("smoke", callbacks=[stopper, other], out=tmp_path / "run", **settings)
    assert stopper.rows == other.rows == run.rows
    assert [row["epoch"] for row in run.rows] == [1, 2]
    assert run.summary["epochs"] == 2
    assert run.summary["test_accuracy"] == run.rows[-1]["test_accuracy"]
    assert {path for path, _ in other.saved} == {tmp_path / "run" / "last.ckpt"}
    steps = [step for _, step in other.saved]
    assert steps == sorted(steps)
    assert {4, 8, 10} <= set(steps)


@pytest.mark.parametrize(
    ("signum", "stop", "message"),
    [
        (signal.SIGINT, KeyboardInterrupt, "Repeat the command with resume=True to continue"),
        (signal.SIGTERM, SystemExit, "143"),
    ],
)
def test_a_stop_holds_after_an_interruption(data_root, tmp_path, monkeypatch, signum, stop, message):
    """The final evaluation is interrupted. The run ends there once it is resumed, but may be extended."""
    settings = {**SMALL, "iterations": None, "epochs": 2, "milestones": (), "root": data_root, "quiet": True}
    settings |= {"out": tmp_path / "run"}
    original = RunFolder.save_weights

    def interrupted(self, *arguments):
        original(self, *arguments)
        signal.raise_signal(signum)

    handler = signal.signal(signum, signal.default_int_handler)  # Ctrl-C is ignored in the background of a shell
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_weights", interrupted)
            with pytest.raises(stop, match=message):
                fastresnet.train("smoke", callbacks=[Recorder(epochs=1)], **settings)
    finally:
        signal.signal(signum, handler)
    run = fastresnet.train("smoke", resume=True, **settings)
    assert run.summary["epochs"] == 1
    assert fastresnet.train("smoke", resume=True, **{**settings, "epochs": 3}).summary["epochs"] == 3


def test_an_error_of_a_callback_ends_the_run_as_it_is(data_root, tmp_path):
    class Failing(fastresnet.Callback):
        def epoch_end(self, row):
            raise KeyError("mine")

    settings = {**SMALL, "root": data_root, "quiet": True}
    with pytest.raises(KeyError, match="mine"):
        fastresnet.train("smoke", callbacks=[Failing()], out=tmp_path / "run", **settings)
    assert fastresnet.train("smoke", out=tmp_path / "run", resume=True, **settings).summary["steps"] == 3


def test_a_config_is_a_typed_recipe(data_root, tmp_path, trained):
    config = dataclasses.replace(
        fastresnet.create_config("smoke"),
        data="shapes10",
        batch_size=8,
        precision="fp32",
        iterations=3,
        root=data_root,
    )
    run = fastresnet.train(config, out=tmp_path / "run", quiet=True)
    assert run.rows == trained.rows
    assert (
        fastresnet.train(dataclasses.replace(config, out=tmp_path / "b"), quiet=True, iterations=1).summary["steps"]
        == 1
    )


def arrays(dataset):
    return [array for split in (dataset.train, dataset.test) for array in (split.images, split.labels)]


def test_arrays_train_as_the_store_that_has_them(data_root, tmp_path, trained):
    dataset = fastresnet.load_dataset("shapes10", root=data_root)
    images, labels, *test = arrays(dataset)
    own = fastresnet.create_dataset(
        "own", torch.tensor(images), labels.astype(np.uint8), *test, classes=dataset.classes
    )
    assert (own.mean, own.std) == (dataset.mean, dataset.std)
    np.testing.assert_array_equal(own.pixel_mean, dataset.pixel_mean)
    settings = {**SMALL, "data": own, "quiet": True}
    run = fastresnet.train("smoke", out=tmp_path / "run", **settings)
    assert run.rows == trained.rows
    assert run.summary["data"] == "own"
    assert fastresnet.evaluate(run.folder / "model.safetensors", data=own).accuracy == run.summary["test_accuracy"]
    assert fastresnet.train("smoke", out=tmp_path / "run", resume=True, **settings).rows == run.rows
    other = fastresnet.create_dataset("own", images, labels[::-1], *test, classes=dataset.classes)
    with pytest.raises(fastresnet.DataError, match="was trained on another data set"):
        fastresnet.train("smoke", out=tmp_path / "run", resume=True, **{**settings, "data": other})


IMAGES = np.zeros((4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": IMAGES / 255}, r"train_images is float64 \[4, 32, 32, 3\]: give uint8"),
        ({"test_images": IMAGES.transpose(0, 3, 1, 2)}, r"test_images is uint8 \[4, 3, 32, 32\]"),
        ({"train_images": IMAGES[:0], "train_labels": []}, "at least one image"),
        ({"train_labels": [0, 1, 0]}, "give an integer in 0..32767 for each of the 4 images"),
        ({"train_labels": np.array([0, 2**64 - 1, 0, 1], np.uint64)}, "0..18446744073709551615: give an integer"),
        ({"train_images": [torch.zeros(2), "x"]}, "are no arrays"),
        ({"classes": "ab"}, "classes is 'ab': give a list"),
        ({"classes": 2}, "classes is 2: give a list"),
        ({"train_labels": [0.0, 1.0, 0.0, 1.0]}, "train_labels is float64"),
        ({"test_labels": [0, -1, 0, 1]}, r"\[4\], -1..1: give an integer"),
        ({"classes": ["a"]}, "1 classes for labels up to 1"),
        ({"classes": ["a", "a"]}, "no two the same"),
        ({"name": "a/b"}, "'a/b' is not a name for a data set"),
    ],
)
def test_arrays_of_other_shapes_and_values_are_refused(change, message):
    good = {"name": "x", "train_images": IMAGES, "train_labels": [0, 1, 0, 1]}
    good |= {"test_images": IMAGES, "test_labels": [1, 1, 0, 0]}
    assert fastresnet.create_dataset(**good).classes == ("0", "1")
    with pytest.raises(ValueError, match=message):
        fastresnet.create_dataset(**{**good, **change})


def test_the_public_loader_gives_the_batches_of_the_pipelines(data_root):
    dataset = fastresnet.load_dataset("shapes10", root=data_root)
    augmentation = fastresnet.Augmentation(flip="alternating", normalization="channel")
    on, options = torch.device("cpu"), {"batch_size": 8, "seed": 5, "augmentation": augmentation}
    expected = pipelines.open_pipeline("torchvision", dataset, train=True, device=on, dtype=torch.float32, **options)
    with expected, fastresnet.open_pipeline(dataset, **options) as loader:
        assert len(loader) == len(dataset.train) // 8
        for ours, theirs in zip(loader.epoch(3), expected.epoch(3), strict=True):
            torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=1e-6)
            assert torch.equal(ours.labels, theirs.labels)
    with fastresnet.open_pipeline(dataset, batch_size=8, train=False, dtype=torch.uint8) as loader:
        seen = torch.cat([batch.images[: batch.valid] for batch in loader.epoch(0)])
        np.testing.assert_array_equal(seen.permute(0, 2, 3, 1).numpy(), dataset.test.images)
    for wrong in ({"dtype": torch.int32}, {"dtype": "float32x"}, {"batch_size": 2.5}, {"batch_size": 0}):
        with pytest.raises(fastresnet.UsageError, match=r"dtype|batch size"):
            fastresnet.open_pipeline(dataset, **{"batch_size": 32, **wrong})
    with pytest.raises(ValueError, match=r"open it by fastresnet.load_dataset"):
        fastresnet.open_pipeline("cifar10", batch_size=32)
    with pytest.raises(ValueError, match="did you mean 'resident'"):
        fastresnet.open_pipeline(dataset, batch_size=32, pipeline="residnt")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--batch-size 0 is not in 1..9.", "batch_size 0 is not in 1..9."),
        (
            "Continue it with --resume, or give another folder with --out.",
            "Continue it with resume=True, or give another folder with out.",
        ),
        ("Leave out --no-nesterov.", "Leave out nesterov=False."),
        ("It failed: fastresnet train --config a --resume", "It failed: fastresnet train --config a --resume"),
        ("a--batch-size, --unknown", "a--batch-size, --unknown"),
        ("other rates (--schedule linear)", "other rates (schedule linear)"),
    ],
)
def test_messages_name_settings_as_in_python(message, expected):
    assert _in_words_of_python(message) == expected
