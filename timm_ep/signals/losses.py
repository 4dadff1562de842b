"""The loss at the read-out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from timm.loss import create_classification_loss
from torch import Tensor, nn

from timm_ep.core.live import LossOfStates
from timm_ep.models import EpVgg

__all__ = ["Criterion", "Signal", "SquaredError", "loss_of_states", "readout_criterion"]

Criterion = Callable[[Tensor, Tensor], Tensor]
"""A loss of outputs and labels, a mean over the batch."""

Signal = Callable[[Sequence[Tensor], Tensor], Tensor]
"""A loss of the states s_1…s_N and the labels, such as `timm_ep.LocalErrors`."""


class SquaredError(nn.Module):
    """½‖o − y‖², mean over the batch: the loss of the EP literature's output layer, with y the one-hot label.

    With `readout="state"` its force on the output is y − o, a spring to the label.
    """

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar.

        Args:
            output: (B, classes).
            target: labels (B,), or class probabilities (B, classes).
        """
        wanted = F.one_hot(target, output.shape[1]) if target.dim() == 1 else target
        return 0.5 * (output - wanted.to(output.dtype)).square().sum(1).mean()


def readout_criterion(model: Any, name: str | None = None, **kwargs: Any) -> nn.Module:
    """The criterion of a model's output.

    Args:
        model: its read-out decides where there is no name: squared error inside the dynamics, else cross-entropy.
        name: `cross-entropy` or `squared-error`.
        **kwargs: of timm's `create_classification_loss`, for cross-entropy, such as `smoothing`.

    Raises:
        ValueError: an unknown name, or label smoothing and the like of the squared error.
    """
    if name is None:
        name = "squared-error" if isinstance(model, EpVgg) and model.readout == "state" else "cross-entropy"
    if name == "cross-entropy":
        return create_classification_loss(**kwargs)
    if name != "squared-error":
        raise ValueError(f"criterion={name!r} is unknown; choose cross-entropy or squared-error.")
    if given := {key: value for key, value in kwargs.items() if value and key != "soft_targets"}:
        raise ValueError(f"{given} are of cross-entropy; leave them out, or at 0, for the squared error.")
    return SquaredError()


def loss_of_states(
    model: EpVgg, labels: Tensor, criterion: Criterion | None = None, signal: Signal | None = None
) -> LossOfStates:
    """The loss of a model's output, and of a signal beside it, as a function of the states s_1…s_N.

    Args:
        model: whose output it is.
        labels: (B,), or whatever the criterion takes.
        criterion: by default that of the model's read-out.
        signal: a further loss.
    """
    criterion = criterion or readout_criterion(model)

    def loss_of(states: Sequence[Tensor]) -> Tensor:
        loss = criterion(model.output(states), labels)
        return loss if signal is None else loss + signal(states, labels)

    return loss_of
