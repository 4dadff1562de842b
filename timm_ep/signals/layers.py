"""Which layers of a student have a signal, and with what weight."""

import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

from torch import Tensor, nn

from timm_ep.core.nudged_phase import force_gains
from timm_ep.models import EpVgg

__all__ = ["DepthSchedule", "bias_of", "channels_of", "chosen_layers", "layer_weights", "pushes", "student_of"]

DepthSchedule = Literal["constant", "early", "late", "level"]


def layer_weights(
    weight: float | Sequence[float], pushed: Sequence[float], schedule: DepthSchedule = "constant"
) -> list[float]:
    """α of each layer that has the signal, first to last.

    Args:
        weight: of every layer, or one per layer.
        pushed: of each of these layers, see `pushes`.
        schedule: `constant`; `early`: falling linearly to weight/count at the last layer; `late`: rising from it;
            `level`: over `pushed`, as λ is when the signal is made, so that the nudge pushes every layer as hard as the
            last one. On a device that is
            what lifts the nudges of lower layers above its noise. Gradients then differ in size from layer to layer
            by as much, which takes an optimizer that does not mind (Lion; the squares of AdamW overflow).

    Raises:
        ValueError: weights of another number than the layers, what is no weight, an unknown schedule, or `level` where
            nothing feeds back.
    """
    count = len(pushed)
    weights = list(weight) if isinstance(weight, Sequence) else [float(weight)] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights were given for {count} layers; give one number, or one per layer.")
    if not all(0 <= w < math.inf for w in weights):
        raise ValueError(f"The weights {weights} must all be numbers of at least 0.")
    if schedule not in get_args(DepthSchedule):
        raise ValueError(f"The depth schedule {schedule!r} is unknown; choose {', '.join(get_args(DepthSchedule))}.")
    if schedule == "constant":
        return weights
    if schedule == "level":
        if min(pushed) == 0:
            raise ValueError("schedule='level' needs feedback: with λ = 0 a nudge pushes the last layer alone.")
        return [w / push for w, push in zip(weights, pushed, strict=True)]
    shares = [(layer + 1) / count for layer in range(count)]
    return [w * share for w, share in zip(weights, shares if schedule == "late" else shares[::-1], strict=True)]


def pushes(model: EpVgg, layers: Sequence[int]) -> list[float]:
    """What a force of 1 does to each layer's pre-activation, λ^(N−l), over what it does to that of the last layer.

    States and forces are both counted in units of the layer's states (`EpVgg.unit`), as classifiers see them.
    """
    gains = force_gains(model.settings.feedback * model.unit**2, len(model.layers))
    return [gains[layer - 1] for layer in layers]


def chosen_layers(layers: Sequence[int] | None, default: list[int], depth: int) -> list[int]:
    chosen = default if layers is None else sorted(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not 1 <= chosen[0] <= chosen[-1] <= depth:
        raise ValueError(f"layers={layers} is no choice of layers; the model has layers 1 to {depth}, each once.")
    return chosen


def student_of(model: nn.Module) -> EpVgg:
    if not isinstance(model, EpVgg):
        raise ValueError(
            f"{type(model).__name__} has no states for intermediate error signals; choose an ep_vgg* model, or train "
            "without local errors and feature distillation."
        )
    return model


def channels_of(model: EpVgg, layer: int) -> int:
    return bias_of(model, layer).shape[0]


def bias_of(model: EpVgg, layer: int = 1) -> Tensor:
    """Of a layer, from 1: a tensor of its channels, device and dtype, however parametrized or pruned the model is."""
    return cast(Tensor, model.layers[layer - 1].bias)
