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
    readout: tuple[Tensor, Tensor] | None = None  # weight (classes, channels), bias: one more layer, fully connected

    def __post_init__(self) -> None:
        if self.readout is not None:
            self.kernels, self.biases = [*self.kernels, self.readout[0]], [*self.biases, self.readout[1]]
            self.pooled = [*self.pooled, False]

    @classmethod
    def of(cls, model, **kwargs) -> "Reference":
        """The net of an EpVgg, its parameters cut off from the model's."""
        kernels = [conv()[0].detach() for conv in model.layers]
        biases = [conv()[1].detach() for conv in model.layers]
        return cls(kernels, biases, model.pooled, model.pool, model.feedback, **kwargs)

    def drive(self, layer: int, below: Tensor, kernels=None, biases=None) -> Tensor:
        kernel, bias = (kernels or self.kernels)[layer], (biases or self.biases)[layer]
        if kernel.dim() == 2:
            return F.linear(below.mean((2, 3)), kernel, bias)[:, :, None, None]
        out = F.conv2d(below, kernel, bias, padding=1)
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

    def objective(self, states: Sequence[Tensor], target: Tensor, weight=None, bias=None) -> Tensor:
        """Σ_i L_i."""
        if self.weight is None:
            return self.loss(states[-1].flatten(1), target).sum()
        features = states[-1].mean((2, 3))
        logits = features @ (self.weight if weight is None else weight).T + (self.bias if bias is None else bias)
        return self.loss(logits, target).sum()

    def gradients(self, x, target, free_steps: int, nudged_steps: int, betas: Sequence[float]):
        """The free states, the nudged states for every β, and the mean over β of (1/β) [∂F(s^β) − ∂F(s^0)] / batch.

        The last is a list: all kernels, all biases, and the read-out's weight and bias where it is outside.
        """
        free = self.net.settle(x, steps=free_steps)
        trajectories, estimates = [], []
        for beta in betas:
            nudged = self.net.settle(x, free, nudged_steps, beta, lambda states: self.objective(states, target))
            trajectories.append(nudged)
            kernels, biases = self.net.contrast(x, nudged, free, beta)
            readout = []
            if self.weight is not None:
                leaves = [self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()]
                readout = list(torch.autograd.grad(self.objective(nudged, target, *leaves), leaves))
            estimates.append([*kernels, *biases, *readout])
        means = [sum(parts) / len(parts) / len(x) for parts in zip(*estimates, strict=True)]
        return free, trajectories, means
