"""Weights of other repositories and of this program, and rejection of other files."""

import functools
import gzip
import io
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from fastresnet import checkpoint
from fastresnet.checkpoint import save_tensors, with_prefix
from fastresnet.config import TrainConfig
from fastresnet.models import create_model
from fastresnet.weights import load_weights
from pipelines.errors import DataError, Note, UsageError

torchvision = pytest.importorskip("torchvision")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "known_shapes"),
    pytest.mark.filterwarnings("ignore::pipelines.errors.Note"),
]

DEPTHS = (20, 32, 44, 56, 110)


# --- networks of other repositories, with their parameter names --------------------------------------------------


class ForeignBlock(nn.Module):
    """akamaster/pytorch_resnet_cifar10 (option A), descendants of kuangliu/pytorch-cifar (B), no shortcut (None)."""

    def __init__(self, in_planes, planes, stride, option):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.option = option
        self.shortcut = nn.Sequential()
        if option == "B" and in_planes != planes:
            projection = nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.option == "A" and x.shape != out.shape:
            margin = out.shape[1] // 4
            out = out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, margin, margin), "constant", 0)
        elif self.option is not None:
            out = out + self.shortcut(x)
        return F.relu(out)


class ForeignResNet(nn.Module):
    def __init__(self, depth, option, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self.stage(16, 16, blocks, 1, option)
        self.layer2 = self.stage(16, 32, blocks, 2, option)
        self.layer3 = self.stage(32, 64, blocks, 2, option)
        self.linear = nn.Linear(64, num_classes)

    def stage(self, in_planes, planes, blocks, stride, option):
        first = ForeignBlock(in_planes, planes, stride, option)
        return nn.Sequential(first, *(ForeignBlock(planes, planes, 1, option) for _ in range(1, blocks)))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.avg_pool2d(out, out.size()[3]).view(out.size(0), -1))


class ForeignResNet18(ForeignResNet):
    """kuangliu/pytorch-cifar: ResNet18."""

    def __init__(self, num_classes=10):
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self.stage(64, 64, 2, 1, "B")
        self.layer2 = self.stage(64, 128, 2, 2, "B")
        self.layer3 = self.stage(128, 256, 2, 2, "B")
        self.layer4 = self.stage(256, 512, 2, 2, "B")
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x):
        out = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        out = F.avg_pool2d(self.layer4(self.layer3(out)), 4)
        return self.linear(out.view(out.size(0), -1))


