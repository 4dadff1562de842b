"""Local errors: every layer is asked for the class by a linear classifier of its own."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_ep.signals.layers import DepthSchedule, bias_of, channels_of, chosen_layers, layer_weights, pushes, student_of

__all__ = ["LayerClassifiers", "LocalErrors"]


class LayerClassifiers(nn.Module):
    """A linear classifier on each chosen layer's state, averaged to a grid: what the layer knows of the class.

    Args:
        model: the student, an `EpVgg`.
        layers: numbers from 1; all by default.
        pooled_size: side of the grid in cells. A finer grid asks what is where, and costs channels × cells × classes
            parameters a layer. A state smaller than the grid is repeated to fill it.
        learned: whether the classifiers learn.

    Raises:
        ValueError: a model without states or classes, or layers that do not exist.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | None = None, pooled_size: int = 4, learned: bool = True
    ) -> None:
        super().__init__()
        model = student_of(model)
        depth = len(model.layers)
        if model.num_classes < 1:
            raise ValueError("Classifiers need classes; the model has num_classes=0. Create it with num_classes=…")
        if pooled_size < 1:
            raise ValueError(f"pooled_size={pooled_size} is too small; it must be at least 1.")
        self.layers, self.pooled_size = chosen_layers(layers, list(range(1, depth + 1)), depth), pooled_size
        self.units = [model.unit**layer for layer in self.layers]  # the size of what the classifiers see
        like = bias_of(model)
        self.classifiers = nn.ModuleList(
            nn.Linear(
                channels_of(model, layer) * pooled_size**2, model.num_classes, device=like.device, dtype=like.dtype
            )
            for layer in self.layers
        )
        self.classifiers.requires_grad_(learned)

    def logits(self, states: Sequence[Tensor], index: int) -> Tensor:
        """(B, classes) of the chosen layer number `index`, from s_1…s_N."""
        averages = grid_averages(states[self.layers[index] - 1], self.pooled_size)
        return self.classifiers[index](averages / self.units[index])


def grid_averages(state: Tensor, side: int) -> Tensor:
    """The averages of a map over a grid of cells: `F.adaptive_avg_pool2d(state, side).flatten(1)`.

    As a product with a matrix: the backward pass of that function takes three to five times as long on a CPU, and on
    CUDA it is not deterministic.

    Args:
        state: (B, C, H, W), fastest in channels-last format.
        side: of the grid, in cells.

    Returns:
        (B, C · side²).
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    rows, columns = (
        F.adaptive_avg_pool1d(torch.eye(pixels, dtype=dtype, device=state.device), side) for pixels in state.shape[-2:]
    )
    shares = torch.kron(rows, columns).t().to(state.dtype)  # of every pixel in every cell
    return (shares @ state.permute(0, 2, 3, 1).flatten(1, 2)).transpose(1, 2).flatten(1)


class LocalErrors(LayerClassifiers):
    """A linear classifier on each chosen layer's state, with cross-entropy to the labels.

    Args:
        model: the student, an `EpVgg`.
        weight: α of every layer, or one per layer.
        layers: as for `LayerClassifiers`.
        pooled_size: as for `LayerClassifiers`.
        learned: whether the classifiers learn. Fixed random ones (direct random targets) need no learning rate.
        schedule: of α over depth, see `layer_weights`.
        final: α at the end of training, as a share of α at its start; it changes linearly. Below 1 the read-out gets
            the last word.

    Raises:
        ValueError: a model without states or classes, layers that do not exist, or weights that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float | Sequence[float] = 1.0,
        layers: Sequence[int] | None = None,
        pooled_size: int = 4,
        learned: bool = True,
        schedule: DepthSchedule = "constant",
        final: float = 1.0,
    ) -> None:
        super().__init__(model, layers, pooled_size, learned)
        if not 0 <= final < math.inf:
            raise ValueError(f"final={final} must be a number of at least 0, as a signal's weight is.")
        self.weights = layer_weights(weight, pushes(student_of(model), self.layers), schedule)
        self.final, self.progress = final, 0.0

    @property
    def rests(self) -> bool:
        """Whether classifiers are without a gradient, in some layer or at the end."""
        return not (self.final and all(self.weights))

    def forward(self, states: Sequence[Tensor], target: Tensor) -> Tensor:
        """The weighted sum over the layers, a scalar in nats.

        Args:
            states: s_1…s_N from `model.equilibrium`.
            target: labels (B,), or class probabilities (B, classes).
        """
        scale = 1 + (self.final - 1) * self.progress
        total = states[-1].new_zeros(())
        for index, weight in enumerate(self.weights):
            if weight * scale:  # a signal of weight 0 is none: it is to change nothing, not even by rounding
                total = total + weight * scale * F.cross_entropy(self.logits(states, index), target)
        return total
