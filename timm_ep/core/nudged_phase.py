"""How states settle under the force of a loss.

The nudged phase adds the force −β λ^(N−l) ∂L/∂s_l to the pre-activation u_l and integrates the *difference* δ_l from
the free equilibrium itself, in coordinates δ_l = β λ^(N−l) d_l in which feedback has gain 1, feedforward has gain λ and
the force is −∂L/∂s_l, whatever β, λ and depth: no small number is ever the difference of two large ones, and none
underflows.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_ep.core.energy import Drive, Net, max_pool
from timm_ep.core.free_phase import FreePhase, Trace, relative_changes
from timm_ep.core.recording import has_values
from timm_ep.core.schedule import Visit, arrivals, schedule
from timm_ep.core.settings import Settings


class NudgedPhase(NamedTuple):
    """Where the nudged phase is: per layer d_l = δ_l / (β λ^(N−l)) (None: not reached), the drive at s + δ, and the
    coordinate's scale 1/(β λ^(N−l))."""

    deltas: list[Tensor | None]
    drives: list[Drive | None]
    scales: list[float]


Forces = Callable[[list[Tensor]], Sequence[Tensor | None]]
"""g_l of every layer as a function of the states s_1…s_N."""


def nudging_strengths(settings: Settings) -> tuple[float, ...]:
    """The β of each nudged phase of a batch; `random-sign` draws from torch's generator."""
    if settings.nudging == "centered":
        return (settings.beta, -settings.beta)
    if settings.nudging == "random-sign" and torch.rand(()).item() < 0.5:
        return (-settings.beta,)
    return (settings.beta,)


def force_gains(feedback: float, depth: int) -> list[float]:
    """λ^(N−l) of each of N layers: what multiplies a force on the state at its pre-activation."""
    return [feedback ** (depth - layer) for layer in range(1, depth + 1)]


def coordinate_scales(feedback: float, beta: float, depth: int, dtype: torch.dtype) -> list[float]:
    """1/(β λ^(N−l)) of each layer: multiplies a state's difference into the nudged phase's coordinates.

    Limited to the square root of the dtype's range. It only scales the distance of a state from its bounds, which is
    practically infinite there, so that λ = 0 needs no case of its own.
    """
    limit = torch.finfo(dtype).max ** 0.5
    gains = [beta * gain for gain in force_gains(feedback, depth)]
    return [min(max(1 / gain, -limit), limit) if gain else math.copysign(limit, beta) for gain in gains]


def nudged_phase(
    net: Net,
    free: FreePhase,
    forces: Sequence[Tensor | None] | Forces,
    settings: Settings,
    beta: float,
    trace: Trace | None = None,
    watch: Callable[[NudgedPhase], None] | None = None,
) -> NudgedPhase:
    """Settle from the free equilibrium under the forces −β λ^(N−l) g_l.

        d_l ← clip(c e_l + W_(l+1)ᵀ ⋆ d_(l+1) + λ W_l ⋆ d_(l−1) − g_l, −c s_l, c (1 − s_l)),   c = 1/(β λ^(N−l)),

    with e_l = u_l − s_l the distance by which a saturated state is held. Under max pooling the winners stay those of
    the free phase where forces are frozen (`Settings.forces`). Where they are live, winners are those of s + δ, and the
    drive's difference is that of the winners plus that of the values, free of cancellation where the winners stay.

    Args:
        net: as in the free phase.
        free: where the free phase ended; under max pooling with the drives at its states.
        forces: g_l per layer (None: none), in the shape of the states; frozen if tensors, and live if a function: then
            they are those of the states at the start of each sweep. A loss that is a sum over the layers pulls a layer
            by its own state only, so that this is the newest force in every order of update.
        settings: the sweeps, their order and λ.
        beta: nudging strength, with sign.
        trace: receives the relative change of every d_l in each sweep.
        watch: receives the phase after each sweep; it moves on, so take what is to be kept.

    Returns:
        d_l and drives per layer. Zero forces give None or exact zeros.
    """
    depth = len(free.states)
    scales = coordinate_scales(settings.feedback, beta, depth, free.preactivations[0].dtype)
    phase = NudgedPhase([None] * depth, list(free.drives), scales)
    rises: list[Tensor | None] = [None] * depth  # what comes from below,
    falls: list[Tensor | None] = [None] * depth  # and from above, as long as the neighbour has not moved
    sweeps = range(settings.nudged_sweeps)
    for step, sweep in zip(sweeps, schedule(settings.update, depth, sweeps), strict=True):
        # As in the free phase: both directions together tell; and the last sweep ends the phase in any case.
        judges = settings.tol > 0 and (settings.update != "sweep" or step % 2 == 1) and step + 1 < len(sweeps)
        judges = judges and has_values(free.preactivations[0])
        before = list(phase.deltas) if trace or judges else []
        pulls = forces(nudged_states(free, phase)) if callable(forces) else forces
        for group in sweep:
            for layer, *_ in group:
                if rises[layer] is None and settings.feedback:
                    rises[layer] = _rise(net, layer, free, phase, settings)
            for layer, *_ in group:
                if falls[layer] is None:
                    falls[layer] = _fall(net, layer, free, phase)
            for visit in group:
                phase.deltas[visit.layer] = _held_sum(visit, rises, falls, pulls[visit.layer], free, scales)
            for layer, *_ in group:
                if layer:
                    falls[layer - 1] = None
                if layer + 1 < depth:
                    rises[layer + 1] = None
        if watch:
            watch(phase)
        if trace or judges:
            changes = _delta_changes(phase.deltas, before, free.preactivations[0])
            if trace:
                trace(changes)
            if judges and torch.stack(changes).max() < settings.tol:
                break
    return phase


