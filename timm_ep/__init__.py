"""Equilibrium Propagation for timm: importing this package registers the `ep_vgg*` models."""

from timm_ep.core.equilibrium import equilibrium
from timm_ep.core.settings import Settings
from timm_ep.models import EpVgg
from timm_ep.signals.distillation import FeatureDistillation, LogitDistillation
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.task import EpTask
from timm_ep.signals.teachers import TeacherEnsemble, create_teacher
from timm_ep.studies.gradcheck import gradient_check
from timm_ep.training.trainer import Trainer
from timm_ep.version import __version__

__all__ = [
    "EpTask",
    "EpVgg",
    "FeatureDistillation",
    "LocalErrors",
    "LogitDistillation",
    "Settings",
    "TeacherEnsemble",
    "Trainer",
    "__version__",
    "create_teacher",
    "equilibrium",
    "gradient_check",
]
