"""Which layers of a student have a signal, and with what weight."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from timm_ep.models import EpVgg

__all__ = ["DepthSchedule", "channels_of", "chosen_layers", "layer_weights", "student_of"]

DepthSchedule = Literal["constant", "early", "late"]


def layer_weights(weight: float | Sequence[float], count: int, schedule: DepthSchedule = "constant") -> list[float]:
    """α of each of `count` layers, first to last.

    Args:
        weight: of every layer, or one per layer.
        count: layers that have the signal.
        schedule: `constant`; `early`: falling linearly to weight/count at the last layer; `late`: rising from it.

    Raises:
        ValueError: weights of another number than the layers, negative ones, or an unknown schedule.
    """
    weights = list(weight) if isinstance(weight, Sequence) else [float(weight)] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights were given for {count} layers; give one number, or one per layer.")
    if min(weights) < 0:
        raise ValueError(f"The weights {weights} are partly negative; a signal's weight is at least 0.")
    if schedule not in ("constant", "early", "late"):
        raise ValueError(f"The depth schedule {schedule!r} is unknown; choose constant, early or late.")
    if schedule == "constant":
        return weights
    shares = [(layer + 1) / count for layer in range(count)]
    return [w * share for w, share in zip(weights, shares if schedule == "late" else shares[::-1], strict=True)]


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
    return model.get_parameter(f"layers.{layer - 1}.bias").shape[0]
