"""EP as an autograd function: forward settles, backward nudges.

The settled net returns all its states; autograd hands back g_l = ∂L/∂s_l at the free equilibrium for whatever loss was
put on them, with no path between layers; the nudged phase and the contrast of the two phases turn these into

    dL/dθ = lim_(β→0) (1/β) [∂E/∂θ(s^β) − ∂E/∂θ(s^0)]        (Scellier & Bengio 2017, theorem 1).

With the exact difference of the two phases, in the coordinates of `timm_ep.core.nudged_phase`, and no rounding of a
small nudge:

    dL/dW_l = −[d_l ⊗ (s_(l−1) + δ_(l−1)) + λ s_l ⊗ d_(l−1)],   dL/db_l = −Σ d_l,   dL/dx = −W_1ᵀ ⋆ d_1.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor

from timm_ep.core.convolution import convolutions_only
from timm_ep.core.device import as_built, device_free_phase, device_nudged_phase
from timm_ep.core.energy import Coupling, Drive, Net
from timm_ep.core.free_phase import Clipped, FreePhase, feedforward_pass, free_phase
from timm_ep.core.nudged_phase import (
    NudgedPhase,
    force_gains,
    nudged_phase,
    nudging_strengths,
    routed_difference,
    warn_of_unreached,
)
from timm_ep.core.recording import recording, transformed, vectorised
from timm_ep.core.settings import PHYSICAL, Settings


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

    Raises:
        TypeError: `x` is a name of torch.fx.
    """
    if isinstance(x, torch.fx.Proxy):  # timm's tracer stops before
        raise TypeError(
            "torch.fx cannot follow states that settle. For features create the model with features_only=True, or take "
            "model.equilibrium(x), the states of all layers."
        )
    if recording():
        return _recorded(net, x, settings)
    with convolutions_only() if settings.physical else nullcontext():  # a weight of a device stands for itself
        net, x = prepared(net, x)
    with no_autocast(x.device.type):
        if settings.gradient == "ep":
            # Asked here: inside, autograd is off.
            learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *net.kernels, *net.biases))
            return _Equilibrium.apply(settings, learns, net.couplings, x, *net.kernels, *net.biases)
        if not settings.settles:
            return tuple(feedforward_pass(net, x, recompute, local=settings.gradient == "local").states)
        return tuple(free_phase(net, x, settings, recompute=recompute).states)


def _recorded(net: Net, x: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """The states as plain operations for a batch of any size, detached: autograd through them would be BPTT, not EP."""
    if settings.tol > 0 and settings.settles:
        raise ValueError(
            f"tol={settings.tol} stops the sweeps when the images have settled; what is exported runs a fixed number "
            "of sweeps. Set tol=0, and free_sweeps to their number (timm-ep export --sweeps)."
        )
    if settings.physical and settings.settles:
        disturbances = ", ".join(f"{name}={getattr(settings, name)}" for name in PHYSICAL if getattr(settings, name))
        raise ValueError(
            f"What is exported is the ideal net, without the device that {disturbances} make of it; set them to 0 to "
            "export that."
        )
    with convolutions_only():  # which products are computed as matrices depends on the size of the batch
        net, x = prepared(net, x)
        if not settings.settles:
            states = feedforward_pass(net, x).states
        else:
            if settings.gradient == "ep":
                net = with_short_products(net, settings)
            states = free_phase(net, x, settings, states_only=True).states
    return tuple(state.detach() for state in states)


def prepared(net: Net, x: Tensor) -> tuple[Net, Tensor]:
    """Net and input as they settle: in the dtype of autocast where it is on, else that of the kernels; in channels-last
    format; and with the kernels of small maps written out as matrices."""
    device = x.device.type
    dtype = autocast_dtype(device) or net.kernels[0].dtype
    with no_autocast(device):
        kernels, biases = (tuple(tensor.to(dtype) for tensor in tensors) for tensors in (net.kernels, net.biases))
        net = Net(net.couplings, kernels, biases).written_out((x.shape[-2], x.shape[-1]))
        # Settling repeats convolutions and their adjoints on the same maps: this is the faster format for both.
        # (Under `vmap` a tensor has no format.)
        layout = torch.preserve_format if transformed() else torch.channels_last
        kernels = tuple(k if k.dim() == 2 else k.to(memory_format=layout) for k in net.kernels)
        return net._replace(kernels=kernels), x.to(dtype=dtype, memory_format=layout)


def with_short_products(net: Net, settings: Settings) -> Net:
    """The net with kernels in the dtype of `settings.products`, unless they are as short already."""
    dtype = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.products]
    if dtype is None or net.kernels[0].element_size() <= dtype.itemsize:
        return net
    return net._replace(half=tuple(kernel.to(dtype) for kernel in net.kernels))


def autocast_dtype(device: str) -> torch.dtype | None:
    """That of autocast on a kind of device; None where it is off, or not to be had, as on the meta device."""
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else None


def no_autocast(device: str) -> AbstractContextManager[None]:
    """Autocast off, where it is on."""
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext()


