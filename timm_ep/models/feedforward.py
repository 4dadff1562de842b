"""The weights of timm's feedforward VGGs (`vgg11` … `vgg19`, `_bn` too) under the names of an `EpVgg`.

A ReLU net with max pooling computes max(0, P(W_l ⋆ h_(l−1)) + b_l), which is what an `EpVgg` with `pool="max"` and
without feedback computes as long as no state reaches 1, where it is clipped: `timm_ep.training.convert.calibrate` sees
to that.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["from_feedforward", "is_feedforward"]

_EPS = 1e-5  # of timm's BatchNorm2d


def is_feedforward(state_dict: dict[str, Tensor]) -> bool:
    """Whether these are the weights of one of timm's VGGs."""
    return "features.0.weight" in state_dict


def from_feedforward(state_dict: dict[str, Tensor], pooled: Sequence[bool]) -> dict[str, Tensor]:
    """Kernels and biases of a VGG, its batch normalisation folded in, as `layers.l.weight`, `.gain` and `.bias`.

    The gain is the norm of the source's filter, so that the kernel in use, gain · W / (rms · √fan-in), is the source's.
    Its classifier is left out.

    Args:
        state_dict: of timm's `VGG`, with or without its classifier.
        pooled: whether each convolution of the target is followed by pooling.

    Raises:
        ValueError: another number of convolutions, or poolings elsewhere.
    """
    names = (re.fullmatch(r"features\.(\d+)\.weight", name) for name in state_dict)
    convolutions = sorted(int(name[1]) for name in names if name and state_dict[name[0]].dim() == 4)
    modules = 3 if f"features.{convolutions[0] + 1}.running_var" in state_dict else 2  # convolution, norm, ReLU
    # Where pooling follows, the next convolution comes one module later; after the last one nothing tells.
    found = [after - before > modules for before, after in pairwise(convolutions)]
    if found != list(pooled[:-1]):
        raise ValueError(
            f"The weights are of {len(convolutions)} convolutions, pooled after {_layers(found)}; this model has "
            f"{len(pooled)}, pooled after {_layers(pooled)}. Take the ep_vgg* of the same depth."
        )
    converted = {}
    for layer, index in enumerate(convolutions):
        weight, bias = (state_dict[f"features.{index}.{name}"] for name in ("weight", "bias"))
        if modules == 3:
            scale, shift, mean, var = (
                state_dict[f"features.{index + 1}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale / torch.sqrt(var + _EPS)
            weight, bias = weight * scale[:, None, None, None], shift + (bias - mean) * scale
        norm = weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)  # of a filter of zeros
        converted[f"layers.{layer}.weight"] = weight / norm[:, None, None, None]
        converted[f"layers.{layer}.gain"] = norm * (1 + 1e-6) ** 0.5  # the floor in the normalisation of `EpConv2d`
        converted[f"layers.{layer}.bias"] = bias
    return converted


def _layers(pooled: Sequence[bool]) -> str:
    return ", ".join(str(layer) for layer, is_pooled in enumerate(pooled, 1) if is_pooled) or "none"
