"""Equilibrium Propagation for timm: importing this package registers the `ep_vgg*` models."""

from timm_ep.version import __version__

__all__ = ["__version__"]
