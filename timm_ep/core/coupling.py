"""How strongly the layers of a net are coupled, which decides whether and how fast it settles.

With t_l = λ^((l−N)/2) s_l the energy is

    E = Σ_l [½‖t_l‖² − ⟨t_l, √λ P_l(W_l ⋆ t_(l−1))⟩ − λ^((l−N)/2) ⟨b_l, t_l⟩]:

state for state, a net with feedback λ and kernels W is the λ = 1 net with kernels √λ W, whose states have the range
[0, λ^((l−N)/2)]. So no λ tells how recurrent a net is; the *coupling* c_l = √λ ‖P_l W_l‖, a spectral norm, does.

**A bound.** Where pooling is linear, the Hessian of E in t is the identity minus an operator with one block beside the
diagonal for each pair of layers that settle, of norm c_l, l = 2…N. Its own norm is at most max_l (c_l + c_(l+1)). So
with every c_l < 1/2 the energy is strictly convex and its equilibrium the only one, and a synchronous step takes any
state nearer to it by that factor at least. c_1 couples the image, which does not move, and has no part in it. The bound
is sufficient, not necessary: states that are clipped pass nothing on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_ep.core.energy import Net
from timm_ep.core.free_phase import feedforward_pass, relative_changes

__all__ = ["coupling_norms", "feedback_shares"]


@torch.no_grad()
def coupling_norms(net: Net, size: tuple[int, int], feedback: float, iterations: int = 30) -> list[float]:
    """c_l = √λ ‖P_l W_l‖ of every layer on images of `size`, by power iteration from a fixed random start.

    Stride, padding and average pooling are part of the operator. Max pooling, which is not linear, is left out: it
    hands on a part of the map, so that the norm of the convolution alone is an upper bound.

    Args:
        net: couplings, kernels and biases.
        size: height and width of the images.
        feedback: λ.
        iterations: products with P W and its adjoint each; 30 give about 1 %, from below.

    Returns:
        N numbers, the first that of the coupling to the image.
    """
    norms = []
    for layer, coupling in enumerate(net.couplings):
        kernel, generator = net.kernels[layer], torch.Generator().manual_seed(layer)
        below = torch.randn(1, kernel.shape[1], *size, generator=generator, device="cpu").to(kernel)
        norm = torch.zeros((), device=kernel.device)
        for _ in range(iterations):
            above = coupling.convolve(below / torch.linalg.vector_norm(below).clamp_min(1e-30), kernel)
            norm = torch.linalg.vector_norm(above)
            below = coupling.adjoint(above, kernel, size)
        norms.append(feedback**0.5 * float(norm))
        height, width = above.shape[-2:]
        size = (height // 2, width // 2) if coupling.max_pool else (height, width)
    return norms


@torch.no_grad()
def feedback_shares(net: Net, x: Tensor, states: Sequence[Tensor]) -> list[float]:
    """‖s_l* − s_l,ff‖ / ‖s_l*‖ of every layer: how far feedback moves the states from the feedforward pass.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        states: s_1*…s_N*, where they settle.
    """
    return [float(change) for change in relative_changes(states, feedforward_pass(net, x).states)]
