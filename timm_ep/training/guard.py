"""Numerical safety of a training: which updates are not made, and what to say when too many were not."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_ep.models import EpVgg
from timm_ep.signals.layers import bias_of
from timm_ep.training.options import TrainingOptions

__all__ = ["Guard", "broken_weights", "layer_residuals"]

_IMAGES = 8  # of a batch, on which the residual is measured


def layer_residuals(model: nn.Module, images: Tensor) -> Tensor:
    """`EpVgg.layer_residuals` on some of the images; empty for a model without states."""
    if not isinstance(model, EpVgg):
        return torch.zeros(0, 0)
    return model.layer_residuals(images[:_IMAGES].to(bias_of(model).dtype))


def broken_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]


@dataclass
class Guard:
    """Watches the loss, the gradient and the residual of each update.

    Attributes:
        residual: the last one measured, of the worst layer in the last sweep; NaN where nothing settles.
        sweeps: of the free phase when it was measured.
        skipped: updates not made so far.
        in_a_row: of these, the last without one made in between.
    """

    residual: float = float("nan")
    sweeps: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def measure(self, model: nn.Module, images: Tensor) -> None:
        """Measure the residual on some images."""
        residuals = layer_residuals(model, images)
        self.sweeps = len(residuals)
        self.residual = float(residuals[-1].max()) if residuals.numel() else float("nan")

    def judge(self, loss: float, damaged: bool, finite: bool, settled: bool, options: TrainingOptions) -> str | None:
        """Count an update, and say why it is not to be made; None if it is.

        Args:
            loss: of the update, over all processes.
            damaged: whether pixels of its images are not finite.
            finite: whether its gradient is.
            settled: whether the residuals measured with it are within the limit.
            options: of the training.
        """
        reason = None
        if damaged:
            reason = "pixels of its images are NaN or infinite"
        elif not abs(loss) < float("inf"):
            reason = f"the loss is {loss}"
        elif not finite:
            reason = "the gradient is not finite"
        elif not settled:
            reason = f"the free residual {self.residual:.2g} is above max_residual={options.max_residual:g}"
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        self.skipped += reason is not None
        return reason

    def diagnosis(self, reason: str, where: str, model: nn.Module, images: Tensor, options: TrainingOptions) -> str:
        """What happened, in which layer, and which setting to change.

        Args:
            reason: why the last update was not made.
            where: it was.
            model: as it is now.
            images: of the last update.
            options: of the training.
        """
        parts = [f"{self.in_a_row} updates in a row were skipped, the last ({where}) because {reason}."]
        if broken := broken_weights(model):
            parts.append(f"Weights are not finite any more, first {broken[0]}, so no later batch can do better.")
        residuals = layer_residuals(model, images)
        if residuals.numel():
            last = residuals[-1].nan_to_num(float("inf"))
            worst = int(last.argmax())
            parts.append(
                f"Layer {worst + 1} of {len(last)} settles worst: its state changes by {float(last[worst]):.2g} of its "
                f"size in the last of {len(residuals)} free sweeps."
            )
        lower = f"lower lr={options.lr:g}" + ("" if options.clip_grad else ", or set clip_grad")
        settle = ""
        if residuals.numel() and isinstance(model, EpVgg):
            settle = f"lower feedback={model.feedback:g} or raise free_sweeps={model.free_sweeps} with model_args"
        if settle and self.residual > options.max_residual:
            advice = f"Raise max_residual={options.max_residual:g}, or {settle}; if it settled at first, {lower}"
        else:
            advice = lower.capitalize() + (f"; if the residual is above about 0.1, {settle}" if settle else "")
        return " ".join([*parts, advice]) + "."
