"""Equilibrium Propagation for timm: importing this package registers the `ep_vgg*` models."""

from timm_ep.equilibrium import equilibrium
from timm_ep.gradcheck import gradient_check
from timm_ep.models import EpVgg
from timm_ep.settings import Settings
from timm_ep.trainer import Trainer
from timm_ep.version import __version__

__all__ = ["EpVgg", "Settings", "Trainer", "__version__", "equilibrium", "gradient_check"]
