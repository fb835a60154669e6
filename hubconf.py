"""Entry points for `torch.hub.load("OWNER/fastresnet", "resnet20", pretrained=True)`: the networks of `fastresnet`."""

import functools as _functools

import fastresnet as _fastresnet

dependencies = ["torch", "numpy", "safetensors"]


def _network(name, *, pretrained=False, **options):
    """Create a network by the `options` of `fastresnet.create_model`, or load its `pretrained` weights."""
    create = _fastresnet.load_pretrained if pretrained else _fastresnet.create_model
    return create(name, **options)


globals().update({name.replace("-", "_"): _functools.partial(_network, name) for name in _fastresnet.list_models()})
