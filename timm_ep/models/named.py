"""A model of timm by the name that a user gave."""

import difflib
from typing import Any

import timm
from torch import nn

__all__ = ["create_named"]


def create_named(model_name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with names that are similar to one that is unknown.

    Args:
        model_name: a name of timm's registry, `hf-hub:…` or `local-dir:…`.
        **kwargs: as for `timm.create_model`.

    Raises:
        ValueError: no such model, no trained weights of it, or arguments that it refuses.
        OSError: weights that are not where the name says.
    """
    architecture = model_name.partition(".")[0]
    if ":" not in model_name and not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), 5, 0.5) or timm.list_models("ep_vgg*")[:5]
        raise ValueError(f"model {model_name!r} is unknown to timm; similar are {', '.join(similar)}.")
    try:
        return timm.create_model(model_name, **kwargs)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"model {model_name!r} could not be created: {error}") from error
