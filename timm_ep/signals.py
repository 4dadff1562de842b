"""Intermediate error signals: losses on the states of single layers, which nudge every layer and not the last alone.

After Lin, Bal & Sengupta (arXiv:2508.15989). The nudge of a loss on the logits fades on its way down; a loss on a
layer's own state reaches that layer at full strength. All losses of a step are added and enter one nudged phase:

    L = L_out(s_N) + Σ_l α_l L_l(s_l),        force on layer l: −β λ^(N−l) (∂L_out/∂s_l + α_l ∂L_l/∂s_l).

A signal's own parameters (classifiers, projections) only ever see their layer's state at the free equilibrium, so their
gradient is local, and exact. They belong to training and are no part of the model.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from timm_ep.models import EpVgg
from timm_ep.teachers import Teacher

__all__ = ["FeatureDistillation", "LocalErrors", "LogitDistillation", "layer_weights"]

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


def _chosen(layers: Sequence[int] | None, default: list[int], depth: int) -> list[int]:
    chosen = default if layers is None else sorted(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not 1 <= chosen[0] <= chosen[-1] <= depth:
        raise ValueError(f"layers={layers} is no choice of layers; the model has layers 1 to {depth}, each once.")
    return chosen


class LayerClassifiers(nn.Module):
    """A linear classifier on each chosen layer's state, averaged to a grid: what the layer knows of the class.

    Args:
        model: the student, an `EpVgg`.
        layers: numbers from 1; all by default.
        pooled_size: side of the grid in cells. A finer grid asks what is where, and its errors, different from cell to
            cell, keep a strongly coupled net (λ = 1) from settling into a few states for all images: 13 convolutions at
            λ = 1 learn with 4 and hardly with 1. It costs channels × cells × classes parameters a layer. A state
            smaller than the grid is repeated to fill it.
        learned: whether the classifiers learn.

    Raises:
        ValueError: a model without states or classes, or layers that do not exist.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | None = None, pooled_size: int = 4, learned: bool = True
    ) -> None:
        super().__init__()
        model = _student(model)
        depth = len(model.layers)
        if model.num_classes < 1:
            raise ValueError("Classifiers need classes; the model has num_classes=0. Create it with num_classes=…")
        if pooled_size < 1:
            raise ValueError(f"pooled_size={pooled_size} is too small; it must be at least 1.")
        self.layers, self.pooled_size = _chosen(layers, list(range(1, depth + 1)), depth), pooled_size
        like = model.get_parameter("layers.0.weight")
        self.classifiers = nn.ModuleList(
            nn.Linear(_channels(model, layer) * pooled_size**2, model.num_classes, device=like.device, dtype=like.dtype)
            for layer in self.layers
        )
        self.classifiers.requires_grad_(learned)

    def logits(self, states: Sequence[Tensor], index: int) -> Tensor:
        """(B, classes) of the chosen layer number `index`, from s_1…s_N."""
        pooled = F.adaptive_avg_pool2d(states[self.layers[index] - 1], self.pooled_size)
        return self.classifiers[index](pooled.flatten(1))


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
        if final < 0:
            raise ValueError(f"final={final} is negative; a signal's weight is at least 0.")
        self.weights = layer_weights(weight, len(self.layers), schedule)
        self.final, self.progress = final, 0.0

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
        ValueError: a model without states, layers that do not exist, weights that do not fit, a teacher without
            features, an unknown loss.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        weight: float | Sequence[float] = 1.0,
        layers: Sequence[int] | None = None,
        loss: Literal["mse", "cosine"] = "mse",
        schedule: DepthSchedule = "constant",
    ) -> None:
        super().__init__()
        model = _student(model)
        if not teacher.channels:
            raise ValueError(
                f"The teacher {type(teacher.model).__name__} gives no features; choose a model with feature_info, or "
                "distil its logits only."
            )
        if loss not in ("mse", "cosine"):
            raise ValueError(f"loss={loss!r} is unknown; choose mse or cosine.")
        taps = [int(info["module"].removeprefix("layers.")) + 1 for info in model.feature_info]
        self.layers = _chosen(layers, taps, len(model.layers))
        self.weights = layer_weights(weight, len(self.layers), schedule)
        self.loss = loss
        self.matches = [_nearest(2 ** sum(model.pooled[:layer]), teacher.reductions) for layer in self.layers]
        like = model.get_parameter("layers.0.weight")
        self.projections = nn.ModuleList(
            nn.Conv2d(_channels(model, layer), teacher.channels[match], 1, device=like.device, dtype=like.dtype)
            for layer, match in zip(self.layers, self.matches, strict=True)
        )

    def forward(self, states: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """The weighted sum over the layers, a scalar.

        Args:
            states: s_1…s_N from `model.equilibrium`.
            features: all of the teacher's feature maps, (B, channels, H, W) each.
        """
        total = states[-1].new_zeros(())
        for layer, match, weight, project in zip(
            self.layers, self.matches, self.weights, self.projections, strict=True
        ):
            if weight:
                state, feature = states[layer - 1], features[match]
                target = F.layer_norm(
                    F.adaptive_avg_pool2d(feature.float(), (state.shape[-2], state.shape[-1])), _sample(feature, state)
                )
                total = total + weight * self._distance(project(state).float(), target)
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
        if weight < 0 or temperature <= 0:
            raise ValueError(f"weight={weight} must be at least 0, and temperature={temperature} above 0.")
        self.weight, self.temperature = weight, temperature
        answers = bool(layers) if layers is not None else isinstance(model, EpVgg)
        self.classifiers = LayerClassifiers(model, layers, pooled_size) if answers else None

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


def _student(model: nn.Module) -> EpVgg:
    if not isinstance(model, EpVgg):
        raise ValueError(
            f"{type(model).__name__} has no states for intermediate error signals; choose an ep_vgg* model, or train "
            "without local errors and feature distillation."
        )
    return model


def _channels(model: EpVgg, layer: int) -> int:
    return model.get_parameter(f"layers.{layer - 1}.bias").shape[0]


def _nearest(reduction: int, reductions: Sequence[int]) -> int:
    ratios = [max(reduction / other, other / reduction) for other in reductions]
    return max(index for index, ratio in enumerate(ratios) if ratio == min(ratios))


def _sample(feature: Tensor, state: Tensor) -> list[int]:
    return [feature.shape[1], *state.shape[-2:]]
