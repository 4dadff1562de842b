"""EP on a physical device: finite nudges, noise, few bits, and feedback that is not quite symmetric.

On a chip no nudge is 1e-6 and no state has 24 bits. The two phases are settled independently and their states are read
and subtracted, so what a nudge does must be larger than the noise of the reading. Everything here is off by default,
and then none of it runs.

    u_l = P_l(W_l ⋆ s_(l−1)) + b_l + λ · B_(l+1)ᵀ ⋆ P_(l+1)ᵀ s_(l+1) − β λ^(N−l) g_l,    B = W · (1 + m · ξ)
    s_l ← Q(clip(u_l + (n_u + r_u |u_l|) ξ, 0, 1) + (n_s + r_s s_l) ξ)

with ξ standard normal, anew at every update or, as mismatch between devices, always the same; m is the mismatch of the
feedback weights, n and r are absolute and relative standard deviations, Q rounds to a number of levels. Updates follow
`timm_ep.core.schedule`, as many as `free_sweeps` and `nudged_sweeps` allow: the time a device has to settle.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_ep.core.energy import Drive, Net
from timm_ep.core.free_phase import FreePhase, feedforward_pass
from timm_ep.core.nudged_phase import NudgedPhase, coordinate_scales, force_gains
from timm_ep.core.schedule import schedule
from timm_ep.core.settings import Settings

__all__ = ["as_built", "device_free_phase", "device_nudged_phase"]


def _noise(settings: Settings, like: Tensor, place: int) -> Tensor:
    """ξ of a layer's pre-activations or states: new numbers at each call, or the same ones of that place."""
    if settings.noise == "frozen":
        return _fixed((1, *like.shape[1:]), place).to(like)  # one for each neuron, the same for all images
    # In the order that states lie in memory: torch draws others, one by one, ten times as slowly.
    images, channels, height, width = like.shape
    ordered = torch.randn(images, height, width, channels, dtype=like.dtype, device=like.device)
    return ordered.permute(0, 3, 1, 2)


_MISMATCH = 1_000_000  # places of weights, beyond those of neurons


def _fixed(shape: Sequence[int], place: int) -> Tensor:
    """Standard normal numbers that belong to a place of the device: it was made once."""
    generator = torch.Generator().manual_seed(place)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def rounded(values: Tensor, bits: int, stochastic: bool, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Values in [low, high] to the nearest of 2^bits levels, evenly spaced over that range, or to one of the two beside
    it, the nearer the likelier."""
    steps = 2**bits - 1
    scaled = (values - low) / (high - low) * steps
    whole = (scaled + torch.rand_like(scaled)).floor() if stochastic else scaled.round()
    return whole.clamp(0, steps) / steps * (high - low) + low


def as_built(net: Net, settings: Settings) -> Net:
    """The net whose weights have been written to the device: once, for both phases."""
    if not settings.weight_bits:
        return net
    ranges = [kernel.abs().amax().clamp_min(torch.finfo(kernel.dtype).tiny) for kernel in net.kernels]
    kernels = (
        rounded(kernel, settings.weight_bits, settings.rounding == "stochastic", -top, top)
        for kernel, top in zip(net.kernels, ranges, strict=True)
    )
    return net._replace(kernels=tuple(kernels))


def _feedback_net(built: Net, settings: Settings) -> Net:
    """The net of the device's feedback weights."""
    if not settings.feedback_mismatch:
        return built
    back = []
    for layer, kernel in enumerate(built.kernels):
        spread = _fixed(kernel.shape, _MISMATCH + layer).to(kernel)
        back.append(kernel * (1 + settings.feedback_mismatch * spread))
    return built._replace(kernels=tuple(back))


def _settle(
    net: Net,
    x: Tensor,
    states: list[Tensor],
    settings: Settings,
    sweeps: range,
    started: bool | None,
    forces: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """From `states`, by as many sweeps; `forces` are β λ^(N−l) g_l."""
    back, top = _feedback_net(net, settings), len(states) - 1
    states = list(states)
    for sweep in schedule(settings.update, len(states), sweeps, started=started):
        for group in sweep:
            new = {}
            for layer, *_ in group:
                total = net.drive(layer, states[layer - 1] if layer else x).value
                if layer < top and settings.feedback:
                    above = states[layer + 1]
                    if net.couplings[layer + 1].max_pool:
                        above = net.drive(layer + 1, states[layer]).route(above)
                    total = total + settings.feedback * back.feedback(layer + 1, above, states[layer])
                if forces and (force := forces[layer]) is not None:
                    total = total - force
                new[layer] = _read(total, settings, layer)
            for layer, state in new.items():
                states[layer] = state
    return states


def _read(preactivation: Tensor, settings: Settings, layer: int) -> Tensor:
    """The state that the device comes to have, and shows, at a pre-activation."""
    u = preactivation
    if settings.drive_noise or settings.relative_drive_noise:
        u = u + (settings.drive_noise + settings.relative_drive_noise * u.abs()) * _noise(settings, u, 2 * layer)
    state = u.clamp(0, 1)
    if settings.state_noise or settings.relative_state_noise:
        spread = settings.state_noise + settings.relative_state_noise * state
        state = (state + spread * _noise(settings, state, 2 * layer + 1)).clamp(0, 1)
    if settings.state_bits:
        state = rounded(state, settings.state_bits, settings.rounding == "stochastic", 0.0, 1.0)
    return state


def device_free_phase(net: Net, x: Tensor, settings: Settings) -> list[Tensor]:
    """s_1…s_N of a net `as_built`, as they are read after the free phase."""
    states = list(feedforward_pass(net, x).states)
    if settings.start == "zero":
        states = [torch.zeros_like(state) for state in states]
    first = 1 if settings.start == "zero" else 0
    return _settle(net, x, states, settings, range(first, first + settings.free_sweeps), settings.start != "zero")


def device_nudged_phase(
    net: Net, x: Tensor, states: Sequence[Tensor], forces: Sequence[Tensor | None], settings: Settings, beta: float
) -> tuple[FreePhase, NudgedPhase]:
    """Both phases as the contrast takes them: the free states, and the difference of what is read in the two.

    The nudged phase goes on from the free states, with all that disturbs it; nothing is integrated as a difference.

    Args:
        net: couplings, kernels and biases, `as_built` for the free phase.
        x: input, (B, in, H, W).
        states: s_1…s_N as they were read after the free phase.
        forces: g_l per layer (None: none), scaled for each sample so that the largest λ^(N−l) |g_l| is 1.
        settings: see `Settings`.
        beta: nudging strength, with sign: the largest push on a pre-activation, in units of the states' range.
    """
    depth = len(states)
    pushes = [
        None if force is None else beta * gain * force
        for gain, force in zip(force_gains(settings.feedback, depth), forces, strict=True)
    ]
    nudged = _settle(net, x, list(states), settings, range(settings.nudged_sweeps), None, pushes)
    scales = coordinate_scales(settings.feedback, beta, depth, x.dtype)
    deltas: list[Tensor | None] = [
        (after - before) * scale for after, before, scale in zip(nudged, states, scales, strict=True)
    ]
    drives: list[list[Drive | None]] = [
        [
            net.drive(layer, phase[layer - 1] if layer else x) if coupling.max_pool else None
            for layer, coupling in enumerate(net.couplings)
        ]
        for phase in (states, nudged)
    ]
    free = FreePhase.at(list(states), list(states), drives[0])
    return free, NudgedPhase(deltas, drives[1], scales)
