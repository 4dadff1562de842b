"""Equilibrium Propagation written plainly from the equations, to test the package against.

One scalar, Φ, and autograd for everything else: no products reused, no differences integrated, no pooling folded away.

    Φ(s; x, θ) = Σ_l λ^(l−N) · [ ⟨s_l, P_l(W_l ⋆ s_(l−1) + b_l)⟩ − ½‖s_l‖² ] = −E
    s_l ← clip(s_l + λ^(N−l) ∂Φ/∂s_l, 0, 1)                            free step, all layers at once
    s_l ← clip(s_l + λ^(N−l) (∂Φ/∂s_l − β ∂L/∂s_l), 0, 1)              nudged step
    dL/dθ ≈ −(1/β) [∂Φ/∂θ(s^β) − ∂Φ/∂θ(s^0)]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class Reference:
    """A net by its parameters: 3×3 kernels at stride 1, biases, and which layers pool 2×2."""

    kernels: list[Tensor]
    biases: list[Tensor]
    pooled: list[bool]
    pool: str = "avg"
    feedback: float = 1.0

    @classmethod
    def of(cls, model, **kwargs) -> "Reference":
        """The net of an EpVgg, its parameters cut off from the model's."""
        kernels = [conv()[0].detach() for conv in model.layers]
        biases = [conv()[1].detach() for conv in model.layers]
        return cls(kernels, biases, model.pooled, model.pool, model.feedback, **kwargs)

    def drive(self, layer: int, below: Tensor, kernels=None, biases=None) -> Tensor:
        out = F.conv2d(below, (kernels or self.kernels)[layer], (biases or self.biases)[layer], padding=1)
        if not self.pooled[layer]:
            return out
        return F.max_pool2d(out, 2) if self.pool == "max" else F.avg_pool2d(out, 2)

    def phi(self, x: Tensor, states: Sequence[Tensor], kernels=None, biases=None) -> Tensor:
        """Φ of each sample, (B,)."""
        total, below = 0, x
        for layer, state in enumerate(states):
            inner = (state * self.drive(layer, below, kernels, biases)).flatten(1).sum(1)
            weight = self.feedback ** (layer + 1 - len(states))
            total = total + weight * (inner - 0.5 * state.pow(2).flatten(1).sum(1))
            below = state
        return total

    def zeros(self, x: Tensor) -> list[Tensor]:
        states, below = [], x
        for layer in range(len(self.kernels)):
            below = torch.zeros_like(self.drive(layer, below))
            states.append(below)
        return states

    def step(self, x: Tensor, states: Sequence[Tensor], beta: float = 0.0, loss: Loss | None = None):
        """One synchronous step; nudged with `beta` and `loss`, whose forces are those at the current states."""
        with torch.enable_grad():
            states = [s.detach().requires_grad_() for s in states]
            total = self.phi(x, states).sum()
            if loss is not None:
                total = total - beta * loss(states)
            grads = torch.autograd.grad(total, states)
        moved = []
        for layer, (state, grad) in enumerate(zip(states, grads, strict=True)):
            moved.append((state + self.feedback ** (len(states) - layer - 1) * grad).clamp(0, 1))
        return moved

    def settle(self, x, states=None, steps=100, beta=0.0, loss=None) -> list[Tensor]:
        states = self.zeros(x) if states is None else states
        for _ in range(steps):
            states = self.step(x, states, beta, loss)
        return [s.detach() for s in states]

    def contrast(self, x, nudged, free, beta) -> tuple[list[Tensor], list[Tensor]]:
        """(1/β) [∂E/∂θ(s^β) − ∂E/∂θ(s^0)] for kernels and biases."""
        kernels = [k.clone().requires_grad_() for k in self.kernels]
        biases = [b.clone().requires_grad_() for b in self.biases]
        total = (self.phi(x, free, kernels, biases).sum() - self.phi(x, nudged, kernels, biases).sum()) / beta
        grads = torch.autograd.grad(total, [*kernels, *biases])
        return list(grads[: len(kernels)]), list(grads[len(kernels) :])
