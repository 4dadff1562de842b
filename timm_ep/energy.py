"""The energy of a layered convolutional recurrent net, and its two products.

States s_1…s_N lie in [0, 1]; s_0 = x is clamped. With feedback gain λ, kernels W_l, biases b_l and pooling P_l,

    E(s; x, θ) = Σ_l λ^(l−N) · [ ½‖s_l‖² − ⟨s_l, P_l(W_l ⋆ s_(l−1)) + b_l⟩ ].

λ = 1 is the energy of the EP literature (Scellier & Bengio 2017; Laborieux et al. 2021); λ < 1 weakens the feedback and
keeps the energy, so the EP theorem holds for every λ; at λ → 0 the net is feedforward.

All that the dynamics need of E are, per layer, the *drive* P(W ⋆ s) of the layer above and its adjoint, the *feedback*
Wᵀ ⋆ Pᵀ s to the layer below. Average pooling is linear and is folded into the kernel (`fold_average_pool`), so a
coupling is either one (strided) convolution, or a convolution followed by max pooling.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def fold_average_pool(kernel: Tensor) -> Tensor:
    """The kernel whose stride-2 convolution equals `kernel` at stride 1 followed by 2×2 average pooling.

    Both are linear, so they compose to one convolution of (k+1)×(k+1) taps at a quarter of the positions: 2.25 times
    fewer products for k = 3. On an odd map the last row or column is dropped, as by `F.avg_pool2d(…, 2)`.

    Args:
        kernel: (out, in, k, k).

    Returns:
        (out, in, k+1, k+1), differentiable.
    """
    box = kernel.new_full((1, 1, 2, 2), 0.25)
    out_chs, in_chs, height, width = kernel.shape
    folded = F.conv2d(kernel.reshape(-1, 1, height, width), box, padding=1)
    return folded.reshape(out_chs, in_chs, height + 1, width + 1)


class Drive(NamedTuple):
    """What a layer sends up: `value` = P(W ⋆ s); under max pooling also which positions won, and the unpooled map."""

    value: Tensor
    winners: Tensor | None = None
    unpooled: Tensor | None = None


@dataclass(frozen=True)
class Coupling:
    """The geometry of W_l and P_l between the states s_(l−1) and s_l. The kernel itself is always an argument.

    Attributes:
        stride: of the convolution; 2 where average pooling is folded into the kernel.
        padding: of the convolution, in pixels on each side.
        max_pool: 2×2 max pooling at stride 2 after the convolution.
    """

    stride: int = 1
    padding: int = 1
    max_pool: bool = False

    def drive(self, kernel: Tensor, below: Tensor, bias: Tensor | None = None) -> Drive:
        """P(W ⋆ s_(l−1)) + b; `below` is (B, in, H, W)."""
        out = F.conv2d(below, kernel, bias, self.stride, self.padding)
        if not self.max_pool:
            return Drive(out)
        pooled, winners = F.max_pool2d(out, 2, return_indices=True)
        return Drive(pooled, winners, out)

    def feedback(self, kernel: Tensor, above: Tensor, below_size: torch.Size) -> Tensor:
        """Wᵀ ⋆ `above`: the adjoint of the convolution, to the spatial size of `below_size` (odd sizes included)."""
        pads = [
            size - ((out - 1) * self.stride - 2 * self.padding + tap)
            for size, out, tap in zip(below_size[-2:], above.shape[-2:], kernel.shape[-2:], strict=True)
        ]
        return F.conv_transpose2d(above, kernel, None, self.stride, self.padding, pads)

    def unpool(self, above: Tensor, drive: Drive) -> Tensor:
        """Pᵀ s_l: the adjoint of max pooling routes each value to the position that won in `drive`; else identity."""
        if drive.winners is None or drive.unpooled is None:
            return above
        routed = torch.zeros_like(drive.unpooled, memory_format=torch.contiguous_format).flatten(2)
        return routed.scatter(2, drive.winners.flatten(2), above.flatten(2)).view(drive.unpooled.shape)

    def kernel_contrast(self, kernel: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """`above` ⊗ `below`: ∂⟨above, W ⋆ below⟩/∂W, summed over the batch."""
        return conv2d_weight(below, list(kernel.shape), above, self.stride, self.padding)


class Net(NamedTuple):
    """A net as the energy sees it: one coupling, effective kernel and bias per layer.

    Effective kernels are functions of the parameters (weight standardisation, folded pooling); the chain rule from
    kernel to parameter is left to autograd.
    """

    couplings: tuple[Coupling, ...]
    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def energy(net: Net, x: Tensor, states: tuple[Tensor, ...] | list[Tensor], feedback: float) -> Tensor:
    """E(s; x, θ) of each sample, shape (B,). For tests and diagnostics: the dynamics never evaluate it.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        states: s_1…s_N.
        feedback: λ > 0.
    """
    total = x.new_zeros(len(x))
    below = x
    for depth, (coupling, kernel, bias, state) in enumerate(zip(*net, states, strict=True), 1):
        drive = coupling.drive(kernel, below).value + bias[:, None, None]
        layer = (0.5 * state - drive) * state
        total = total + feedback ** (depth - len(states)) * layer.flatten(1).sum(1)
        below = state
    return total
