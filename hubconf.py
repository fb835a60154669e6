"""Entry points for `torch.hub.load("OWNER/fastresnet", "resnet20", pretrained=True)`: the networks of `fastresnet`.

With `pretrained=True, num_classes=100` the network has pretrained weights and a new linear layer, to be trained.
"""

import functools as _functools

import fastresnet as _fastresnet

dependencies = ["torch", "numpy", "safetensors"]


def _network(name, *, pretrained=False, **options):
    """Create a network by the `options` of `fastresnet.create_model`, or load its `pretrained` weights.

    Pretrained weights take `num_classes` alone, as `fastresnet.load_pretrained` does.
    """
    create = _fastresnet.load_pretrained if pretrained else _fastresnet.create_model
    return create(name, **options)


globals().update({name.replace("-", "_"): _functools.partial(_network, name) for name in _fastresnet.list_models()})
