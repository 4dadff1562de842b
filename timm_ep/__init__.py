"""Equilibrium Propagation for timm: importing this package registers the `ep_vgg*` models."""

from timm_ep.equilibrium import equilibrium
from timm_ep.gradcheck import gradient_check
from timm_ep.models import EpVgg
from timm_ep.settings import Settings
from timm_ep.signals import FeatureDistillation, LocalErrors, LogitDistillation
from timm_ep.task import EpTask
from timm_ep.teachers import create_teacher
from timm_ep.trainer import Trainer
from timm_ep.version import __version__

__all__ = [
    "EpTask",
    "EpVgg",
    "FeatureDistillation",
    "LocalErrors",
    "LogitDistillation",
    "Settings",
    "Trainer",
    "__version__",
    "create_teacher",
    "equilibrium",
    "gradient_check",
]