class TorchvisionStyle(nn.Module):
    """chenyaofo/pytorch-cifar-models: torchvision's blocks and names."""

    def __init__(self, depth, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self.stage(16, 16, blocks, 1)
        self.layer2 = self.stage(16, 32, blocks, 2)
        self.layer3 = self.stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, num_classes)

    def stage(self, inplanes, planes, blocks, stride):
        block, downsample = torchvision.models.resnet.BasicBlock, None
        if stride != 1:
            projection = nn.Conv2d(inplanes, planes, kernel_size=1, stride=stride, bias=False)
            downsample = nn.Sequential(projection, nn.BatchNorm2d(planes))
        first = block(inplanes, planes, stride, downsample)
        return nn.Sequential(first, *(block(planes, planes) for _ in range(1, blocks)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def trained(network, seed=0):
    """Return `network` in evaluation mode, with random batch norms."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            module.num_batches_tracked.fill_(7)
    return network.eval()


def akamaster(depth=20, num_classes=10):
    torch.manual_seed(depth)
    return trained(ForeignResNet(depth, "A", num_classes))


def kuangliu(depth=20, num_classes=10):
    torch.manual_seed(depth)
    return trained(ForeignResNet(depth, "B", num_classes))


def chenyaofo(depth=20, num_classes=10):
    torch.manual_seed(depth)
    return trained(TorchvisionStyle(depth, num_classes))


def plain():
    torch.manual_seed(0)
    return trained(ForeignResNet(20, None))


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same_logits(weights, reference):
    """Compare in float64, where only real differences are left. Converting float32 weights to it is exact."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert not weights.model.training
    with torch.no_grad():
        expected = reference.double()(images)
        torch.testing.assert_close(weights.model.double()(images), expected, rtol=1e-10, atol=1e-10)


# --- files of other repositories ---------------------------------------------------------------------------------

STYLES = {
    "chenyaofo": (chenyaofo, lambda state: state, "B"),
    "akamaster": (akamaster, lambda state: {"state_dict": prefixed("module.", state), "best_prec1": 91.7}, "A"),
    "kuangliu": (kuangliu, lambda state: {"net": state, "acc": 9.1, "epoch": 3}, "B"),
    "kuangliu parallel": (kuangliu, lambda state: {"net": prefixed("module.", state), "acc": 9.1, "epoch": 3}, "B"),
    "compiled": (akamaster, lambda state: {"model": prefixed("_orig_mod.", state), "step": 5}, "A"),
    "parallel of compiled": (chenyaofo, lambda state: prefixed("module._orig_mod.", state), "B"),
    "compiled parallel": (chenyaofo, lambda state: prefixed("_orig_mod.module.", state), "B"),
    "wrapped twice": (akamaster, lambda state: {"model": {"state_dict": state}, "epoch": 3}, "A"),
    "with optimizer": (kuangliu, lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, "B"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "wrap", "shortcut"), STYLES.values(), ids=STYLES)
def test_weights_of_other_repositories_give_their_logits(tmp_path, make, wrap, shortcut, zipped):
    reference = make()
    torch.save(wrap(reference.state_dict()), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    weights = load_weights(tmp_path / "w.pt")
    assert (weights.name, weights.shortcut, weights.num_classes, weights.training) == ("resnet20", shortcut, 10, None)
    assert_same_logits(weights, reference)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_foreign_safetensors_give_their_logits(tmp_path, prefix, metadata):
    reference = kuangliu()
    safetensors.torch.save_file(prefixed(prefix, reference.state_dict()), tmp_path / "w.safetensors", metadata)
    weights = load_weights(tmp_path / "w.safetensors")
    assert (weights.name, weights.shortcut, weights.training) == ("resnet20", "B", None)
    assert_same_logits(weights, reference)


def test_files_without_num_batches_tracked_give_their_logits(tmp_path):
    reference = chenyaofo()
    state = {name: x for name, x in reference.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_same_logits(load_weights(tmp_path / "w.pt"), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    reference = akamaster().to(dtype)
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert {parameter.dtype for parameter in weights.model.parameters()} == {torch.float32}
    assert_same_logits(weights, reference)


@pytest.mark.parametrize(("make", "shortcut"), [(akamaster, "A"), (kuangliu, "B")])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_depth_is_inferred(tmp_path, depth, make, shortcut):
    reference = make(depth)
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert (weights.name, weights.shortcut) == (f"resnet{depth}", shortcut)
    assert_same_logits(weights, reference)


@pytest.mark.parametrize("classes", [10, 100])
def test_the_resnet18_of_kuangliu_gives_its_logits(tmp_path, classes):
    torch.manual_seed(0)
    reference = trained(ForeignResNet18(classes))
    torch.save({"net": prefixed("module.", reference.state_dict()), "acc": 95.4, "epoch": 199}, tmp_path / "ckpt.pth")
    weights = load_weights(tmp_path / "ckpt.pth")
    assert (weights.name, weights.shortcut, weights.num_classes) == ("resnet18", "B", classes)
    assert_same_logits(weights, reference)


@pytest.mark.parametrize("make", [akamaster, kuangliu, chenyaofo])
def test_a_hundred_classes_are_inferred(tmp_path, make):
    reference = make(num_classes=100)
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt")
    assert weights.num_classes == 100
    assert_same_logits(weights, reference)


def test_plain_networks_are_loaded_by_name(tmp_path):
    reference = plain()
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    weights = load_weights(tmp_path / "w.pt", "plain20")
    assert weights.name == "plain20"
    assert_same_logits(weights, reference)


# --- files of this program ---------------------------------------------------------------------------------------

OWN = [("resnet20", "A"), ("resnet20", "B"), ("resnet32", "B"), ("plain20", "B")]


def own_network(name="resnet20", shortcut="B"):
    torch.manual_seed(0)
    return trained(create_model(name, shortcut=shortcut))


@pytest.mark.parametrize(("name", "shortcut"), OWN)
@pytest.mark.parametrize("resumable", [False, True], ids=["best.ckpt", "last.ckpt"])
def test_own_checkpoints_identify_their_network_and_settings(tmp_path, name, shortcut, resumable):
    network, config = (
        own_network(name, shortcut),
        TrainConfig(model=name, shortcut=shortcut, data="shapes10", precision="fp32"),
    )
    tensors = network.state_dict()
    if resumable:
        tensors = {**with_prefix("model", tensors), "optimizer.fc.weight": torch.ones(10, 64), "totals": torch.zeros(2)}
    save_tensors(tmp_path / "w.ckpt", tensors, {"config": config.to_dict()})
    weights = load_weights(tmp_path / "w.ckpt")
    assert (weights.name, weights.shortcut, weights.num_classes) == (name, shortcut, 10)
    assert weights.training == config.to_dict()
    assert_same_logits(weights, network)


def test_the_name_given_overrides_the_one_in_the_file(tmp_path):
    network = own_network("plain20")
    save_tensors(
        tmp_path / "w.ckpt", network.state_dict(), {"config": TrainConfig(shortcut="A", precision="fp32").to_dict()}
    )
    weights = load_weights(tmp_path / "w.ckpt", "plain20")
    assert weights.name == "plain20"
    assert_same_logits(weights, network)


UNKNOWN_NETWORKS = {
    "unknown model": {"config": {"model": "resnet2000", "shortcut": "B"}},
    "unknown shortcut": {"config": {"model": "resnet20", "shortcut": "C"}},
    "undefined shortcut": {"config": {"model": "wrn16-2", "shortcut": "A"}},
    "no model": {"config": {"shortcut": "B"}},
    "empty config": {"config": None},
    "no config": {},
}


@pytest.mark.parametrize("description", UNKNOWN_NETWORKS.values(), ids=UNKNOWN_NETWORKS)
def test_own_files_with_an_unknown_network_are_refused(tmp_path, description):
    save_tensors(tmp_path / "w.ckpt", own_network().state_dict(), description)
    assert_refused(tmp_path / "w.ckpt")


@pytest.mark.parametrize(
    "wrong", [{"data": 5}, {"normalization": "quarter"}, {"normalization": None}, {"precision": "fp31"}], ids=str
)
def test_own_files_with_invalid_settings_are_refused(tmp_path, wrong):
    config = {**TrainConfig(precision="fp32").to_dict(), **wrong}
    save_tensors(tmp_path / "w.ckpt", own_network().state_dict(), {"config": config})
    assert_refused(tmp_path / "w.ckpt")


def test_averaged_weights_are_loaded_if_the_run_has_them(tmp_path):
    network, raw = own_network(), trained(create_model("resnet20"), seed=1)
    tensors = {**with_prefix("model", raw.state_dict()), **with_prefix("averaged", network.state_dict())}
    save_tensors(tmp_path / "last.ckpt", tensors, {"config": TrainConfig(precision="fp32").to_dict()})
    assert_same_logits(load_weights(tmp_path / "last.ckpt"), network)


CONFIG = TrainConfig(precision="fp32").to_dict()
FULL = {"config": CONFIG, "data": "cifar10", "classes": list("abcdefghij"), "mean": [0.5] * 3, "std": [0.5] * 3}
ODD = (
    None,
    True,
    -1,
    2.5,
    "",
    "x\0",
    [],
    {},
    [[]],
    [None] * 3,
    ["a"] * 3,
    {"a": 1, "b": 2, "c": 3},
    [1e300] * 3,
    10**400,
)


def loaded(path):
    """Load weights, or return None where they are refused in words; other exceptions come through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        try:
            return load_weights(path)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017  other errors fail the test
            return None


@pytest.mark.parametrize("field", [*FULL, *(f"config.{name}" for name in ("model", "shortcut", "data", "precision"))])
def test_missing_and_odd_fields_of_a_description_are_refused_or_passed_over(tmp_path, field):
    path, network, results = tmp_path / "w.ckpt", own_network(), []
    name = field.partition(".")[2]
    for value in (*ODD, "absent"):
        changed = {**FULL, "config": {**CONFIG, name: value}} if name else {**FULL, field: value}
        if value == "absent":
            del (changed["config"] if name else changed)[name or field]
        save_tensors(path, network.state_dict(), changed)
        results.append(loaded(path))
    for weights in filter(None, results):
        assert len(weights.classes) == 10
        assert weights.mean.isfinite().all()
        assert (weights.std > 0).all()
    if field in ("config", "config.model", "config.shortcut", "config.precision"):
        assert results.count(None) == len(results)


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "null", '"schema"', '{"schema": 2}', "{}", 100_000 * "["])
def test_a_description_that_is_no_object_is_refused(tmp_path, text):
    tensors = own_network().state_dict()
    metadata = {"fastresnet": text, "fastresnet.sha256": checkpoint._digest(tensors, text)}
    safetensors.torch.save_file(tensors, tmp_path / "w.ckpt", metadata)
    assert_refused(tmp_path / "w.ckpt")


def test_a_description_without_normalisation_gives_a_note(tmp_path):
    save_tensors(tmp_path / "w.ckpt", own_network().state_dict(), {"config": CONFIG})
    with pytest.warns(Note, match="does not say its normalisation: CIFAR-10's is taken"):
        load_weights(tmp_path / "w.ckpt")


# --- values with which nothing can be computed -------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": [NAN, 0.5, 0.5]},
        {"mean": [0.5, INF, 0.5]},
        {"std": [NAN] * 3},
        {"std": [0.5, 0, 0.5]},
        {"std": [1e-45] * 3},
        {"std": [-1] * 3},
    ],
    ids=str,
)
def test_constants_that_do_not_normalise_are_refused(tmp_path, run, wrong):
    path = tmp_path / "w.ckpt"
    save_tensors(path, own_network().state_dict(), {**FULL, **wrong})
    assert_refused(path)
    for command in (["eval", "--data", "shapes10"], ["predict", tmp_path / "a.png"], ["export"]):
        (tmp_path / "a.png").write_bytes(b"")
        code, _, err = run(*command, "--weights", path)
        assert code == 3
        assert f"{path} describes" in err


@pytest.mark.parametrize("kind", ["own", "foreign", "half"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conv1.weight", NAN),
        ("fc.bias", -INF),
        ("bn1.running_mean", NAN),
        ("bn1.running_var", INF),
        ("layer1.0.bn1.running_var", -0.5),
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path, kind, key, value):
    state = {name: tensor.clone() for name, tensor in own_network().state_dict().items()}
    state[key].view(-1)[1] = value
    if kind == "own":
        save_tensors(tmp_path / "w", state, FULL)
    else:
        torch.save({name: x.half() if kind == "half" and x.ndim else x for name, x in state.items()}, tmp_path / "w")
    with pytest.raises(DataError, match=f"{key} has (values that are NaN or infinite|variances below 0)"):
        load_weights(tmp_path / "w")


def test_values_too_large_for_float32_are_refused(tmp_path):
    state = {**own_network().state_dict(), "fc.bias": torch.full((10,), 1e300, dtype=torch.float64)}
    torch.save(state, tmp_path / "w")
    with pytest.raises(DataError, match=r"fc\.bias has values that are NaN or infinite"):
        load_weights(tmp_path / "w")


# --- files that are no weights -----------------------------------------------------------------------------------


def assert_refused(path, model=None):
    """Assert a `DataError` and nothing else, in a line or two that name the file."""
    with pytest.raises(DataError) as caught:
        load_weights(path, model)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@functools.cache
def good_state():
    """State dict that akamaster's network saves; not to be written into."""
    return akamaster().state_dict()


@functools.cache
def saved_bytes(zipped=True):
    buffer = io.BytesIO()
    torch.save(good_state(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@functools.cache
def saved_safetensors():
    return safetensors.torch.save(good_state())


def changed(**changes):
    """A good state dict with some entries changed; None removes one. Double underscores stand for dots."""
    state = {**good_state(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def containing_itself():
    content = {}
    content["model"] = content
    return content


def torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def zip_of(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "b")
    return buffer.getvalue()


NO_PYTORCH_FILES = {
    "empty": lambda: b"",
    "text": lambda: b"hello world, this is text\n" * 100,
    "json": lambda: b'{"state_dict": {}}',
    "a brace in the ninth place": lambda: b"12345678{ and so on",
    "zeros": lambda: bytes(100_000),
    "zip of something else": lambda: zip_of("a.txt"),
    "gzip": lambda: gzip.compress(saved_bytes()),
    "pickle of a number": lambda: pickle.dumps(3),
    "pickle of a path": lambda: pickle.dumps(Path("x")),
    "torchscript": torchscript,
}

RECOGNISED = {
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html></html>", "is an HTML page"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "is only the index of weights"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file"),
    "archive of images": (zip_of("train/cat/1.png"), "is an archive of images"),
}


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize(("content", "message"), RECOGNISED.values(), ids=RECOGNISED)
def test_another_kind_of_file_is_named(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_weights(tmp_path / name)


NO_STATE_DICTS = {
    "module": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)),
    "module inside": lambda: {"net": nn.Linear(2, 2)},
    "empty": dict,
    "empty inside": lambda: {"state_dict": {}},
    "no tensors": lambda: {"epoch": 3, "acc": 9.1},
    "no tensors inside": lambda: {"net": {"epoch": 3}},
    "list": lambda: [torch.zeros(2)],
    "tensor": lambda: torch.zeros(2),
    "number": lambda: 3,
    "none": lambda: None,
    "numbered tensors": lambda: {0: torch.zeros(2), 1: torch.zeros(3)},
    "contains itself": containing_itself,
}

UNFIT_STATE_DICTS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(weights=None).state_dict(),
    "depth unknown": lambda: ForeignResNet(14, "A").state_dict(),
    "a layer less": lambda: {k: v for k, v in good_state().items() if not k.startswith("layer3.")},
    "missing": lambda: changed(conv1__weight=None),
    "missing statistics": lambda: changed(layer2__1__bn2__running_var=None),
    "without classifier": lambda: changed(linear__weight=None, linear__bias=None),
    "without bias": lambda: changed(linear__bias=None),
    "unknown": lambda: changed(attention__weight=torch.zeros(3)),
    "half of a shortcut": lambda: changed(layer2__0__shortcut__0__weight=torch.zeros(32, 16, 1, 1)),
    "kernel": lambda: changed(conv1__weight=torch.zeros(16, 3, 7, 7)),
    "width": lambda: {k: v.repeat_interleave(2, 0) if v.ndim == 4 else v for k, v in good_state().items()},
    "transposed classifier": lambda: changed(linear__weight=torch.zeros(64, 10)),
    "flat classifier": lambda: changed(linear__weight=torch.zeros(640)),
    "scalar classifier": lambda: changed(linear__weight=torch.tensor(1.0)),
    "no classes": lambda: changed(linear__weight=torch.zeros(0, 64), linear__bias=torch.zeros(0)),
    "counter": lambda: changed(bn1__num_batches_tracked=torch.zeros(3)),
    "without values": lambda: changed(conv1__weight=torch.zeros(16, 3, 3, 3, device="meta")),
    "sparse": lambda: changed(linear__weight=torch.eye(10, 64).to_sparse()),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.torch.jit", "ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", NO_PYTORCH_FILES.values(), ids=NO_PYTORCH_FILES)
def test_invalid_pytorch_file_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content())
    assert_refused(tmp_path / name)


@pytest.mark.parametrize("content", NO_STATE_DICTS.values(), ids=NO_STATE_DICTS)
def test_content_other_than_a_state_dict_is_refused(tmp_path, content):
    torch.save(content(), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:Initializing zero-element")
@pytest.mark.parametrize("content", UNFIT_STATE_DICTS.values(), ids=UNFIT_STATE_DICTS)
def test_a_state_dict_that_fits_no_network_is_refused(tmp_path, content):
    torch.save(content(), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt")


def test_safetensors_without_weights_are_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert_refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("make", "model"),
    [(akamaster, "resnet32"), (akamaster, "resnet110"), (kuangliu, "plain20"), (chenyaofo, "resnet44")],
)
def test_a_model_that_the_file_does_not_fit_is_refused(tmp_path, make, model):
    torch.save(make().state_dict(), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", model)


@pytest.mark.parametrize("model", ["resnet32", "plain20"])
def test_a_model_that_an_own_file_does_not_fit_is_refused(tmp_path, model):
    save_tensors(tmp_path / "w.ckpt", own_network().state_dict(), {"config": TrainConfig(precision="fp32").to_dict()})
    assert_refused(tmp_path / "w.ckpt", model)


@pytest.mark.parametrize("content", [None, b"text"])
def test_an_unknown_model_is_a_usage_error_whatever_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UsageError, match="unknown model 'resnt20': did you mean 'resnet20'") as caught:
        load_weights(tmp_path / "w.pt", "resnt20")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", ".", "file/w.pt", "loop", 300 * "x"])
def test_a_path_that_leads_to_no_file_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_refused(tmp_path / name)


# --- code in files -----------------------------------------------------------------------------------------------


class Canary:
    """Object that creates a file when it is unpickled without restrictions."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("place", ["alone", "wrapped", "among tensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_code_in_a_file_is_not_run(tmp_path, kind, place):
    path, code = tmp_path / "w.pt", Canary(tmp_path / "canary")
    content = {"alone": code, "wrapped": {"state_dict": code}, "among tensors": {"x": torch.zeros(2), "y": code}}[place]
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert_refused(path)
    assert not code.path.exists()


def test_canary_code_runs_in_the_stock_unpickler(tmp_path):
    """This shows that the previous test can fail."""
    canary = Canary(tmp_path / "canary")
    pickle.loads(pickle.dumps(canary)).close()
    assert canary.path.exists()


# --- damage ------------------------------------------------------------------------------------------------------

LENGTHS = (
    1,
    2,
    3,
    4,
    8,
    10,
    30,
    100,
    1000,
    4000,
    8000,
    14_000,
    16_000,
    30_000,
    60_000,
    100_000,
    500_000,
    -100,
    -22,
    -1,
)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(tmp_path, zipped, length):
    (tmp_path / "w.pt").write_bytes(saved_bytes(zipped)[:length])
    assert_refused(tmp_path / "w.pt")


@pytest.mark.parametrize("length", [0, *LENGTHS])
def test_truncated_safetensors_are_refused(tmp_path, length):
    (tmp_path / "w.safetensors").write_bytes(saved_safetensors()[:length])
    assert_refused(tmp_path / "w.safetensors")


def loaded_or_refused(path):
    """The weights in `path`, or None where it is refused by name; other exceptions come through."""
    try:
        return load_weights(path).model.state_dict()
    except DataError as error:
        if str(path) not in str(error):
            raise
        return None


def flipped(content, position, bit):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def random_flips(content, positions, count):
    """`count` copies of `content`, each with one bit flipped at one of `positions`, by what was flipped."""
    generator = random.Random(0)
    for _ in range(count):
        position, bit = generator.choice(positions), generator.randrange(8)
        yield f"byte {position}, bit {bit}", flipped(content, position, bit)


def pickle_bytes(content):
    """Everything before the first tensor's data."""
    tensors = [tensor.numpy().tobytes() for tensor in good_state().values() if tensor.numel() > 1]
    return range(min(content.index(tensor) for tensor in tensors))


def key_bytes(content):
    """The last digits of the keys by which the pickle names the tensors' data."""
    in_pickle = content[: len(pickle_bytes(content))]
    return [match.end() - 1 for match in re.finditer(rb"X[\x01-\x03]\0\0\0\d{1,3}(?!\d)", in_pickle)]


def tensor_bytes(content):
    return range(len(pickle_bytes(content)), content.index(b"PK\x01\x02"))


def directory_bytes(content):
    """The zip file's list of contents, at its end."""
    return range(content.index(b"PK\x01\x02"), len(content))


def offset_bytes(content):
    """Find the directory's positions of entries: a multiple of 256 more or less may be another entry."""
    return [match.start() + 43 for match in re.finditer(rb"PK\x01\x02", content)]


@pytest.mark.parametrize("where", [pickle_bytes, key_bytes, tensor_bytes, directory_bytes, offset_bytes])
def test_a_flipped_bit_in_a_zip_file_never_gives_other_weights(tmp_path, where):
    path, content = tmp_path / "w.pt", saved_bytes()
    path.write_bytes(content)
    right, wrong = loaded_or_refused(path), []
    for what, damaged in random_flips(content, where(content), 40):
        path.write_bytes(damaged)
        state = loaded_or_refused(path)
        if state is not None and not all(torch.equal(state[name], right[name]) for name in right):
            wrong.append(what)
    assert wrong == []


def test_a_flipped_bit_in_a_legacy_file_gives_weights_or_a_refusal(tmp_path):
    """The format has no checksums, so that both outcomes are possible."""
    content = saved_bytes(zipped=False)
    for _, damaged in random_flips(content, pickle_bytes(content), 60):
        (tmp_path / "w.pt").write_bytes(damaged)
        loaded_or_refused(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_flipped_bit_in_foreign_safetensors_gives_weights_or_a_refusal(tmp_path, name):
    """This format has no checksums, either."""
    content = saved_safetensors()
    start = [(f"byte {i}, bit {bit}", flipped(content, i, bit)) for i in range(9) for bit in range(8)]
    header = random_flips(content, range(9, 8 + int.from_bytes(content[:8], "little")), 60)
    for _, damaged in (*start, *header):
        (tmp_path / name).write_bytes(damaged)
        loaded_or_refused(tmp_path / name)
