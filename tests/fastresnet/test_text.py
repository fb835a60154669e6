"""Names of classes, files, runs and data sets that an outlet could take for something else, at every outlet."""

import csv
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from PIL import Image

from benchmarks import report as benchmark_report
from fastresnet import cli, text
from fastresnet.commands.train import print_table
from fastresnet.console import PlainConsole
from fastresnet.evaluation import Predictions
from fastresnet.plotting import confusion, curves, rendered
from fastresnet.run_folder import Run
from fastresnet.text import for_csv, for_figure, for_terminal
from fastresnet.training.loggers import TerminalLogger
from pipelines.errors import DataError
from pipelines.store import RawData, write_store

NAMES = {
    "[x]": "[x]",
    "[bold red]": "[bold red]",
    "[b": "[b",
    ":smile:": ":smile:",
    "$x^2$": "$x^2$",
    r"$\foo{$": r"$\foo{$",
    r"\foo": r"\foo",
    r"5 %_#~&^{}\$": r"5 %_#~&^{}\$",
    "caf\udce9": r"caf\udce9",
    "a\x1b[31mred": r"a\x1b[31mred",
    "a\rb\x07": r"a\rb\x07",
    "\x9b31m": r"\x9b31m",
    "abc\u202egnp.exe": r"abc\u202egnp.exe",
    "\u200fab": r"\u200fab",
    "a\tb": r"a\tb",
    "a\nb": r"a\nb",
    "x" * 200: "x" * 200,
    "ñandú": "ñandú",
    "猫と犬": "猫と犬",
    "_under": "_under",
    "=1+2": "=1+2",
    "+1": "+1",
    "-1": "-1",
    "@x": "@x",
    "<script>": "<script>",
}
"""Names, and how each reads in one line of a terminal."""

CLASSES = (*NAMES, "[/b]", "</svg><script>")
"""Names of classes, which need not be names of files."""


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """Remove the width that pytest-xdist gives its workers."""
    monkeypatch.delenv("COLUMNS", raising=False)


def visible(name):
    return NAMES.get(name, name)


@pytest.fixture
def no_other_fonts(monkeypatch):
    monkeypatch.setattr(text, "_characters_of_other_fonts", dict)


