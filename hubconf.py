"""Entry points for `torch.hub.load("OWNER/fastresnet", "resnet20", pretrained=True)`: the networks of `fastresnet`."""

import functools

from fastresnet.models import create_model, list_models
from fastresnet.pretrained import load_pretrained

dependencies = ["torch", "numpy", "safetensors", "tyro", "tomli_w"]


def _network(name, *, pretrained=False, **options):
    """`pretrained`: with the weights that come with fastresnet; `options` are those of `fastresnet.create_model`."""
    return load_pretrained(name) if pretrained else create_model(name, **options)


globals().update({name.replace("-", "_"): functools.partial(_network, name) for name in list_models()})
