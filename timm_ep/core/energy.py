"""The energy of a layered convolutional recurrent net, and its two products.

States s_1…s_N lie in [0, 1]; s_0 = x is clamped. With feedback gain λ, kernels W_l, biases b_l and pooling P_l,

    E(s; x, θ) = Σ_l λ^(l−N) · [ ½‖s_l‖² − ⟨s_l, P_l(W_l ⋆ s_(l−1)) + b_l⟩ ].

λ = 1 is the energy of the EP literature (Scellier & Bengio 2017; Laborieux et al. 2021); λ < 1 weakens the feedback and
keeps the energy, so the EP theorem holds for every λ; at λ → 0 the net is feedforward.

All that the dynamics need of E are, per layer, the *drive* P(W ⋆ s) of the layer above and its adjoint, the *feedback*
Wᵀ ⋆ Pᵀ s to the layer below. Average pooling is linear and is folded into the kernel (`fold_average_pool`), so a
coupling is either one (strided) convolution, or a convolution followed by max pooling.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ep.core import convolution, dense


def fold_average_pool(kernel: Tensor) -> Tensor:
    """The kernel whose stride-2 convolution equals `kernel` at stride 1 followed by 2×2 average pooling.

    Both are linear, so they compose to one convolution of (k+1)×(k+1) taps at a quarter of the positions: 2.25 times
    fewer products for k = 3. On an odd map the last row or column is dropped, as by `F.avg_pool2d(…, 2)`.

    Args:
        kernel: (out, in, k, k).

    Returns:
        (out, in, k+1, k+1), differentiable.
    """
    out_chs, in_chs, height, width = kernel.shape
    # As one product with a small matrix: a convolution takes a hundred times longer for so many tiny images.
    taps = torch.eye(height * width, dtype=kernel.dtype, device=kernel.device).view(-1, 1, height, width)
    spread = F.conv2d(taps, kernel.new_full((1, 1, 2, 2), 0.25), padding=1).flatten(1)
    return (kernel.flatten(2) @ spread).view(out_chs, in_chs, height + 1, width + 1)


class Drive(NamedTuple):
    """What a layer receives from below: `value` = P(W ⋆ s) + b, (B, out, H', W').

    Under max pooling also `winners`, the flat indices of the positions that won, in the shape of `value`, and
    `unpooled`, the map W ⋆ s + b before pooling, (B, out, H, W).
    """

    value: Tensor
    winners: Tensor | None = None
    unpooled: Tensor | None = None

    def route(self, above: Tensor) -> Tensor:
        """Pᵀ s: the adjoint of max pooling sends each value to the position that won; without it, nothing to do."""
        if self.winners is None or self.unpooled is None:
            return above
        routed = torch.zeros_like(self.unpooled, memory_format=torch.contiguous_format).flatten(2)
        return routed.scatter(2, self.winners.flatten(2), above.flatten(2)).view(self.unpooled.shape)

    def shifted(self, change: Tensor) -> "Drive":
        """The drive once W ⋆ s has changed by `change`, in the shape of the map before pooling."""
        if self.unpooled is None:
            return Drive(self.value + change)
        return max_pool(self.unpooled + change)

    def at_winners(self, unpooled: Tensor) -> Tensor:
        """The values of another unpooled map at the winners of this one, in the shape of `value`."""
        if self.winners is None:
            return unpooled
        return unpooled.flatten(2).gather(2, self.winners.flatten(2)).view(self.winners.shape)


def max_pool(unpooled: Tensor) -> Drive:
    """2×2 max pooling at stride 2, with the winners."""
    value, winners = F.max_pool2d(unpooled, 2, return_indices=True)
    return Drive(value, winners, unpooled)


@dataclass(frozen=True)
class Coupling:
    """The geometry of W_l and P_l between the states s_(l−1) and s_l.

    Attributes:
        stride: of the convolution; 2 where average pooling is folded into the kernel.
        padding: of the convolution, in pixels on each side.
        max_pool: 2×2 max pooling at stride 2 after the convolution.
        dense: height and width of the map above (before max pooling), where the kernel is written out as a matrix
            between whole maps (`timm_ep.core.dense`).
    """

    stride: int = 1
    padding: int = 1
    max_pool: bool = False
    dense: tuple[int, int] | None = None

    def convolve(self, below: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """W ⋆ `below` + b, before max pooling."""
        if self.dense:
            return dense.convolve(below, kernel, bias, self.dense)
        return convolution.convolve(below, kernel, bias, self.stride, self.padding)

    def adjoint(self, above: Tensor, kernel: Tensor, size: tuple[int, int]) -> Tensor:
        """Wᵀ ⋆ `above`, on a map of `size`."""
        if self.dense:
            return dense.adjoint(above, kernel, size)
        return convolution.adjoint(above, kernel, size, self.stride, self.padding)

    def kernel_gradient(self, below: Tensor, above: Tensor, kernel: Tensor) -> Tensor:
        """∂⟨`above`, W ⋆ `below`⟩/∂W, summed over the batch, in the shape of `kernel`."""
        if self.dense:
            return dense.matrix_gradient(below, above)
        return convolution.kernel_gradient(below, above, kernel, self.stride, self.padding)


class Net(NamedTuple):
    """A net as the energy sees it: one coupling, effective kernel (out, in, k, k) and bias (out,) per layer.

    Effective kernels are functions of the parameters (weight standardisation, folded pooling); the chain rule from
    kernel to parameter is left to autograd. Layers count from 0 here: layer 0 couples x to s_1.

    `half` holds the kernels once more in a shorter dtype, if there is to be one, for the products whose rounding counts
    less than that of `drive`: those with differences of states, those that λ multiplies, and the contrast.
    """

    couplings: tuple[Coupling, ...]
    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    half: tuple[Tensor, ...] | None = None

    def drive(self, layer: int, below: Tensor) -> Drive:
        """P(W ⋆ `below`) + b."""
        out = self.couplings[layer].convolve(below, self.kernels[layer], self.biases[layer])
        return max_pool(out) if self.couplings[layer].max_pool else Drive(out)

    def push(self, layer: int, difference: Tensor) -> Tensor:
        """W ⋆ `difference`: by how much W ⋆ s moves with s."""
        kernel = self._short_kernel(layer)
        out = self.couplings[layer].convolve(difference.to(kernel.dtype), kernel)
        return out.to(self.kernels[layer].dtype)

    def feedback(self, layer: int, above: Tensor, below: Tensor) -> Tensor:
        """Wᵀ ⋆ `above`: the adjoint of the convolution, in the spatial size of `below` (odd sizes included)."""
        kernel = self._short_kernel(layer)
        out = self.couplings[layer].adjoint(above.to(kernel.dtype), kernel, (below.shape[-2], below.shape[-1]))
        return out.to(self.kernels[layer].dtype)

    def kernel_contrast(self, layer: int, below: Tensor, above: Tensor) -> Tensor:
        """`above` ⊗ `below` = ∂⟨above, W ⋆ below⟩/∂W, summed over the batch."""
        kernel = self._short_kernel(layer)
        out = self.couplings[layer].kernel_gradient(below.to(kernel.dtype), above.to(kernel.dtype), kernel)
        return out.to(self.kernels[layer].dtype)

    def _short_kernel(self, layer: int) -> Tensor:
        return (self.half or self.kernels)[layer]

    def written_out(self, size: tuple[int, int]) -> "Net":
        """The same net for images of `size` (height, width), with matrices for the kernels of its smallest maps.

        Differentiable, and the same again for a net that is written out already.
        """
        couplings, kernels = list(self.couplings), list(self.kernels)
        for layer, coupling in enumerate(couplings):
            upper, geometry = coupling.dense, (size, coupling.stride, coupling.padding)
            if upper is None and dense.is_small(size) and convolution.matrices_allowed():
                kernels[layer], upper = dense.matrix_of(kernels[layer], *geometry)
                couplings[layer] = replace(coupling, dense=upper)
            elif upper is None:
                upper = convolution.upper_size(kernels[layer], *geometry)
            size = (upper[0] // 2, upper[1] // 2) if coupling.max_pool else upper
        return self._replace(couplings=tuple(couplings), kernels=tuple(kernels))


def energy(net: Net, x: Tensor, states: tuple[Tensor, ...] | list[Tensor], feedback: float) -> Tensor:
    """E(s; x, θ) of each sample, shape (B,). For tests and diagnostics: the dynamics never evaluate it.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        states: s_1…s_N.
        feedback: λ > 0.
    """
    total = x.new_zeros(len(x))
    for layer, state in enumerate(states):
        drive = net.drive(layer, states[layer - 1] if layer else x).value
        weight = feedback ** (layer + 1 - len(states))
        total = total + weight * ((0.5 * state - drive) * state).flatten(1).sum(1)
    return total