def in_figure(name, width=32):
    """Return how `name` reads in a figure, where only matplotlib's own font is installed."""
    name, half = visible(name).replace("猫と犬", r"\u732b\u3068\u72ac"), (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set with these names of classes, two images of each for training and testing."""
    folder = tmp_path_factory.mktemp("named")
    labels = np.repeat(np.arange(len(CLASSES)), 2)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    write_store(folder / "[x] $y$", RawData(CLASSES, images, labels, images, labels), source="", version="0")
    return folder


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of one step on it, in a folder whose name is not UTF-8."""
    folder = tmp_path_factory.mktemp("runs") / "[x]caf\udce9\x1b[31m"
    arguments = ["train", "smoke", "--data", "[x] $y$", "--root", str(root), "--iterations", "1", "--batch-size", "16"]
    assert cli.main([*arguments, "--precision", "fp32", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image file with each name."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        with open(folder / f"{name}.png", "wb") as file:
            Image.fromarray(np.full((32, 32, 3), 9 * number, np.uint8)).save(file, "PNG")
    return folder


def assert_printable(output):
    assert output.replace("\n", "").isprintable()


# --- terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if "\n" not in name])
def test_text_for_a_terminal_is_escaped_as_in_repr(name):
    assert for_terminal(name) == NAMES[name]
    assert for_terminal(name) == repr(name)[1:-1].replace("\\\\", "\\")


def test_tables_and_lines_show_every_name(capsys):
    print_table("[x]\x1b[31m", [(name, name) for name in CLASSES], header=("[b]\x9b", "$"))
    for name in CLASSES:
        PlainConsole().print(f"line {name}", soft_wrap=True)
    out = capsys.readouterr().out
    assert_printable(out)
    cells = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in pair] for pair in cells] == [[visible(name)] * 2 for name in CLASSES]
    assert all(f"line {for_terminal(name)}\n" in out for name in CLASSES)
    assert out.startswith(r"[x]\x1b[31m ")


@pytest.mark.parametrize("columns", [40, 80])
def test_terminal_folds_cells_and_cuts_nothing(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    paths = [f"images/{'holiday' * 12}/{number:03}.png" for number in range(3)]
    print_table(
        "", [(path, *[f"traffic light {path[-7:-4]} %"] * 3) for path in paths], header=("image", "1.", "2.", "3.")
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    cells = [line.split("│")[1:5] for line in lines if line.startswith("│")]
    whole = ["".join(cell.strip() for cell in column) for column in zip(*cells, strict=True)]
    assert whole[0] == "".join(paths)
    assert all(column.replace(" ", "") == "".join(f"trafficlight{n:03}%" for n in range(3)) for column in whole[1:])


def test_benchmark_tables_are_not_cut(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    table = benchmark_report.table("", "name", *"abcd")
    table.add_row("[x] " + "long" * 20, *["123,456 (123,400-123,500)"] * 4)
    benchmark_report.print_tables([table], [])
    out = capsys.readouterr().out
    assert "…" not in out
    assert sum(character.isdigit() for character in out) == 4 * 18
    assert "[x]" in out


def test_without_a_terminal_each_image_has_one_line(run, trained, images):
    code, out, err = run("predict", images, "--weights", trained / "model.safetensors")
    assert (code, err) == (0, "")
    assert_printable(out)
    shown = {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")}
    assert shown == {f"{images}/{visible(name)}.png" for name in NAMES}


def test_eval_shows_every_class(run, trained, root, tmp_path):
    arguments = ("--weights", trained / "model.safetensors", "--root", root, "--json", tmp_path / "eval.json")
    code, out, err = run("eval", *arguments)
    assert (code, err) == (0, "")
    assert_printable(out)
    shown = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert shown[3:-1] == [visible(name) for name in CLASSES]
    names = list(json.loads((tmp_path / "eval.json").read_bytes())["per_class"])
    assert names == [name.replace("\udce9", r"\udce9") for name in CLASSES]


@pytest.mark.parametrize("name", [name for name in NAMES if "\n" not in name])
def test_errors_name_the_file_in_printable_characters(run, tmp_path, name):
    for arguments in (
        ("predict", tmp_path / name),
        ("eval", "--weights", tmp_path / name),
        ("plot", tmp_path / name),
        ("predict", f"--{name}"),
        ("doctor", name if name[0] not in "-_@" else f"x{name}"),
    ):
        code, out, err = run(*arguments)
        assert code in (2, 3)
        assert_printable(out + err)
        assert visible(name)[:20] in err


def test_notes_are_printable(run, monkeypatch):
    from pipelines.errors import Note

    def command(_):
        warnings.warn("note \x1b[31m", Note, stacklevel=1)
        raise DataError("error [x]\x07\udcff")

    monkeypatch.setattr(cli, "_dispatch", command)
    _, _, err = run()
    assert err == "fastresnet: note: note \\x1b[31m\nfastresnet: error [x]\\x07\\udcff\n"


def test_doctor_shows_every_data_set(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fastresnet.doctor._compilers", lambda *_: ())
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    _, out, _ = run("doctor", "--root", tmp_path)
    assert_printable(out)
    assert all(f"data {visible(name).split(chr(92) + 'n')[0]}" in out for name in NAMES)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_stdout_of_any_encoding_is_no_error(trained, images, monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert cli.main(["predict", str(images), "--weights", str(trained / "model.safetensors")]) == 0
    sys.stdout.flush()
    out = written.getvalue().decode(encoding)
    assert ("猫と犬.png" if encoding == "utf-8" else r"\u732b\u3068\u72ac.png") in out
    assert (r"\xf1and\xfa.png" if encoding == "ascii" else "ñandú.png") in out


def test_notes_during_the_live_bar_stay_in_the_file_of_stderr(monkeypatch):
    """As in `fastresnet train 2>notes`, whose standard output is a terminal."""
    monkeypatch.setattr(sys, "stderr", notes := io.StringIO())
    bar = TerminalLogger(PlainConsole(file=io.StringIO(), force_terminal=True), 10)
    print("a note", file=sys.stderr)
    bar.close()
    assert notes.getvalue() == "a note\n"


def test_real_terminal_receives_only_the_programs_own_escapes(python, trained, images):
    ours, theirs = pty.openpty()
    command = [python, "-m", "fastresnet", "predict", str(images), "--weights", str(trained / "model.safetensors")]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "900"}):
        os.close(theirs)
        received = b""
        try:
            while part := os.read(ours, 65536):
                received += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert rb"\x1b[31mred" in received.replace(b"\r\n", b"")
    for raw in (b"\x1b[31mred", b"\x07", "\x9b".encode(), "\u202e".encode(), b"caf\xe9"):
        assert raw not in received


# --- figures -----------------------------------------------------------------------------------------------------


ROW = {"epoch": 1, "step": 1, "lr": 0.1, "train_loss": 1, "train_accuracy": 50, "test_loss": 1, "test_accuracy": 40}
ONE_EPOCH = Run(Path("run"), [ROW], None, None)


def images_of(counts):
    """True and predicted classes of as many images as the matrix `counts` says."""
    return np.repeat(np.indices(counts.shape).reshape(2, -1), counts.ravel(), axis=1)


def drawn(figure):
    """Return the texts of `figure` as its SVG has them; a warning is an error."""
    with warnings.catch_warnings(), mpl.rc_context({"svg.fonttype": "none"}):
        warnings.simplefilter("error")
        rendered(figure, "png")
        tree = ElementTree.fromstring(rendered(figure, "svg"))
    return [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.usefixtures("no_other_fonts")
def test_confusion_matrix_shows_every_name():
    texts = drawn(confusion(*images_of(np.ones((len(CLASSES),) * 2, int)), CLASSES, "$x^2$ on _y"))
    expected = [*2 * [in_figure(name) for name in CLASSES], "true class", "predicted class", "$x^2$ on _y"]
    assert sorted(text.strip() for text in texts) == sorted(expected)


@pytest.mark.usefixtures("no_other_fonts")
def test_mistakes_show_every_name():
    for classes in (CLASSES[:14], CLASSES[14:]):
        labels = np.arange(len(classes))
        likely = np.full(len(classes), 0.5, np.float32)
        images = np.zeros((len(classes), 32, 32, 3), np.uint8)
        texts = [
            text.strip()
            for text in drawn(Predictions("a", classes, images, labels, np.roll(labels, -1), likely).mistakes())
        ]
        names = [in_figure(name, 16) for name in classes]
        lines = [line for name in names for line in (f"true: {name}", f"predicted: {name} 50 %")]
        expected = [*lines, "a: most confident mistakes"]
        assert sorted(texts) == sorted(expected)


@pytest.mark.usefixtures("no_other_fonts")
def test_curves_name_every_run():
    texts = [text.strip() for text in drawn(curves(dict.fromkeys(CLASSES, ONE_EPOCH)))]
    for name in CLASSES:
        assert f"{in_figure(name, 60)}: train 50.00 %, test 40.00 %" in texts


@pytest.mark.usefixtures("no_other_fonts")
def test_curves_of_one_run_have_its_name_as_title():
    assert r"$\foo{$ 猫\x1b".replace("猫", r"\u732b") in drawn(curves({"$\\foo{$ 猫\x1b": ONE_EPOCH}))


def test_two_runs_of_one_name_are_both_drawn(run, trained, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(trained, tmp_path / folder / "run")
    with mpl.rc_context({"svg.fonttype": "none"}):
        code, *_ = run("plot", tmp_path / "a/run", tmp_path / "b/run", "--out", tmp_path / "curves.svg")
    assert code == 0
    assert "".join(ElementTree.parse(tmp_path / "curves.svg").getroot().itertext()).count(": train ") == 2


def test_missing_characters_come_from_another_font(tmp_path, monkeypatch):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for move, point in (("moveTo", (0, 0)), ("lineTo", (0, 700)), ("lineTo", (700, 0))):
        getattr(pen, move)(point)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({0x732B: "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Only Cat", "styleName": "Regular", "psName": "OnlyCat"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "cat.ttf")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    fontManager.addfont(tmp_path / "cat.ttf")
    monkeypatch.setattr(text, "_characters_of_other_fonts", text._characters_of_other_fonts.__wrapped__)
    assert for_figure("猫犬") == r"猫\u72ac"
    svg = rendered(confusion(*images_of(np.eye(2, dtype=int)), ("猫", "dog"), "猫犬"), "svg").decode()
    assert svg.count('xlink:href="#OnlyCat-') == 3


# --- HTML, CSV and JSON ------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, _):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_report_of_the_run_is_printable(run, trained, root):
    code, out, err = run("report", trained, "--root", root)
    assert (code, err) == (0, "")
    assert_printable(out)
    html = (trained / "report.html").read_text(encoding="utf-8")
    assert_printable(html)
    page = Page(html)
    assert "script" not in page.tags
    assert "on [x] $y$, recipe smoke" in page.text
    assert "[x]caf\\udce9\\x1b[31m" in page.text


@pytest.mark.parametrize("kind", ["curves", "confusion", "mistakes"])
def test_every_plot_of_the_run_is_drawn(run, trained, root, kind):
    code, out, err = run("plot", trained, "--kind", kind, "--root", root)
    assert (code, err) == (0, "")
    assert_printable(out)
    with Image.open((trained / f"{kind}.png").open("rb")) as picture:
        assert picture.width < 4000


def test_predictions_in_csv_and_json_name_every_file_and_class(run, trained, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    files = sorted(os.listdir())
    weights = str(trained / "model.safetensors")
    outputs = ("--csv", tmp_path / "p.csv", "--json", tmp_path / "p.json", "--saliency", tmp_path / "p.png")
    code, _, err = run("predict", *outputs, f"--weights={weights}", "--top", len(CLASSES), "--", *files)
    assert code == 0
    assert err.endswith(f"p.png shows the first 16 of {len(files)} images.\n")
    utf8 = {name: name.replace("\udce9", r"\udce9") for name in (*CLASSES, *files)}
    controls = {"\x1b": r"\x1b", "\r": r"\r", "\x07": r"\x07", "\x9b": r"\x9b", "\t": r"\t", "\n": r"\n"}
    cells = {
        name: ("'" if name[0] in "=+-@" else "") + text.translate(str.maketrans(controls))
        for name, text in utf8.items()
    }
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    contents = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert contents["schema"] == 1
    assert contents["model"] == "resnet20"
    assert [row["image"] for row in contents["images"]] == [utf8[name] for name in files]
    assert [row[0] for row in rows] == [cells[name] for name in files]
    for row, image in zip(rows, contents["images"], strict=True):
        classes = [each["class"] for each in image["classes"]]
        assert sorted(classes) == sorted(utf8[name] for name in CLASSES)
        assert row[1::2] == [cells[next(name for name in CLASSES if utf8[name] == text)] for text in classes]
        likely = [each["probability"] for each in image["classes"]]
        assert sum(likely) == pytest.approx(1, abs=1e-5)
        assert likely == sorted(likely, reverse=True)
        assert [float(cell) for cell in row[2::2]] == pytest.approx(likely, abs=1e-6)
    assert len(header) == 1 + 2 * len(CLASSES)


@pytest.mark.parametrize("name", ["=1", "+1", "-1", "@a", "＝1", "＋1", "－1", "＠a"])
def test_csv_cells_that_begin_a_formula_are_defused(name):
    assert for_csv(name) == f"'{name}"


@pytest.mark.parametrize("name", ["a=1", "1-2", "", "'=1", "ship", "#x", "猫", "a\u3000b", "a\xa0b", "\u200fab"])
def test_other_csv_cells_are_unchanged(name):
    assert for_csv(name) == name


# --- files of a run ----------------------------------------------------------------------------------------------


def test_run_in_a_folder_that_is_not_utf8_resumes(run, trained, root):
    config = ("--data", "[x] $y$", "--root", root, "--iterations", 1, "--batch-size", 16, "--precision", "fp32")
    code, _, err = run("train", "smoke", *config, "--out", trained, "--resume")
    assert (code, err) == (0, "")


def test_root_that_is_not_utf8_is_refused_in_words(run, root, tmp_path):
    shutil.copytree(root, tmp_path / "caf\udce9")
    config = ("--data", "[x] $y$", "--root", tmp_path / "caf\udce9", "--iterations", 1, "--batch-size", 16)
    code, _, err = run("train", "smoke", *config, "--out", tmp_path / "run")
    assert code == 2
    assert r"caf\udce9' is not UTF-8, as config.toml is" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--tensorboard", "--wandb", "--mlflow"])
def test_loggers_refuse_a_folder_that_is_not_utf8(run, root, tmp_path, option):
    config = ("--data", "[x] $y$", "--root", root, "--iterations", 1, "--batch-size", 16)
    code, _, err = run("train", "smoke", *config, option, "--out", tmp_path / "caf\udce9")
    assert code == 2
    assert f"{option} takes no run folder whose name is not UTF-8" in err
    assert not list(tmp_path.iterdir())


# --- many classes ------------------------------------------------------------------------------------------------


def test_matrix_of_a_thousand_classes_shows_the_most_confused():
    counts = 500 * np.eye(1000, dtype=int)
    pairs = [(7 * number, 999 - number) for number in range(20)]  # 40 classes, each once
    for number, (true, predicted) in enumerate(pairs):
        counts[true, true], counts[predicted, predicted], counts[true, predicted] = 10, 10, 5 + number
    names = [f"class {number}" for number in range(1000)]
    figure = confusion(*images_of(counts), names, "resnet20 on x: 99.94 % of 480,690 images")
    (axes,) = figure.axes
    shown = sorted(number for pair in pairs for number in pair)
    assert [label.get_text() for label in axes.get_yticklabels()] == [names[number] for number in shown]
    assert [label.get_text() for label in axes.get_xticklabels()] == [names[number] for number in shown]
    shares = axes.images[0].get_array()
    for true, predicted in pairs:
        row, column = shown.index(true), shown.index(predicted)
        assert shares[row, column] == pytest.approx(counts[true, predicted] / (10 + counts[true, predicted]))
    assert axes.get_title() == (
        "resnet20 on x: 99.94 % of 480,690 images\n"
        "the 40 of 1,000 classes with the most mistakes (as true or predicted class)"
    )
    assert max(figure.get_size_inches()) <= 15


def test_matrix_of_forty_classes_shows_all():
    figure = confusion(*images_of(np.eye(40, dtype=int)), [str(number) for number in range(40)], "title")
    assert figure.axes[0].images[0].get_array().shape == (40, 40)
    assert figure.axes[0].get_title() == "title"
