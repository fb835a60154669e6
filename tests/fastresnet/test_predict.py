"""Predictions for image files, against PyTorch's own operators on pixels that Pillow reads."""

import csv
import dataclasses
import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastresnet import load_pretrained
from fastresnet.commands import predict
from fastresnet.models import create_model
from fastresnet.pretrained import pretrained_card, pretrained_file
from fastresnet.weights import Normalized, load_weights
from pipelines.cifar import CIFAR10_CLASSES


@pytest.fixture
def images(tmp_path, dataset):
    """A folder of four images of the right size and one of another, and another file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for row in range(4):
        Image.fromarray(np.asarray(dataset.test.images[row])).save(folder / "more" / f"{row}.png")
    Image.fromarray(np.asarray(dataset.test.images[5])).resize((60, 40)).save(folder / "a.JPG")
    (folder / "notes.txt").write_text("no image")
    return folder


def expected(files):
    card, network = pretrained_card("resnet20"), load_pretrained("resnet20")
    pixels = np.stack([np.asarray(Image.open(file), np.float64) / 255 for file in files])
    batch = torch.from_numpy((pixels - card.mean) / card.std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        return network(batch).softmax(1)


def test_top_classes_and_probabilities_match_the_network(run, images, tmp_path):
    files = sorted((images / "more").iterdir())
    code, out, err = run("predict", *files, "--csv", tmp_path / "p.csv", "--top", 4)
    assert code == 0
    assert err == ""
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(file) for file in files]
    probabilities, classes = expected(files).topk(4)
    for row, values, names in zip(rows, probabilities.tolist(), classes.tolist(), strict=True):
        assert [row[f"class_{rank}"] for rank in range(1, 5)] == [CIFAR10_CLASSES[c] for c in names]
        assert [float(row[f"probability_{rank}"]) for rank in range(1, 5)] == pytest.approx(values, abs=1e-4)
        assert f"{row['class_1']} {100 * float(row['probability_1']):.1f} %" in out


def predicted_files(path):
    """List the first column of a CSV."""
    with open(path, newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


def test_folder_is_searched_for_images_with_notes(run, images, tmp_path):
    (images / "._a.JPG").write_text("debris")
    (images / ".ipynb_checkpoints").mkdir()
    (images / ".ipynb_checkpoints" / "0.png").write_text("debris")
    code, _, err = run("predict", images, "--csv", tmp_path / "p.csv")
    assert code == 0
    assert err.splitlines() == [
        f"fastresnet: note: left out files that are not images: 1 .txt ({images}/notes.txt).",
        "fastresnet: note: 1 of 5 images were not 32x32 and have been cropped to a square and resized.",
    ]
    assert predicted_files(tmp_path / "p.csv") == [
        str(images / "a.JPG"),
        *(str(images / "more" / f"{row}.png") for row in range(4)),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "predict needs IMAGE ..."),
        (["nowhere.png"], 3, "nowhere.png does not exist"),
        (["{images}/notes.txt"], 3, "notes.txt is text that begins 'no image'"),
        (["{images}/.."], 3, "notes.txt"),
        (["{images}", "--weights", "pretrained:resnet21"], 2, "did you mean 'resnet20'"),
        (["{images}", "--weights", "nothing.pt"], 3, "nothing.pt is not a readable file"),
        (["{images}", "--top", "0"], 2, "--top 0"),
        (["{images}", "--csv", "no/folder.csv"], 2, "there is no folder no"),
        (["{images}", "--json", "no/folder.json"], 2, "there is no folder no"),
        (["{images}", "--saliency", "picture"], 2, "ends in .png or .svg"),
        (["{images}", "--device", "tpu"], 2, "unknown device"),
    ],
)
def test_invalid_arguments_are_errors(run, images, arguments, code, message):
    if message == "notes.txt":
        (images / "notes.png").write_text("no image")
    got, _, err = run("predict", *(argument.format(images=images) for argument in arguments))
    assert got == code
    assert message in err.replace("notes.png", "notes.txt")
    assert len(err.splitlines()) <= 2


def test_folder_without_images_is_refused(run, tmp_path):
    code, _, err = run("predict", tmp_path)
    assert code == 3
    assert f"{tmp_path} contains no images" in err


def test_unreadable_images_are_named_or_skipped(run, images, tmp_path):
    for name in ("b.png", "c.png", "more/0.png"):
        (images / name).write_text("no image")
    code, _, err = run("predict", images, "--csv", tmp_path / "p.csv")
    assert code == 3
    assert f"{images}/b.png is text" in err
    assert "Others that cannot be read: 2. prepare and predict --skip-unreadable leave such images out." in err
    code, _, err = run("predict", images, "--skip-unreadable", "--csv", tmp_path / "p.csv")
    assert code == 0
    names = ", ".join(f"{images}/{name}" for name in ("b.png", "c.png", "more/0.png"))
    assert f"3 of 7 images cannot be read and were skipped: {names}." in err
    files = [images / "a.JPG", *(images / "more" / f"{row}.png" for row in (1, 2, 3))]
    assert predicted_files(tmp_path / "p.csv") == [str(file) for file in files]
    code, _, err = run("predict", images / "b.png", images / "c.png", "--skip-unreadable")
    assert code == 3
    assert "none of the images can be read" in err


@pytest.mark.parametrize("given", ["run", "resnet20"])
def test_a_folder_or_a_bare_name_for_weights_gets_the_right_ones(run, images, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    code, _, err = run("predict", images, "--weights", given)
    assert code == 3
    assert {"run": "run is a folder without model.safetensors", "resnet20": "Did you mean pretrained:resnet20?"}[
        given
    ] in err


def test_a_picture_in_another_format_is_not_passed_over(run, images):
    (images / "z.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    code, _, err = run("predict", images)
    assert code == 3
    assert "z.HEIC is a picture in HEIF or AVIF format: save it as PNG or JPEG" in err


def test_the_figure_of_more_than_16_images_says_so(run, images, tmp_path, dataset):
    for row in range(14):
        Image.fromarray(np.asarray(dataset.test.images[row])).save(images / f"b{row}.png")
    code, _, err = run("predict", images, "--saliency", tmp_path / "s.png")
    assert code == 0
    assert "shows the first 16 of 19 images" in err


@pytest.mark.parametrize("classes", [10, 100])
def test_foreign_weights_are_normalised_with_a_note(run, images, tmp_path, classes):
    torch.save(create_model("resnet20", num_classes=classes).state_dict(), tmp_path / "w.pt")
    code, _, err = run("predict", images, "--weights", tmp_path / "w.pt")
    assert code == 0
    assert f"w.pt does not say its normalisation: CIFAR-{classes}'s mean and std are taken" in err
    assert "normalisation" not in run("predict", images)[2]


def test_a_pipe_is_written_and_not_replaced(run, images, tmp_path):
    pipe = tmp_path / "p.csv"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(pipe.read_text)
        assert run("predict", images, "--csv", pipe)[0] == 0
    assert pipe.is_fifo()
    assert text.result().startswith("image,class_1")


def test_weights_that_overflow_are_refused(run, images, tmp_path):
    network = create_model("resnet20")
    with torch.no_grad():
        network.fc.weight.fill_(3e38)  # finite, but sums of it are not
    torch.save(network.state_dict(), tmp_path / "w.pt")
    code, _, err = run("predict", images, "--weights", tmp_path / "w.pt")
    assert code == 1
    assert f"the logits of {tmp_path / 'w.pt'} are not finite" in err


def test_photos_are_turned_upright(run, tmp_path, dataset):
    upright = np.asarray(dataset.test.images[0])
    sideways = Image.fromarray(np.rot90(upright))  # counterclockwise: its 0th row is the right edge
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.fromarray(upright).save(tmp_path / "upright.png")
    sideways.save(tmp_path / "turned.png", exif=orientation)
    assert run("predict", tmp_path, "--csv", tmp_path / "p.csv")[0] == 0
    with open(tmp_path / "p.csv", newline="") as file:
        turned, plain = ([*row.values()][1:] for row in csv.DictReader(file))
    assert turned == plain


@pytest.mark.parametrize("normalization", ["half", "channel", "pixel"])
def test_weights_carry_the_normalisation_of_their_training(run, tmp_path, dataset, normalization):
    arguments = ["--data", "shapes10", "--batch-size", 32, "--iterations", 1, "--normalization", normalization]
    assert run("train", "smoke", *arguments, "--out", tmp_path / "run")[0] == 0
    weights = load_weights(tmp_path / "run" / "model.safetensors")
    mean, std = {
        "half": (np.full(3, 0.5), np.full(3, 0.5)),
        "channel": (np.array(dataset.mean), np.array(dataset.std)),
        "pixel": (dataset.pixel_mean, np.ones(3)),
    }[normalization]
    assert weights.mean.permute(1, 2, 0).numpy() == pytest.approx(mean.reshape(weights.mean.permute(1, 2, 0).shape))
    assert weights.std.flatten().numpy() == pytest.approx(std)
    assert weights.classes == dataset.classes
    file = tmp_path / "x.png"
    Image.fromarray(np.asarray(dataset.test.images[0])).save(file)
    assert run("predict", file, "--weights", tmp_path / "run" / "model.safetensors")[0] == 0


def test_attributions_of_a_linear_network_are_weight_times_difference():
    torch.manual_seed(0)
    weights = load_weights(pretrained_file("resnet20"))
    linear = nn.Linear(3 * 32 * 32, 10)
    network = Normalized(dataclasses.replace(weights, model=nn.Sequential(nn.Flatten(), linear)))
    images = torch.rand(5, 3, 32, 32)
    chosen = linear.weight[network(images).argmax(1)].view(5, 3, 32, 32)
    expected = chosen * (images - weights.mean) / weights.std
    torch.testing.assert_close(predict.integrated_gradients(network, images, network.mean), expected)


def test_attributions_sum_to_the_difference_of_the_logits(dataset):
    """Completeness, proposition 1 of the paper. Its authors take a sum for exact within 5 %, section 5."""
    network = Normalized(load_weights(pretrained_file("resnet20"))).eval()
    images = torch.from_numpy(np.array(dataset.test.images[:3])).permute(0, 3, 1, 2).float() / 255
    attributions = predict.integrated_gradients(network, images, network.mean, steps=400)
    with torch.no_grad():
        logits, base = network(images), network(network.mean.expand(1, 3, 32, 32))
    likely, classes = logits.max(1)
    differences = likely - base[0, classes]
    sums = attributions.sum((1, 2, 3))
    assert differences.abs().min() > 0.1
    torch.testing.assert_close(sums, differences, rtol=0.05, atol=0)


def test_the_picture_shows_each_image_and_explains_its_colours(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    code, *_ = run("predict", images, "--saliency", tmp_path / "saliency.svg")
    assert code == 0
    tree = ElementTree.parse(tmp_path / "saliency.svg")
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a.JPG", "0.png", "3.png", "against the class", "no effect", "for the class"} <= set(texts)
    assert any("Sundararajan et al. 2017" in text for text in texts)
    drawn = list(tree.iter("{http://www.w3.org/2000/svg}image"))
    assert len(drawn) == 2 * 5 + 1  # each image alone and with the colours over it, and the bar


def test_a_run_folder_stands_for_its_weights(run, images, tmp_path, monkeypatch):
    """Those of its end or, until it has finished, of its best epoch."""
    monkeypatch.setenv("FASTRESNET_DATA", "nowhere")
    shutil.copy(pretrained_file("resnet20"), tmp_path / "best.ckpt")
    code, out, err = run("predict", images / "a.JPG", "--weights", tmp_path, "--json")
    assert code == 0
    assert f"{tmp_path} is not finished: taking {tmp_path / 'best.ckpt'}" in err
    (tmp_path / "best.ckpt").rename(tmp_path / "model.safetensors")
    code, finished, err = run("predict", images / "a.JPG", "--weights", tmp_path, "--json")
    assert (code, "finished" in err) == (0, False)
    assert json.loads(finished)["images"] == json.loads(out)["images"]


def test_json_goes_to_standard_output_instead_of_the_table(run, images, tmp_path):
    code, out, _ = run("predict", images / "a.JPG", "--json")
    assert code == 0
    (image,) = json.loads(out)["images"]
    assert image["image"] == str(images / "a.JPG")
    code, table, _ = run("predict", images / "a.JPG", "--json", tmp_path / "p.json")
    assert "┃ image" in table
    assert json.loads((tmp_path / "p.json").read_text())["images"] == [image]


def test_json_replaces_no_file_of_weights(run, tmp_path):
    (tmp_path / "best.ckpt").touch()
    code, _, err = run("eval", "pretrained:resnet20", "--json", tmp_path / "best.ckpt")
    assert code == 2
    assert "give a name that ends in .json" in err
    assert (tmp_path / "best.ckpt").stat().st_size == 0
