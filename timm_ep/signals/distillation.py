"""Distillation: a teacher's feature maps and logits as targets of the states."""

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from timm_ep.models import EpVgg
from timm_ep.signals.layers import DepthSchedule, bias_of, channels_of, chosen_layers, layer_weights, pushes, student_of
from timm_ep.signals.local_errors import LayerClassifiers
from timm_ep.signals.teachers import Teacher, TeacherEnsemble, check_teacher

__all__ = ["FeatureDistillation", "LogitDistillation"]


class FeatureDistillation(nn.Module):
    """The teacher's feature maps as targets of the states at the same reduction.

    A learned 1×1 convolution maps a state's channels to the teacher's; averaging maps the teacher's grid to the
    state's. Teacher features are normalised to mean 0 and variance 1 in each image, so that every layer's loss starts
    near 1.

    Args:
        model: the student, an `EpVgg`.
        teacher: whose features are the targets. A state takes the feature of the nearest reduction (by ratio), the
            deeper of equals; a 224-pixel teacher of a 32-pixel student thus gives finer grids of the same kind of
            feature.
        weight: α of every layer, or one per layer.
        layers: numbers from 1; by default the last layer at each resolution.
        loss: `mse`, or `cosine`: 1 − the cosine over the channels at each cell, blind to the features' size.
        schedule: of α over depth, see `layer_weights`.

    Raises:
        TypeError: a teacher that is a model alone.
        ValueError: a model without states, layers that do not exist, weights that do not fit, a teacher without
            features, an unknown loss.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher | TeacherEnsemble,
        weight: float | Sequence[float] = 1.0,
        layers: Sequence[int] | None = None,
        loss: Literal["mse", "cosine"] = "mse",
        schedule: DepthSchedule = "constant",
    ) -> None:
        super().__init__()
        model = student_of(model)
        check_teacher(teacher)
        if not teacher.channels:
            raise ValueError(
                f"The teacher {type(getattr(teacher, 'model', teacher)).__name__} gives no features; choose one model "
                "with feature_info, or distil logits only."
            )
        if loss not in ("mse", "cosine"):
            raise ValueError(f"loss={loss!r} is unknown; choose mse or cosine.")
        taps = [int(info["module"].removeprefix("layers.")) + 1 for info in model.feature_info]
        self.layers = chosen_layers(layers, taps, len(model.layers))
        self.weights = layer_weights(weight, pushes(model, self.layers), schedule)
        self.loss = loss
        self.matches = [_nearest(2 ** sum(model.pooled[:layer]), teacher.reductions) for layer in self.layers]
        self.units = [model.unit**layer for layer in self.layers]
        like = bias_of(model)
        self.projections = nn.ModuleList(
            nn.Conv2d(channels_of(model, layer), teacher.channels[match], 1, device=like.device, dtype=like.dtype)
            for layer, match in zip(self.layers, self.matches, strict=True)
        )

    @property
    def rests(self) -> bool:
        """Whether projections are without a gradient."""
        return not all(self.weights)

    def forward(self, states: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """The weighted sum over the layers, a scalar.

        Args:
            states: s_1…s_N from `model.equilibrium`.
            features: all of the teacher's feature maps, (B, channels, H, W) each.
        """
        total = states[-1].new_zeros(())
        for layer, match, weight, unit, project in zip(
            self.layers, self.matches, self.weights, self.units, self.projections, strict=True
        ):
            if weight:
                state, feature = states[layer - 1], features[match]
                target = F.layer_norm(
                    F.adaptive_avg_pool2d(feature.float(), (state.shape[-2], state.shape[-1])), _sample(feature, state)
                )
                total = total + weight * self._distance(project(state / unit).float(), target)
        return total

    def _distance(self, projected: Tensor, target: Tensor) -> Tensor:
        if self.loss == "cosine":
            return 1 - F.cosine_similarity(projected, target).mean()
        return F.mse_loss(projected, target)


class LogitDistillation(nn.Module):
    """The teacher's logits as targets: T² KL(teacher ‖ student) at temperature T (Hinton et al., arXiv:1503.02531).

    The student answers with its own logits and, so that every layer is nudged, with a classifier on each chosen layer.

    Args:
        model: the student, an `EpVgg`; or any other, which answers with its own logits alone.
        weight: of the loss of each answer, beside the cross-entropy with the labels.
        temperature: divides the logits of both. Above 1 it shows more of what the teacher thinks of the other classes;
            T² keeps the size of the gradient.
        layers: numbers from 1 of the layers that answer too; all by default, none if empty.
        pooled_size: as for `LayerClassifiers`.

    Raises:
        ValueError: a negative weight, a temperature that is not positive, layers that do not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        temperature: float = 1.0,
        layers: Sequence[int] | None = None,
        pooled_size: int = 4,
    ) -> None:
        super().__init__()
        if not (0 <= weight < math.inf and 0 < temperature < math.inf):
            raise ValueError(f"weight={weight} must be at least 0, and temperature={temperature} above 0.")
        self.weight, self.temperature = weight, temperature
        answers = bool(layers) if layers is not None else isinstance(model, EpVgg)
        self.classifiers = LayerClassifiers(model, layers, pooled_size) if answers else None

    @property
    def rests(self) -> bool:
        """Whether classifiers are without a gradient."""
        return not self.weight

    def forward(self, states: Sequence[Tensor], logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The sum over the answers, a scalar in nats, mean over the batch.

        Args:
            states: s_1…s_N from `model.equilibrium`.
            logits: the student's own, (B, classes).
            teacher_logits: (B, classes).
        """
        if not self.weight:
            return logits.new_zeros(())
        answers = [logits]
        if self.classifiers is not None:
            answers += [self.classifiers.logits(states, index) for index in range(len(self.classifiers.layers))]
        teacher = F.log_softmax(teacher_logits.float() / self.temperature, 1)
        divergences = [
            F.kl_div(
                F.log_softmax(answer.float() / self.temperature, 1), teacher, reduction="batchmean", log_target=True
            )
            for answer in answers
        ]
        total = logits.new_zeros(())
        return self.weight * self.temperature**2 * sum(divergences, total)


def _nearest(reduction: int, reductions: Sequence[int]) -> int:
    ratios = [max(reduction / other, other / reduction) for other in reductions]
    return max(index for index, ratio in enumerate(ratios) if ratio == min(ratios))


def _sample(feature: Tensor, state: Tensor) -> list[int]:
    return [feature.shape[1], *state.shape[-2:]]