def warn_of_unreached(forced: Sequence[bool], learns: Sequence[bool], settings: Settings) -> None:
    """Layers that no force from above reaches get no gradient, which is not to happen in silence.

    Args:
        forced: whether there is a force on each layer.
        learns: whether a gradient is wanted of each layer.
        settings: the sweeps and their order.
    """
    earliest: dict[int, int] = {}  # of all the forces above a layer
    for source in (layer for layer, has_force in enumerate(forced) if has_force):
        for layer, sweeps in enumerate(arrivals(settings.update, len(forced), source)):
            earliest[layer] = min(sweeps, earliest.get(layer, sweeps))
    needed = [sweeps for layer, sweeps in earliest.items() if learns[layer] and sweeps > settings.nudged_sweeps]
    if needed:
        warnings.warn(
            f"The nudge does not reach {len(needed)} of {len(forced)} layers, whose gradient is missing. With "
            f"update={settings.update!r} it moves by a layer or two a sweep; raise nudged_sweeps="
            f"{settings.nudged_sweeps} to {max(needed)} or more, or nudge every layer by an error signal.",
            stacklevel=2,
        )


def nudged_states(free: FreePhase, phase: NudgedPhase) -> list[Tensor]:
    """s + δ of every layer."""
    return [
        state if delta is None else torch.add(state, delta, alpha=1 / scale)
        for state, delta, scale in zip(free.states, phase.deltas, phase.scales, strict=True)
    ]


def newest_winners(net: Net, free: FreePhase, phase: NudgedPhase, settings: Settings) -> NudgedPhase:
    """The phase with the max-pooling winners of its last states, not of those that its last sweep started from.

    Where forces are frozen, so are winners, and it stays as it is.
    """
    if settings.forces == "frozen":
        return phase
    newest = phase._replace(drives=list(phase.drives))
    for layer, coupling in enumerate(net.couplings):
        if coupling.max_pool:
            _rise(net, layer, free, newest, settings)
    return newest


