"""Repositories of the Hugging Face Hub: exported folders, and downloads from a server that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import safetensors
import torch

import fastresnet
from fastresnet.checkpoint import load_tensors, save_tensors
from fastresnet.models import create_model
from fastresnet.pretrained import pretrained_card, pretrained_file
from fastresnet.weights import Normalized, load_weights

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module", params=["half", "pixel"])
def trained(request, tiny_root, one_thread, tmp_path_factory):
    """Folder of a run of two steps, by normalisation."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    settings = {"iterations": 2, "batch_size": 16, "precision": "fp32", "threads": 1, "normalization": request.param}
    fastresnet.train("smoke", data="shapes10", root=tiny_root, out=folder, quiet=True, **settings)
    return folder


@pytest.fixture
def exported(run, trained, tmp_path):
    code, out, err = run(
        "export", "--format", "hub", "--weights", trained / "model.safetensors", "--out", tmp_path / "a b"
    )
    assert (code, err) == (0, "")
    assert f"hf upload USER/NAME '{tmp_path / 'a b'}'" in out
    return tmp_path / "a b"


ERRORS = {"RepoNotFound": 404, "GatedRepo": 403, "EntryNotFound": 404, "RevisionNotFound": 404}
"""Names that the Hub has for errors, and their status."""


class Hub(http.server.ThreadingHTTPServer):
    """A server with the files of `repositories`, by name; for other names it answers with an error of that name.

    `requests` are the methods and paths that it was asked for.
    """

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.requests = repositories, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(with_body=False)

    def do_GET(self, with_body=True):
        server = self.server
        server.requests.append(f"{self.command} {self.path}")
        _, _, name, _, _, file = self.path.split("/", 5)
        content = server.repositories.get(name, b"")
        content = content if isinstance(content, bytes) else (content / file).read_bytes()
        self.send_response(ERRORS.get(name, 200))
        self.send_header("X-Repo-Commit", COMMIT)
        if name in ERRORS:
            self.send_header("X-Error-Code", name)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(5 << 30 if name == "huge" else len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """`serve(name=folder)`: a server of repositories, until the end of the test."""
    servers = []

    def start(**repositories):
        servers.append(Hub(repositories))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(python, tmp_path):
    """Run a program or a command in a process that has `address` for the Hub: the library reads it when imported."""

    def start(address, *arguments, **variables):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), **variables}
        return subprocess.run([python, *map(str, arguments)], env=environment, capture_output=True, text=True)

    return start


