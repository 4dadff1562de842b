"""EP as an autograd function: forward settles, backward nudges.

The settled net returns all its states; autograd hands back g_l = ∂L/∂s_l at the free equilibrium for whatever loss was
put on them, with no path between layers; the nudged phase and the contrast of the two phases turn these into

    dL/dθ = lim_(β→0) (1/β) [∂E/∂θ(s^β) − ∂E/∂θ(s^0)]        (Scellier & Bengio 2017, theorem 1).

With the exact difference of the two phases, in the coordinates of `timm_ep.dynamics`, and no rounding of a small nudge:

    dL/dW_l = −[d_l ⊗ (s_(l−1) + ½δ_(l−1)) + λ (s_l + ½δ_l) ⊗ d_(l−1)],   dL/db_l = −Σ d_l,   dL/dx = −W_1ᵀ ⋆ d_1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from timm_ep.dynamics import (
    FreePhase,
    NudgedPhase,
    Settings,
    coordinate_scales,
    feedforward_pass,
    free_phase,
    nudged_phase,
    routed_difference,
)
from timm_ep.energy import Coupling, Drive, Net


@torch.compiler.disable
def equilibrium(net: Net, x: Tensor, settings: Settings, recompute: bool = False) -> tuple[Tensor, ...]:
    """The states s_1…s_N at the free equilibrium, differentiable as `settings.gradient` says.

    Settles in one dtype: that of autocast where it is on, else that of the kernels. Autocast is off inside.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        settings: see `Settings`.
        recompute: for `bptt` and `backprop`, trade time for memory. EP keeps no graph and has nothing to trade.

    Returns:
        N tensors (B, out_l, H_l, W_l) with values in [0, 1], in channels-last memory format.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else net.kernels[0].dtype
    # Settling repeats convolutions and their adjoints on the same maps: channels-last is the faster format for both.
    x, *kernels = (t.to(dtype=dtype, memory_format=torch.channels_last) for t in (x, *net.kernels))
    biases = tuple(bias.to(dtype) for bias in net.biases)
    with torch.autocast(device, enabled=False):
        if settings.gradient == "ep":
            return _Equilibrium.apply(settings, net.couplings, x, *kernels, *biases)
        net = Net(net.couplings, tuple(kernels), biases)
        if settings.gradient == "backprop":
            return tuple(feedforward_pass(net, x, recompute).states)
        return tuple(free_phase(net, x, settings, recompute=recompute).states)


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, couplings: tuple[Coupling, ...], x: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        depth = len(couplings)
        free = free_phase(Net(couplings, params[:depth], params[depth:]), x, settings)
        ctx.settings, ctx.couplings = settings, couplings
        ctx.set_materialize_grads(False)
        # Only max pooling reads the drives of the free phase again.
        drives = [d if c.max_pool else None for d, c in zip(free.drives, couplings, strict=True)]
        ctx.save_for_backward(
            x, *params, *free.states, *free.preactivations, *(t for d in drives for t in d or (None,) * 3)
        )
        return tuple(free.states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        depth = len(ctx.couplings)
        x, *saved = ctx.saved_tensors
        kernels, biases, states, preactivations = (tuple(saved[i * depth : (i + 1) * depth]) for i in range(4))
        triples = zip(*[iter(saved[4 * depth :])] * 3, strict=True)
        drives = [None if value is None else Drive(value, winners, unpooled) for value, winners, unpooled in triples]
        net = Net(ctx.couplings, kernels, biases)
        free = FreePhase(list(states), list(preactivations), drives)
        with torch.autocast(x.device.type, enabled=False):
            return (None, None, *ep_gradient(net, x, free, grads, ctx.settings, ctx.needs_input_grad[2:]))


def ep_gradient(
    net: Net,
    x: Tensor,
    free: FreePhase,
    grads: tuple[Tensor | None, ...],
    settings: Settings,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradient of a loss on the states, from the free and the nudged phase.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        free: the free equilibrium.
        grads: ∂L/∂s_l at the free equilibrium, N tensors or None. Any scale: they are normalised by their largest
            magnitude, so the result is linear in them, and zero gives zero.
        settings: see `Settings`.
        needed: whether the gradient is wanted for x, for each kernel, for each bias.

    Returns:
        dL/dx, dL/dW_1…dL/dW_N, dL/db_1…dL/db_N; None where not needed.
    """
    largest = torch.stack([g.abs().amax().float() for g in grads if g is not None]).amax()
    scale = torch.where(largest == 0, torch.ones_like(largest), largest)
    forces = [
        None if g is None else (g / scale.to(g.dtype)).contiguous(memory_format=torch.channels_last) for g in grads
    ]
    betas = (settings.beta,) if settings.nudging == "one-sided" else (settings.beta, -settings.beta)
    estimates = [
        _contrast(net, x, free, nudged_phase(net, free, forces, settings, beta), settings, beta, needed)
        for beta in betas
    ]
    return [
        None if parts[0] is None else torch.stack(parts).mean(0).mul_(scale.to(parts[0].dtype))
        for parts in zip(*estimates, strict=True)
    ]


def _contrast(
    net: Net,
    x: Tensor,
    free: FreePhase,
    nudged: NudgedPhase,
    settings: Settings,
    beta: float,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """(1/β) [∂E(s + δ) − ∂E(s)] for x, every kernel and every bias."""
    depth = len(free.states)
    scales = coordinate_scales(settings, beta, depth, x.dtype)
    x_grad: Tensor | None = None
    kernel_grads: list[Tensor | None] = [None] * depth
    bias_grads: list[Tensor | None] = [None] * depth
    for layer, (coupling, kernel) in enumerate(zip(net.couplings, net.kernels, strict=True)):
        delta = nudged.deltas[layer]
        below = nudged.deltas[layer - 1] if layer else None
        below_state = free.states[layer - 1] if layer else x
        difference = None
        if delta is not None:
            difference = routed_difference(net, layer, free, nudged.deltas, nudged.drives, scales)
            if needed[1 + depth + layer]:
                bias_grads[layer] = -delta.sum((0, 2, 3))
            if layer == 0 and needed[0]:
                x_grad = -coupling.feedback(kernel, difference, x.shape)
        if needed[1 + layer]:
            pairs = []
            if difference is not None:
                middle = below_state if below is None else torch.add(below_state, below, alpha=0.5 / scales[layer - 1])
                pairs.append((middle, difference))
            if below is not None and settings.feedback:
                state = (
                    free.states[layer]
                    if free.drives[layer] is None
                    else coupling.unpool(free.states[layer], free.drives[layer])
                )
                middle = state if difference is None else torch.add(state, difference, alpha=0.5 / scales[layer])
                pairs.append((below, settings.feedback * middle))
            for low, high in pairs:
                part = coupling.kernel_contrast(kernel, low, high)
                kernel_grads[layer] = part if kernel_grads[layer] is None else kernel_grads[layer].add_(part)
            kernel_grads[layer] = kernel_grads[layer].neg_() if pairs else torch.zeros_like(kernel)
        if delta is None and needed[1 + depth + layer]:
            bias_grads[layer] = torch.zeros_like(net.biases[layer])
    if needed[0] and x_grad is None:
        x_grad = torch.zeros_like(x)
    return [x_grad, *kernel_grads, *bias_grads]
