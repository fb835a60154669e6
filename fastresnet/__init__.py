"""Train the CIFAR ResNets of He et al. 2015 as fast as the hardware allows, and prove it."""

from pipelines import __version__

__all__ = ["__version__"]