def refuse_forward_mode() -> NoReturn:
    """To be called where a tangent would have to pass through an equilibrium.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "EP runs backwards, from a loss; forward-mode derivatives (forward_ad, jvp) do not pass through it. Set "
        "model.gradient = 'bptt' for those."
    )


def refuse_second_derivatives() -> None:
    """To be called in a `backward` whose result is an estimate, not a function with a derivative of its own.

    torch's `once_differentiable` speaks up only where its own result is differentiated: a penalty on gradients, or a
    second-order optimizer, would get the share of the read-out, which lies outside, as if it were all.

    Raises:
        NotImplementedError: a graph of the gradient is asked for.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "EP estimates first derivatives; of create_graph=True (a penalty on gradients, a second-order optimizer) "
            "it knows nothing. Set model.gradient = 'bptt' for those."
        )


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, learns: bool, couplings: tuple[Coupling, ...], x: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        depth = len(couplings)
        net = with_short_products(Net(couplings, params[:depth], params[depth:]), settings)
        ctx.settings, ctx.couplings = settings, couplings
        ctx.set_materialize_grads(False)
        if settings.physical:
            if learns and not settings.feedback:
                raise ValueError(
                    "feedback=0 sends nothing down, and what a device reads of its layers is noise alone; give λ > 0, "
                    "or gradient='backprop' for the twin without feedback."
                )
            net = as_built(net, settings)
            states = device_free_phase(net, x, settings)
            ctx.save_for_backward(x, *net.kernels, *net.biases, *states)
            return tuple(states)
        free = free_phase(net, x, settings, states_only=not learns)
        # Only max pooling reads the drives of the free phase again, for their winners.
        drives = [
            (free.newest_drive(net, layer) if coupling.max_pool and learns else _NO_DRIVE)
            for layer, coupling in enumerate(couplings)
        ]
        # The states follow from the pre-activations, and most of them nobody else keeps.
        ctx.save_for_backward(x, *params, *free.preactivations, *chain.from_iterable(drives))
        return tuple(free.states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        if any(grad is not None and vectorised(grad) for grad in grads):
            raise NotImplementedError(
                "EP takes one gradient at a time, not many as one (is_grads_batched=True, vectorize=True). Take them "
                "in turn, or set model.gradient = 'bptt'."
            )
        depth = len(ctx.couplings)
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors
        kernels, biases, preactivations = (saved[i * depth : (i + 1) * depth] for i in range(3))
        if ctx.settings.physical:
            net = Net(ctx.couplings, tuple(kernels), tuple(biases))
            with no_autocast(x.device.type):
                gradients = device_gradient(net, x, preactivations, grads, ctx.settings, ctx.needs_input_grad[3:])
            return (None, None, None, *gradients)
        triples = (saved[3 * depth + i :: 3] for i in range(3))
        drives = [None if value is None else Drive(value, *winners) for value, *winners in zip(*triples, strict=True)]
        net = with_short_products(Net(ctx.couplings, tuple(kernels), tuple(biases)), ctx.settings)
        free = FreePhase.at(Clipped(preactivations), preactivations, drives)
        with no_autocast(x.device.type):
            return (None, None, None, *ep_gradient(net, x, free, grads, ctx.settings, ctx.needs_input_grad[3:]))


_NO_DRIVE: tuple[None, None, None] = (None, None, None)


def normalised_forces(
    grads: Sequence[Tensor | None], gains: Sequence[float] | None = None
) -> tuple[list[Tensor | None], Tensor]:
    """∂L/∂s_l of each sample over its largest magnitude, in channels-last format, and these magnitudes.

    Each sample by its own, so that what is estimated of it does not depend on the samples beside it.

    Args:
        grads: ∂L/∂s_l, (B, out_l, H_l, W_l), or None.
        gains: what multiplies the magnitudes of each layer before the largest is found; 1 by default.

    Returns:
        the forces, and the magnitudes, (B, 1, 1, 1): 0 where all forces are.
    """
    factors = [1.0] * len(grads) if gains is None else gains
    magnitudes = [
        g.abs().amax((1, 2, 3), keepdim=True) * gain for g, gain in zip(grads, factors, strict=True) if g is not None
    ]
    largest = torch.stack(magnitudes).amax(0)
    scales = _or_one(largest)
    forces = [
        None if g is None else (g / scales.to(g.dtype)).contiguous(memory_format=torch.channels_last) for g in grads
    ]
    return forces, largest


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def ep_gradient(
    net: Net,
    x: Tensor,
    free: FreePhase,
    grads: tuple[Tensor | None, ...],
    settings: Settings,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of a loss on the states, from the free and the nudged phase.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        free: the free equilibrium.
        grads: ∂L/∂s_l at the free equilibrium, N tensors or None. Any scale: those of each sample are normalised by
            their largest magnitude. So the result is linear in them, zero gives zero, and a sample's gradient does not
            depend on the samples beside it (but for the number of sweeps, where `tol` decides it for the batch): a
            batch gives the same in parts (ranks, accumulation) as in one.
        settings: see `Settings`.
        needed: whether the gradient is wanted for x, for each kernel, for each bias.

    Returns:
        dL/dx, dL/dW_1…dL/dW_N, dL/db_1…dL/db_N; None where not needed.
    """

    def phases(forces: Sequence[Tensor | None], beta: float) -> tuple[FreePhase, NudgedPhase]:
        return free, nudged_phase(net, free, forces, settings, beta)

    return _estimated(net, x, normalised_forces(grads), settings, needed, phases)


def device_gradient(
    net: Net,
    x: Tensor,
    states: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    settings: Settings,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """As `ep_gradient`, of a device: from its weights as they were written and its free states as they were read, and a
    nudged phase of its own."""

    def phases(forces: Sequence[Tensor | None], beta: float) -> tuple[FreePhase, NudgedPhase]:
        return device_nudged_phase(net, x, states, forces, settings, beta)

    # What limits a device is the largest push on a pre-activation, not the largest force.
    gains = force_gains(settings.feedback, len(grads))
    return _estimated(net, x, normalised_forces(grads, gains), settings, needed, phases)


def layers_needed(needed: Sequence[bool], depth: int) -> list[bool]:
    """Whether a gradient is wanted of each layer, or with the first of the input; from those of `ep_gradient`."""
    kernels, biases = needed[1 : depth + 1], needed[depth + 1 : 2 * depth + 1]
    learns = [kernel or bias for kernel, bias in zip(kernels, biases, strict=True)]
    return [learns[0] or needed[0], *learns[1:]]


def _estimated(
    net: Net,
    x: Tensor,
    normalised: tuple[list[Tensor | None], Tensor],
    settings: Settings,
    needed: Sequence[bool],
    phases: Callable[[Sequence[Tensor | None], float], tuple[FreePhase, NudgedPhase]],
) -> list[Tensor | None]:
    """The contrast of the two `phases` under normalised forces and each β, at the scale of the forces."""
    forces, magnitudes = normalised
    depth = len(forces)
    warn_of_unreached([force is not None for force in forces], layers_needed(needed, depth), settings)
    scale = _or_one(magnitudes.amax())
    weights = (magnitudes / scale).to(x.dtype)
    estimates = [
        contrast(net, x, *phases(forces, beta), settings.feedback, needed, weights)  # a phase is let go before the next
        for beta in nudging_strengths(settings)
    ]
    return [None if gradient is None else gradient.mul_(scale) for gradient in averaged(estimates)]


def averaged(estimates: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The mean over the nudged phases of each gradient; that of a single one as it is."""
    return [
        None if first is None else sum(others, first) / len(estimates) if others else first
        for first, *others in zip(*estimates, strict=True)
    ]


def contrast(
    net: Net,
    x: Tensor,
    free: FreePhase,
    nudged: NudgedPhase,
    feedback: float,
    needed: Sequence[bool],
    weights: Tensor | float = 1.0,
) -> list[Tensor | None]:
    """(1/β) [∂E(s + δ) − ∂E(s)] for x, every kernel and every bias, the samples weighted by `weights`, (B, 1, 1, 1).

    Local: that of W_l reads the two phases' states of the layers l−1 and l, that of b_l those of layer l, and no more.
    """
    depth = len(free.states)
    needs_x, needs_kernel, needs_bias = needed[0], needed[1 : depth + 1], needed[depth + 1 :]
    # The energy has the products with a minus; here it costs nothing.
    minus = -torch.as_tensor(weights, dtype=x.dtype, device=x.device)
    x_grad = torch.zeros_like(x) if needs_x else None
    kernel_grads: list[Tensor | None] = [None] * depth
    bias_grads: list[Tensor | None] = [None] * depth
    nudged_below = [x * minus]  # handed on from layer to layer, to be freed in time: it may be the largest map of all
    for layer in range(depth):
        delta, below_delta = nudged.deltas[layer], nudged.deltas[layer - 1] if layer else None
        difference, total = routed_difference(layer, free, nudged), None
        if needs_bias[layer]:
            summed = None if delta is None else (delta.sum((2, 3), keepdim=True) * minus).sum((0, 2, 3))
            bias_grads[layer] = torch.zeros_like(net.biases[layer]) if summed is None else summed
        if x_grad is not None and layer == 0 and difference is not None:
            x_grad = net.feedback(0, difference, x) * minus
        if needs_kernel[layer] and difference is not None:
            total = net.kernel_contrast(layer, nudged_below[0], difference)
        nudged_below.clear()
        kept = free.kept_state(layer)  # else the state is computed when asked for, in a map of its own
        state = free.states[layer].mul_(minus) if kept is None else kept * minus
        if needs_kernel[layer]:
            if below_delta is not None and feedback:
                drive = free.drives[layer]
                change = net.kernel_contrast(layer, below_delta, drive.route(state) if drive else state)
                total = change.mul_(feedback) if total is None else total.add_(change, alpha=feedback)
            kernel_grads[layer] = torch.zeros_like(net.kernels[layer]) if total is None else total
        # The nudged state, so that both terms make the whole difference.
        nudged_below.append(state if delta is None else state.addcmul_(delta, minus, value=1 / nudged.scales[layer]))
    return [x_grad, *kernel_grads, *bias_grads]
