"""Weights on timm's way into a model: checked, and fitted to it."""

import warnings
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from timm_ep.models.crnn import EpVgg
from timm_ep.models.feedforward import from_feedforward, is_feedforward

__all__ = ["checkpoint_filter_fn"]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: EpVgg, strict: bool = True) -> dict[str, Tensor]:
    """Checks weights on timm's way into a model, whatever they were read from; those of timm's feedforward VGGs are
    converted (`timm_ep.models.feedforward`), with the model's own read-out.

    timm loads leniently where the read-out is new (`num_classes`): a checkpoint that lacks layers would leave them
    random. Shapes are compared by timm itself, which then fits the first convolution to images of other channels. As
    its kernel is normalised anew over these, its gain is fitted here, to the size of the kernel that timm made.

    Args:
        state_dict: the weights.
        model: that they are for.
        strict: whether layers that are missing or not of this model are an error, or else a warning.

    Raises:
        ValueError: layers that are missing or not of this model, values that are NaN or infinite, or kernels of a
            feedforward net for a model that would take their means away.
    """
    if is_feedforward(state_dict):
        if model.center_kernels or model.layers[0].gain is None:
            raise ValueError(
                "The weights are of a feedforward VGG, whose kernels have means and are scaled layer by layer; create "
                "the model with center_kernels=False and normalised kernels (as timm-ep convert does)."
            )
        own = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
        converted = from_feedforward(state_dict, model.pooled)
        layers: Any = model.layers
        for number, layer in enumerate(layers):
            converted[f"layers.{number}.bias"] = converted[f"layers.{number}.bias"] / layer.unit
        state_dict = {**converted, **own}
    found, expected = (
        {name for name in names if not name.startswith("head.")} for names in (state_dict, model.state_dict())
    )
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        told = f"The weights are not of this model: missing {missing!s:.200}, unexpected {extra!s:.200}."
        if strict:
            raise ValueError(told)
        warnings.warn(told, stacklevel=2)
    for name, value in state_dict.items():
        if not value.isfinite().all():
            raise ValueError(f"The weights have values of {name} that are NaN or infinite; they would answer nothing.")
    if model.layers[0].gain is None or not {"layers.0.weight", "layers.0.gain"} <= found:
        return state_dict  # a plain kernel, which timm fits itself; or none
    weight = state_dict["layers.0.weight"]
    fitted = adapt_input_conv(model.in_chans, weight, base_chans=weight.shape[1])
    filters = [kernel.double().flatten(1) for kernel in (fitted, weight)]
    if model.center_kernels:
        filters = [kernel - kernel.mean(1, keepdim=True) for kernel in filters]
    ratio = torch.nan_to_num(filters[0].norm(dim=1) / filters[1].norm(dim=1), nan=1.0)
    return {**state_dict, "layers.0.gain": state_dict["layers.0.gain"] * ratio.to(weight.dtype)}
