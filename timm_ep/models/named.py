"""A model of timm by the name that a user gave, and with the sweeps."""

import difflib
from dataclasses import replace
from typing import Any

import timm
from torch import nn

from timm_ep.models.crnn import EpVgg

__all__ = ["check_known", "create_named", "is_ours", "set_sweeps"]


def is_ours(architecture: object) -> bool:
    """Whether timm knows this name from this package."""
    return architecture in timm.list_models(module="ep_vgg")


def check_known(model_name: str) -> None:
    """Name what is similar to a name that timm does not know.

    Raises:
        ValueError: no such model.
    """
    architecture = model_name.partition(".")[0]
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), 5, 0.5) or timm.list_models("ep_vgg*")[:5]
        raise ValueError(f"model {model_name!r} is unknown to timm; similar are {', '.join(similar)}.")


def create_named(model_name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with names that are similar to one that is unknown.

    Args:
        model_name: a name of timm's registry, `hf-hub:…` or `local-dir:…`.
        **kwargs: as for `timm.create_model`.

    Raises:
        ValueError: no such model, no trained weights of it, or arguments that it refuses.
        OSError: weights that are not where the name says.
    """
    if ":" not in model_name:
        check_known(model_name)
    try:
        return timm.create_model(model_name, **kwargs)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"model {model_name!r} could not be created: {error}") from error


def set_sweeps(model: nn.Module, sweeps: int | None) -> None:
    """Let a model settle by exactly so many free sweeps, whatever its own number or tolerance.

    None leaves it as it is; 0 makes it its feedforward twin, from whatever start it settles.

    Raises:
        ValueError: fewer than none, or a model that does not settle.
    """
    if sweeps is None:
        return
    if not isinstance(model, EpVgg):
        raise ValueError(f"sweeps={sweeps}: a {type(model).__name__} does not settle; only the ep_vgg* do.")
    settings = replace(model.settings, free_sweeps=sweeps, tol=0.0)
    model.settings = settings if sweeps else replace(settings, gradient="backprop")