def test_exported_folder_evaluates_as_the_run(run, trained, exported, tiny_root, tmp_path):
    assert {file.name for file in exported.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    figures = []
    for folder in (trained, exported):
        arguments = ("--weights", folder / "model.safetensors", "--root", tiny_root, "--threads", "1")
        code, _, err = run("eval", *arguments, "--json", tmp_path / "figures.json")
        assert (code, err) == (0, "")
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert figures[0]["loss"] == figures[1]["loss"]
    assert figures[0]["per_class"] == figures[1]["per_class"]
    (result, *_) = huggingface_hub.ModelCard.load(exported / "README.md").data.eval_results
    assert result.metric_value == pytest.approx(figures[0]["test_accuracy"] / 100, abs=1e-6)


def test_card_has_the_metadata_of_the_hub(exported, trained):
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    summary = json.loads((trained / "summary.json").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("fastresnet", "image-classification", ["accuracy"])
    assert data.license is None  # the user's choice
    assert data.datasets is None  # shapes10 is not on the Hub
    assert {(result.dataset_type, result.dataset_split) for result in data.eval_results} == {("shapes10", "test")}
    names = {"test_accuracy": "single view", "test_accuracy_mirror": "flip TTA", "test_accuracy_shift": "shift TTA"}
    expected = {f"accuracy ({view})": summary[name] / 100 for name, view in names.items()}
    assert {each.metric_name: each.metric_value for each in data.eval_results} == pytest.approx(expected, abs=1e-6)
    for fact in ("272,474 parameters", "`smoke`: 2 steps", f"{summary['test_accuracy']:.2f} %", "in fp32", "`circle`"):
        assert fact in card.text
    config = json.loads((exported / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], len(config["classes"])) == ("resnet20", 10, 10)
    assert config["training"] == summary["settings"]


def test_card_of_pretrained_weights_has_the_figures_of_theirs(run, tmp_path):
    code, _, err = run("export", "--format", "hub", "--weights", "pretrained:resnet20", "--out", tmp_path / "hub")
    assert (code, err) == (0, "")
    card, ours = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md"), pretrained_card("resnet20")
    assert card.data.datasets == ["cifar10"]
    assert card.data.eval_results[0].dataset_name == "CIFAR-10"
    assert card.data.eval_results[0].metric_value == pytest.approx(ours.test_accuracy / 100)
    assert "in fp32 on a CPU" in card.text
    assert f"`{ours.commit}`" in card.text
    with safetensors.safe_open(tmp_path / "hub" / "model.safetensors", "pt") as file:
        expected = load_weights(pretrained_file("resnet20")).model.state_dict()
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in file.keys() | expected.keys())


def test_python_in_the_card_computes_the_logits(exported, trained, serve, ask, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = Normalized(load_weights(trained / "model.safetensors"))(images)
    program = f"import json, torch\nconfig = json.load(open({str(exported / 'config.json')!r}))\n"
    program += "images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))\n"
    program += code.replace("USER/NAME", "me/mine") + "print(json.dumps(logits.tolist()))\n"
    server = serve(mine=exported)
    done = ask(server.address, "-c", program)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-4, atol=1e-4)
    assert set(server.requests) == {f"{method} /me/mine/resolve/main/model.safetensors" for method in ("HEAD", "GET")}


def test_eval_downloads_a_repository_once_and_needs_no_network_then(exported, serve, ask, tmp_path, tiny_root):
    server, losses = serve(mine=exported), []
    size = (exported / "model.safetensors").stat().st_size
    command = ("-m", "fastresnet", "eval", "--root", tiny_root, "--threads", "1", "--json", tmp_path / "figures.json")
    for weights, settings in (
        (exported / "model.safetensors", {}),
        ("hf-hub:me/mine@main", {}),
        ("hf-hub:me/mine", {"HF_HUB_OFFLINE": "1"}),
    ):
        done = ask(server.address, *command, "--weights", weights, **settings)
        assert done.returncode == 0, done.stderr
        announced = (
            f"fastresnet: note: downloading model.safetensors ({size / 1e6:.1f} MB) of me/mine from {server.address}.\n"
        )
        assert done.stderr == (announced if "@" in str(weights) else "")
        losses.append(json.loads((tmp_path / "figures.json").read_text())["loss"])
    assert losses[0] == losses[1] == losses[2]
    assert [request for request in server.requests if request.startswith("GET")] == [
        "GET /me/mine/resolve/main/model.safetensors"
    ]


FIND = """
import sys
from fastresnet.pretrained import find_weights
from pipelines.errors import UserError
for name in sys.argv[1:]:
    try:
        print(find_weights(name))
    except UserError as error:
        print(error.exit_code, error)
"""

REFUSED = {
    "hf-hub:me/RepoNotFound": (3, "there is no such repository, or it is private. Check the name, or log in with"),
    "hf-hub:me/GatedRepo": (3, "the repository is gated. Ask for access on its page, and log in with hf auth login."),
    "hf-hub:me/EntryNotFound": (3, "the repository has no model.safetensors."),
    "hf-hub:me/RevisionNotFound@v2": (3, "the repository has no such revision. Give a branch, a tag or a commit"),
    "hf-hub:me/huge": (3, "model.safetensors has 5.4 GB, more than any network of this program."),
    "hf-hub:me/a..b": (2, "Cannot have -- or .. in repo_id"),
    "hf-hub:mine": (2, "is no repository. Give hf-hub:USER/NAME, or hf-hub:USER/NAME@REVISION."),
    "hf-hub:me/mine@": (2, "is no repository. Give hf-hub:USER/NAME"),
    "hf-hub:me/mine/model.safetensors": (2, "is no repository. Give hf-hub:USER/NAME"),
}


def test_repositories_without_weights_are_refused_in_one_line(serve, ask, tmp_path):
    server = serve()
    lines = ask(server.address, "-c", FIND, *REFUSED).stdout.splitlines()
    for (name, (code, reason)), line in zip(REFUSED.items(), lines, strict=True):
        assert line.startswith(f"{code} ")
        assert name in line
        assert reason in line
    assert not [request for request in server.requests if request.startswith("GET")]
    (line,) = ask(server.address, "-c", FIND, "hf-hub:me/other", HF_HUB_OFFLINE="1").stdout.splitlines()
    assert line.startswith(f"3 hf-hub:me/other: it is not in the cache, and {server.address} cannot be reached: ")


@pytest.mark.parametrize("arguments", [("eval", "--weights", "hf-hub:me/mine"), ("export", "--format", "hub")])
def test_a_missing_library_is_named_and_nothing_is_written(run, tmp_path, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert err.endswith("needs huggingface_hub: pip install 'fastresnet[hub]'\n")
    assert not list(tmp_path.iterdir())


def test_only_a_new_or_an_empty_folder_is_written(run, tmp_path):
    command = ("export", "--format", "hub", "--weights", "pretrained:resnet20", "--out")
    (tmp_path / "empty").mkdir()
    assert run(*command, tmp_path / "empty")[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "empty").iterdir()}
    for name in ("empty", "link", "file"):
        code, _, err = run(*command, tmp_path / name)
        assert code == 2
        assert f"{tmp_path / name} exists and is not an empty folder. Remove it, or give another with --out." in err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "empty").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link", "file"}


