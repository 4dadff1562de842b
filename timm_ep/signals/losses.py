"""The loss at the read-out."""

from typing import Any

import torch.nn.functional as F
from timm.loss import create_classification_loss
from torch import Tensor, nn

from timm_ep.models import EpVgg

__all__ = ["SquaredError", "readout_criterion"]


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
        ValueError: an unknown name, or label smoothing of the squared error.
    """
    if name is None:
        name = "squared-error" if isinstance(model, EpVgg) and model.readout == "state" else "cross-entropy"
    if name == "cross-entropy":
        return create_classification_loss(**kwargs)
    if name != "squared-error":
        raise ValueError(f"criterion={name!r} is unknown; choose cross-entropy or squared-error.")
    if kwargs.get("smoothing"):
        raise ValueError(f"smoothing={kwargs['smoothing']} is of cross-entropy; set it to 0 for the squared error.")
    return SquaredError()