def _held_sum(
    visit: Visit,
    rises: list[Tensor | None],
    falls: list[Tensor | None],
    force: Tensor | None,
    free: FreePhase,
    scales: Sequence[float],
) -> Tensor | None:
    """clip(c e + Σ pulls − g, −c s, c (1 − s)) of the visited layer; None if there is nothing that pulls.

    The order of the sum keeps it exact: e = u − s is exactly 0 where the state is not saturated.
    """
    layer, spare = visit.layer, None
    rise, fall, scale = rises[layer], falls[layer], scales[layer]
    if visit.drive_spent:
        rises[layer], spare = None, rise
    if visit.feedback_spent and fall is not None:
        falls[layer], spare = None, fall
    pulls = [pull for pull in (rise, fall) if pull is not None]
    if not pulls and force is None:
        return None
    preactivation, state = free.preactivations[layer], free.kept_state(layer)
    result = torch.empty_like(preactivation) if spare is None else spare
    given = [tensor for tensor in (state, *pulls, force) if tensor is not None]
    # One bound after the other: of which is which, the sign of β decides.
    hold, hold_other = (torch.maximum, torch.minimum) if scale > 0 else (torch.minimum, torch.maximum)
    for held, u, *rest in _pieces(result, preactivation, *given):
        s = u.clamp(0, 1) if state is None else rest.pop(0)
        total, edge = u - s, s * -scale
        if pulls:
            torch.add(rest.pop(0), total, alpha=scale, out=total)
        else:
            total.mul_(scale)
        if len(pulls) > 1:
            total.add_(rest.pop(0))
        if force is not None:
            total.sub_(rest.pop(0))
        hold(total, edge, out=total)
        hold_other(total, edge.add_(scale), out=held)
    return result


# Elements: a cache of 2 MB per core holds a piece and what is computed on the way. 2¹⁶ is as fast, 2¹⁸ slower.
_PIECE = 2**17


def _pieces(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of all maps, so small that what is computed between the operations of a long sum stays in the
    cache. As a new map it would cost a CPU several times as much as the operation. Small maps, and those on other
    devices, go as a whole.
    """
    first = maps[0]
    if (
        first.device.type == "cpu"
        and first.numel() > 2 * _PIECE
        and all(one.is_contiguous(memory_format=torch.channels_last) for one in maps)
    ):
        yield from zip(*(one.permute(0, 2, 3, 1).view(-1).split(_PIECE) for one in maps), strict=True)
    else:
        yield maps


def _rise(net: Net, layer: int, free: FreePhase, phase: NudgedPhase, settings: Settings) -> Tensor | None:
    """c_l [P(W ⋆ (s + δ)) − P(W ⋆ s)] for the δ of the layer below; where winners move it also updates the drive."""
    below = phase.deltas[layer - 1] if layer else None
    if below is None:
        return None
    at_rest, change = free.drives[layer], net.push(layer, below)
    if at_rest is None or at_rest.unpooled is None:
        return change.mul_(settings.feedback)
    if settings.forces == "frozen":
        return at_rest.at_winners(change).mul_(settings.feedback)
    drive = max_pool(torch.add(at_rest.unpooled, change, alpha=1 / phase.scales[layer - 1]))
    phase.drives[layer] = drive
    moved = drive.at_winners(at_rest.unpooled) - at_rest.value
    return moved.mul_(phase.scales[layer]).add_(drive.at_winners(change), alpha=settings.feedback)


def _fall(net: Net, layer: int, free: FreePhase, phase: NudgedPhase) -> Tensor | None:
    """c_l λ Wᵀ ⋆ [P'ᵀ(s + δ) − Pᵀ s] for the δ of the layer above."""
    if layer + 1 == len(free.states):
        return None
    difference = routed_difference(layer + 1, free, phase)
    return None if difference is None else net.feedback(layer + 1, difference, free.preactivations[layer])


def routed_difference(layer: int, free: FreePhase, phase: NudgedPhase) -> Tensor | None:
    """c_l [P'ᵀ(s_l + δ_l) − Pᵀ s_l]: the layer's difference as its convolution sees it; d_l where pooling is linear."""
    delta, at_rest, nudged = phase.deltas[layer], free.drives[layer], phase.drives[layer]
    if delta is None or at_rest is None or nudged is None or nudged.winners is None:
        return delta
    if nudged is at_rest:  # no winner has moved, and with them no state
        return at_rest.route(delta)
    state = free.states[layer]
    moved = nudged.route(state) - at_rest.route(state)
    return nudged.route(delta).add_(moved, alpha=phase.scales[layer])


def _delta_changes(new: Sequence[Tensor | None], old: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    nothing = like.new_zeros(1)  # a layer that the nudge has not reached
    reached, before = ([nothing if delta is None else delta for delta in deltas] for deltas in (new, old))
    return relative_changes(reached, before)