def test_weights_of_other_programs_do_not_say_what_a_card_states(run, tmp_path):
    torch.save(create_model("resnet20").state_dict(), tmp_path / "other.pt")
    code, _, err = run("export", "--format", "hub", "--weights", tmp_path / "other.pt", "--out", tmp_path / "hub")
    assert code == 2
    assert f"describes the training, which {tmp_path / 'other.pt'} does not say" in err
    code, _, err = run("export", "--format", "hub", "--normalize")
    assert code == 2
    assert "but hub contains only weights" in err


def test_accuracies_of_other_weights_are_not_stated(run, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(pretrained_file("resnet20").read_bytes())
    (tmp_path / "run" / "summary.json").write_bytes((trained / "summary.json").read_bytes())
    for file, reason in (
        (tmp_path / "run" / "model.safetensors", "summary.json is of another training"),
        (trained / "best.ckpt", "best.ckpt is not known"),
    ):
        folder = tmp_path / file.stem
        code, _, err = run("export", "--format", "hub", "--weights", file, "--out", folder)
        assert code == 0
        assert reason in err
        card = huggingface_hub.ModelCard.load(folder / "README.md")
        assert card.data.eval_results is None
        assert "| test accuracy | not measured |" in card.text


def test_names_from_outside_and_folders_stay_harmless(run, tmp_path):
    """A name may hold Markdown, HTML or YAML; a path names folders of the user's machine."""
    weights, description = load_tensors(pretrained_file("resnet20"))
    names = ["<b>", "`x`", "a | b", "line\nline", "---", "\x1b[31m", "[a](b)", "#", "\udcff", "é"]
    description["config"]["data"] = "/home/somebody/secret/birds: [1]"
    save_tensors(tmp_path / "weights.safetensors", weights, {**description, "classes": names})
    code, _, _ = run(
        "export", "--format", "hub", "--weights", tmp_path / "weights.safetensors", "--out", tmp_path / "hub"
    )
    assert code == 0
    assert load_weights(tmp_path / "hub" / "model.safetensors").classes == tuple(names)
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.model_name is None
    assert card.text.splitlines()[1] == "# resnet20 on `birds: [1]`"
    listed = re.search(r"In the order of the logits: (.*)\.$", card.text, re.MULTILINE)[1]
    assert re.fullmatch(r"`[^`<>|\x1b]+`(, `[^`<>|\x1b]+`){9}", listed)
    assert not [file for file in (tmp_path / "hub").iterdir() if b"secret" in file.read_bytes()]
