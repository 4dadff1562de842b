"""The literature's algorithm written plainly from the equations: to test the package against, and to time it beside.

One scalar, Φ, and autograd for everything else: no products reused, no differences integrated, no pooling folded away.
Independent of the rest of the package, which never uses it but in `timm-ep benchmark`.

    Φ(s; x, θ) = Σ_l λ^(l−N) · [ ⟨s_l, P_l(W_l ⋆ s_(l−1) + b_l)⟩ − ½‖s_l‖² ] = −E
    s_l ← clip(s_l + λ^(N−l) ∂Φ/∂s_l, 0, 1)                            free step, all layers at once
    s_l ← clip(s_l + λ^(N−l) (∂Φ/∂s_l − β ∂L/∂s_l), 0, 1)              nudged step
    dL/dθ ≈ −(1/β) [∂Φ/∂θ(s^β) − ∂Φ/∂θ(s^0)]

The step of size λ^(N−l) cancels the −s_l of the gradient: what is left is s_l ← clip(λ^(N−l) ∂Ψ/∂s_l, 0, 1) with Ψ the
sum of the products alone, as published code runs it (Laborieux et al. 2021).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Classic", "Reference"]

Tensors = Sequence[Tensor] | None
Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class Reference:
    """A net by its parameters: 3×3 kernels at stride 1, biases, which layers pool 2×2, and paddings (1 by default)."""

    kernels: list[Tensor]
    biases: list[Tensor]
    pooled: list[bool]
    pool: str = "avg"
    feedback: float = 1.0
    padding: Sequence[int] | None = None
    readout: tuple[Tensor, Tensor] | None = None  # weight (classes, channels), bias: one more layer, fully connected

    def __post_init__(self) -> None:
        if self.readout is not None:
            self.kernels, self.biases = [*self.kernels, self.readout[0]], [*self.biases, self.readout[1]]
            self.pooled = [*self.pooled, False]

    @classmethod
    def of(cls, model: Any, **kwargs: Any) -> "Reference":
        """The net of an EpVgg, its parameters cut off from the model's."""
        kernels = [conv()[0].detach() for conv in model.layers]
        biases = [conv()[1].detach() for conv in model.layers]
        return cls(kernels, biases, model.pooled, model.pool, model.feedback, model.padding, **kwargs)

    def drive(self, layer: int, below: Tensor, kernels: Tensors = None, biases: Tensors = None) -> Tensor:
        """P_l(W_l ⋆ s_(l−1) + b_l)."""
        kernel, bias = (kernels or self.kernels)[layer], (biases or self.biases)[layer]
        if kernel.dim() == 2:
            return F.linear(below.mean((2, 3)), kernel, bias)[:, :, None, None]
        out = F.conv2d(below, kernel, bias, padding=1 if self.padding is None else self.padding[layer])
        if not self.pooled[layer]:
            return out
        return F.max_pool2d(out, 2) if self.pool == "max" else F.avg_pool2d(out, 2)

    def interaction(
        self, x: Tensor, states: Sequence[Tensor], kernels: Tensors = None, biases: Tensors = None
    ) -> Tensor:
        """Ψ = Σ_l λ^(l−N) ⟨s_l, P_l(W_l ⋆ s_(l−1) + b_l)⟩ of each sample, (B,)."""
        total, below = x.new_zeros(len(x)), x
        for layer, state in enumerate(states):
            inner = (state * self.drive(layer, below, kernels, biases)).flatten(1).sum(1)
            total = total + self.feedback ** (layer + 1 - len(states)) * inner
            below = state
        return total

    def phi(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Φ of each sample, (B,)."""
        total = self.interaction(x, states)
        for layer, state in enumerate(states):
            total = total - 0.5 * self.feedback ** (layer + 1 - len(states)) * state.pow(2).flatten(1).sum(1)
        return total

    def zeros(self, x: Tensor) -> list[Tensor]:
        """The states of the zero start."""
        states, below = [], x
        for layer in range(len(self.kernels)):
            below = torch.zeros_like(self.drive(layer, below))
            states.append(below)
        return states

    def step(self, x: Tensor, states: Sequence[Tensor], beta: float = 0.0, loss: Loss | None = None) -> list[Tensor]:
        """One synchronous step; nudged with `beta` and `loss`, whose forces are those at the current states."""
        with torch.enable_grad():
            states = [s.detach().requires_grad_() for s in states]
            total = self.interaction(x, states).sum()
            if loss is not None:
                total = total - beta * loss(states)
            grads = torch.autograd.grad(total, states)
        gains = [self.feedback ** (len(states) - layer) for layer in range(1, len(states) + 1)]
        return [(gain * grad).clamp(0, 1) for gain, grad in zip(gains, grads, strict=True)]

    def settle(
        self,
        x: Tensor,
        states: Sequence[Tensor] | None = None,
        steps: int = 100,
        beta: float = 0.0,
        loss: Loss | None = None,
    ) -> list[Tensor]:
        """The states after so many steps, from zero or from `states`."""
        settled = self.zeros(x) if states is None else [s.detach() for s in states]
        for _ in range(steps):
            settled = self.step(x, settled, beta, loss)
        return settled

    def contrast(
        self, x: Tensor, nudged: Sequence[Tensor], free: Sequence[Tensor], beta: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(1/β) [∂E/∂θ(s^β) − ∂E/∂θ(s^0)] for kernels and biases."""
        kernels = [k.clone().requires_grad_() for k in self.kernels]
        biases = [b.clone().requires_grad_() for b in self.biases]
        phases = [self.interaction(x, states, kernels, biases).sum() for states in (free, nudged)]
        total = (phases[0] - phases[1]) / beta
        grads = torch.autograd.grad(total, [*kernels, *biases])
        return list(grads[: len(kernels)]), list(grads[len(kernels) :])


@dataclass
class Classic:
    """The published algorithm with its two read-outs, on a `Reference`: zero start, synchronous steps, live nudging.

    Sums over the batch; the estimates are divided by its size, so they are of the mean loss.

    Attributes:
        net: with `feedback` 1.
        loss: of outputs and labels, a value per sample.
        weight: of a linear read-out of the last state outside the dynamics, (classes, channels). Without it the output
            is itself the last state, that of the net's `readout`.
        bias: of the read-out.
    """

    net: Reference
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None

    def objective(
        self, states: Sequence[Tensor], target: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Σ_i L_i."""
        if self.weight is None:
            return self.loss(states[-1].flatten(1), target).sum()
        weight, bias = (self.weight if weight is None else weight), (self.bias if bias is None else bias)
        return self.loss(F.linear(states[-1].mean((2, 3)), weight, bias), target).sum()

    def nudged_step(self, x: Tensor, target: Tensor, states: Sequence[Tensor], beta: float) -> list[Tensor]:
        """One step under the loss."""
        return self.net.step(x, states, beta, lambda states: self.objective(states, target))

    def estimate(
        self, x: Tensor, target: Tensor, nudged: Sequence[Tensor], free: Sequence[Tensor], beta: float
    ) -> list[Tensor]:
        """(1/β) [∂F(s^β) − ∂F(s^0)]: all kernels, all biases, the read-out's weight and bias where it is outside."""
        kernels, biases = self.net.contrast(x, nudged, free, beta)
        if self.weight is None or self.bias is None:
            return [*kernels, *biases]
        leaves = [self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()]
        return [*kernels, *biases, *torch.autograd.grad(self.objective(nudged, target, *leaves), leaves)]

    def gradients(
        self, x: Tensor, target: Tensor, free_steps: int, nudged_steps: int, betas: Sequence[float]
    ) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        """The free states, the nudged states for every β, and the mean over β of (1/β) [∂F(s^β) − ∂F(s^0)] / batch.

        The last is a list: all kernels, all biases, and the read-out's weight and bias where it is outside.
        """
        free = self.net.settle(x, steps=free_steps)
        trajectories, estimates = [], []
        for beta in betas:
            nudged = free
            for _ in range(nudged_steps):
                nudged = self.nudged_step(x, target, nudged, beta)
            trajectories.append(nudged)
            estimates.append(self.estimate(x, target, nudged, free, beta))
        means = [torch.stack(parts).mean(0) / len(x) for parts in zip(*estimates, strict=True)]
        return free, trajectories, means
