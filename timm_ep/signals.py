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


class LocalErrors(nn.Module):
    """A linear classifier on each chosen layer's pooled state, with cross-entropy to the labels.

    Args:
        model: the student, an `EpVgg`.
        weight: α of every layer, or one per layer.
        layers: numbers from 1; all by default, the last included.
        pooled_size: side of the grid to which a state is averaged before the classifier, in cells. 1 asks only what is
            in the image, and costs channels × classes parameters a layer.
        learned: whether the classifiers learn. Fixed random ones (direct random targets) need no learning rate.
        schedule: of α over depth, see `layer_weights`.
        final: α at the end of training, as a share of α at its start; it changes linearly. Below 1 the read-out gets
            the last word.

    Raises:
        ValueError: a model without states, layers that do not exist, or weights that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float | Sequence[float] = 0.3,
        layers: Sequence[int] | None = None,
        pooled_size: int = 1,
        learned: bool = True,
        schedule: DepthSchedule = "constant",
        final: float = 1.0,
    ) -> None:
        super().__init__()
        model = _student(model)
        depth = len(model.layers)
        if model.num_classes < 1:
            raise ValueError("Local errors need classes; the model has num_classes=0. Create it with num_classes=…")
        if pooled_size < 1 or final < 0:
            raise ValueError(f"pooled_size={pooled_size} must be at least 1 and final={final} at least 0.")
        self.layers = _chosen(layers, list(range(1, depth + 1)), depth)
        self.weights = layer_weights(weight, len(self.layers), schedule)
        self.pooled_size, self.final, self.progress = pooled_size, final, 0.0
        like = model.get_parameter("layers.0.weight")
        self.classifiers = nn.ModuleList(
            nn.Linear(_channels(model, layer) * pooled_size**2, model.num_classes, device=like.device, dtype=like.dtype)
            for layer in self.layers
        )
        self.classifiers.requires_grad_(learned)

    def forward(self, states: Sequence[Tensor], target: Tensor) -> Tensor:
        """The weighted sum over the layers, a scalar in nats.

        Args:
            states: s_1…s_N from `model.equilibrium`.
            target: labels (B,), or class probabilities (B, classes).
        """
        scale = 1 + (self.final - 1) * self.progress
        total = states[-1].new_zeros(())
        for layer, weight, classify in zip(self.layers, self.weights, self.classifiers, strict=True):
            if weight * scale:  # a signal of weight 0 is none: it is to change nothing, not even by rounding
                pooled = F.adaptive_avg_pool2d(states[layer - 1], self.pooled_size).flatten(1)
                total = total + weight * scale * F.cross_entropy(classify(pooled), target)
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
    """Cross-entropy's soft companion: T² KL(teacher ‖ student) at temperature T (Hinton et al., arXiv:1503.02531).

    Args:
        weight: of the loss beside the cross-entropy with the labels.
        temperature: divides both logits. Above 1 it shows what the teacher thinks of the other classes; T² keeps the
            size of the gradient.

    Raises:
        ValueError: a negative weight, or a temperature that is not positive.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0:
            raise ValueError(f"weight={weight} must be at least 0, and temperature={temperature} above 0.")
        self.weight, self.temperature = weight, temperature

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """A scalar in nats, mean over the batch; both logits are (B, classes)."""
        if not self.weight:
            return logits.new_zeros(())
        student, teacher = (F.log_softmax(z.float() / self.temperature, 1) for z in (logits, teacher_logits))
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * divergence


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
