"""How states settle: the free phase and the nudged phase.

A state at rest satisfies s_l = clip(u_l, 0, 1) with the pre-activation

    u_l = P_l(W_l ⋆ s_(l−1)) + b_l + λ · W_(l+1)ᵀ ⋆ P_(l+1)ᵀ s_(l+1).

The free phase iterates this. The nudged phase adds the force −β λ^(N−l) ∂L/∂s_l to u_l and integrates the *difference*
δ_l from the free equilibrium itself, in coordinates δ_l = β λ^(N−l) d_l in which feedback has gain 1, feedforward has
gain λ and the force is −∂L/∂s_l, whatever β, λ and depth: no small number is ever the difference of two large ones, and
none underflows.

Each layer needs two products, from the layer below and from the layer above. A product is computed again only once the
neighbour it came from has moved. Sweeps alternate their direction, so that one of the two is always still good: a sweep
costs one product per layer and carries news across the whole net.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timm_ep.energy import Drive, Net, max_pool
from timm_ep.settings import Settings

Trace = Callable[[list[Tensor]], None]
"""Called after each sweep with the relative change ‖Δs_l‖/‖s_l‖ of every layer, as scalar tensors."""


class Clipped(Sequence[Tensor]):
    """clip(u_l) of each layer, computed when asked for: states that take no memory of their own."""

    def __init__(self, preactivations: Sequence[Tensor]) -> None:
        self.preactivations = preactivations

    def __len__(self) -> int:
        return len(self.preactivations)

    def __getitem__(self, layer: Any) -> Any:
        return self.preactivations[layer].clamp(0, 1)


class FreePhase(NamedTuple):
    """Where the free phase is: per layer the state s_l, the pre-activation u_l with s_l = clip(u_l), and the products.

    Pre-activations are kept of the last sweep; before it s_l stands in their place, and costs no memory.

    A product is None once the neighbour it was computed from has moved. With a short dtype for differences the drive
    stays instead, and `moves` holds by how much s_l has moved since the drive of the layer above was computed.
    """

    states: Sequence[Tensor]
    preactivations: list[Tensor]
    drives: list[Drive | None]
    feedbacks: list[Tensor | None]
    moves: list[Tensor | None]

    def copy(self) -> "FreePhase":
        """The same tensors in lists of their own."""
        return FreePhase(
            list(self.states),
            list(self.preactivations),
            list(self.drives),
            list(self.feedbacks),
            list(self.moves),
        )

    def newest_drive(self, net: Net, layer: int) -> Drive:
        """The drive of a layer above the first (or the first's, which never moves) at the present states."""
        known, move = self.drives[layer], self.moves[layer - 1] if layer else None
        if known is None:
            known = net.drive(layer, self.states[layer - 1])
        elif move is not None:
            known = known.shifted(net.push(layer, move))
            self.moves[layer - 1] = None
        self.drives[layer] = known
        return known


class NudgedPhase(NamedTuple):
    """Where the nudged phase is: per layer d_l = δ_l / (β λ^(N−l)) (None: not reached), and the drive at s + δ."""

    deltas: list[Tensor | None]
    drives: list[Drive | None]


Forces = Callable[[list[Tensor]], Sequence[Tensor | None]]
"""g_l of every layer as a function of the states s_1…s_N."""


def update_groups(update: str, depth: int, sweep: int) -> list[list[int]]:
    """Which layers (from 0) move together, in order, in the given sweep; every sweep visits all layers once.

    Even sweeps go down and odd ones up, where the order matters.
    """
    if update == "synchronous":
        return [list(range(depth))]
    if update == "odd-even":
        return [list(range(0, depth, 2)), list(range(1, depth, 2))]
    upwards = [[layer] for layer in range(depth)]
    return upwards if sweep % 2 else upwards[::-1]


def feedforward_pass(net: Net, x: Tensor, recompute: bool = False) -> FreePhase:
    """The pass without feedback, s_l = clip(P(W_l ⋆ s_(l−1)) + b_l). With `recompute`, autograd stores only states."""

    def layer(index: int, below: Tensor) -> tuple[Tensor, Drive]:
        drive = net.drive(index, below)
        return drive.value.clamp(0, 1), drive

    run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
    states: list[Tensor] = []
    drives: list[Drive | None] = []
    for index in range(len(net.kernels)):
        state, drive = run(index, states[-1] if index else x)
        states.append(state)
        drives.append(drive)
    preactivations = [drive.value for drive in drives if drive]
    return FreePhase(states, preactivations, drives, [None] * len(states), [None] * len(states))


def _sweep(
    net: Net,
    phase: FreePhase,
    groups: list[list[int]],
    feedback: float,
    store: bool = True,
    last: bool = False,
) -> FreePhase:
    """One update of every layer in the groups. The phase itself moves on, so that old tensors are freed on the way.

    Args:
        net: couplings, kernels and biases.
        phase: where the last sweep ended.
        groups: of layers that move together.
        feedback: λ.
        store: keep the pre-activations.
        last: let go of the products, but for the winners of max pooling.
    """
    states, preactivations = cast("list[Tensor]", phase.states), phase.preactivations
    drives, feedbacks, moves = phase.drives, phase.feedbacks, phase.moves
    top = len(states) - 1
    in_place = not torch.is_grad_enabled()  # a new map costs as much as what is computed in it

    for group, following in zip(groups, [*groups[1:], []], strict=False):
        for layer in group:
            preactivations[layer] = phase.newest_drive(net, layer).value
            if layer < top and feedback:
                back = feedbacks[layer]
                if back is None:
                    above = states[layer + 1]
                    if net.couplings[layer + 1].max_pool:
                        above = phase.newest_drive(net, layer + 1).route(above)
                    back = net.feedback(layer + 1, above, states[layer])
                    feedbacks[layer] = back
                # A neighbour that moves next spoils the product that came from it: the sum can have its map.
                out = None
                if in_place and (last or layer + 1 in following):
                    out = back
                elif in_place and layer - 1 in following and not (net.half or net.couplings[layer].max_pool):
                    out = preactivations[layer]
                preactivations[layer] = torch.add(preactivations[layer], back, alpha=feedback, out=out)
            if last:
                feedbacks[layer] = None
                if not net.couplings[layer].max_pool:
                    drives[layer] = None
        for layer in group:
            before, states[layer] = states[layer] if net.half else None, preactivations[layer]  # frees the old state
            if not store and in_place and layer < top and feedback:  # else this is the drive itself
                states[layer].clamp_(0, 1)
            else:
                states[layer] = states[layer].clamp(0, 1)
            if not store:
                preactivations[layer] = states[layer]
            if layer:
                feedbacks[layer - 1] = None
            if layer < top:
                if net.half is None:
                    drives[layer + 1] = None
                elif drives[layer + 1] is not None and before is not None:
                    move, earlier = (states[layer] - before).to(net.half[layer].dtype), moves[layer]
                    moves[layer] = move if earlier is None else move.add_(earlier)
    return phase


def relative_changes(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """‖new − old‖/‖new‖ of each layer over the batch; 0 where both are 0."""
    changes = []
    for after, before in zip(new, old, strict=True):
        size = torch.linalg.vector_norm(after.float()).clamp_min(torch.finfo(torch.float32).tiny)
        changes.append(torch.linalg.vector_norm((after - before).float()) / size)
    return changes


def free_phase(
    net: Net,
    x: Tensor,
    settings: Settings,
    trace: Trace | None = None,
    recompute: bool = False,
    states_only: bool = False,
) -> FreePhase:
    """Settle from the start to the free equilibrium.

    Differentiable when autograd is on (that is BPTT), and without a graph otherwise.

    Args:
        net: couplings, kernels and biases, all in the dtype of `x`.
        x: input, (B, in, H, W).
        settings: the sweeps, their order, λ, the start and the tolerance.
        trace: receives the residuals of each sweep; measuring them costs two passes over the states.
        recompute: under autograd, store the states between sweeps only and settle again in the backward pass.
        states_only: what comes back beside the states is not wanted, as in inference.

    Returns:
        States, pre-activations and products, lists of N.
    """
    phase = feedforward_pass(net, x, recompute)
    depth, first = len(phase.states), 0
    if settings.start == "zero":
        zeros = [torch.zeros_like(state) for state in phase.states]
        nothing = [None] * depth
        phase = FreePhase(zeros, list(zeros), [phase.drives[0], *nothing[1:]], list(nothing), list(nothing))
        first = 1  # upwards: there is nothing above to come down
    elif settings.feedback == 0:
        return phase  # the feedforward pass is the equilibrium
    measures = trace is not None or settings.tol > 0
    for step in range(first, first + settings.free_sweeps):
        groups, last = update_groups(settings.update, depth, step), step == first + settings.free_sweeps - 1
        turns = settings.update == "sweep" and (step > first or settings.start == "feedforward")
        if turns and (states_only or not last):  # the layer at which the direction turns has just been updated
            groups = groups[1:]
        before = list(phase.states) if measures else []
        if recompute:
            phase = checkpoint(_sweep_copy, net, phase, groups, settings.feedback, use_reentrant=False)
        else:
            store = not states_only and (last or settings.tol > 0)
            phase = _sweep(net, phase, groups, settings.feedback, store, last)
        # Going down, sweeps change little but the lower layers: only both directions together tell whether it rests.
        judges = settings.tol > 0 and not x.is_meta and (settings.update != "sweep" or step % 2 == 1)
        if trace or judges:
            with torch.no_grad():
                changes = relative_changes(phase.states, before)
            if trace:
                trace(changes)
            if judges and torch.stack(changes).max() < settings.tol:
                break
    return phase


def _sweep_copy(net: Net, phase: FreePhase, groups: list[list[int]], feedback: float) -> FreePhase:
    """As `_sweep`, of a phase that stays where it is, to settle again from."""
    return _sweep(net, phase.copy(), groups, feedback)


def phase_at(net: Net, x: Tensor, states: Sequence[Tensor], feedback: float) -> FreePhase:
    """Any states with the products and pre-activations at these very states, differentiable with respect to all.

    A synchronous step takes each s_l to clip(u_l). At an equilibrium nothing moves.
    """
    drives = [net.drive(layer, states[layer - 1] if layer else x) for layer in range(len(states))]
    feedbacks: list[Tensor | None] = [
        net.feedback(layer, drives[layer].route(states[layer]), states[layer - 1]) for layer in range(1, len(states))
    ]
    feedbacks.append(None)
    preactivations = [
        drive.value if back is None else torch.add(drive.value, back, alpha=feedback)
        for drive, back in zip(drives, feedbacks, strict=True)
    ]
    return FreePhase(list(states), preactivations, list(drives), feedbacks, [None] * len(states))


def nudging_strengths(settings: Settings) -> tuple[float, ...]:
    """The β of each nudged phase of a batch; `random-sign` draws from torch's generator."""
    if settings.nudging == "centered":
        return (settings.beta, -settings.beta)
    if settings.nudging == "random-sign" and torch.rand(()).item() < 0.5:
        return (-settings.beta,)
    return (settings.beta,)


def coordinate_scales(settings: Settings, beta: float, depth: int, dtype: torch.dtype) -> list[float]:
    """1/(β λ^(N−l)) of each layer: multiplies a state's difference into the nudged phase's coordinates.

    Limited to the square root of the dtype's range. It only scales the distance of a state from its bounds, which is
    practically infinite there, so that λ = 0 needs no case of its own.
    """
    limit = torch.finfo(dtype).max ** 0.5
    gains = [beta * settings.feedback ** (depth - layer) for layer in range(1, depth + 1)]
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

    with e_l = u_l − s_l the distance by which a saturated state is held. Under max pooling the winners are those of
    s + δ, and the drive's difference is that of the winners plus that of the values: exact, and free of cancellation
    where the winners stay.

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
    scales = coordinate_scales(settings, beta, depth, free.states[0].dtype)
    phase = NudgedPhase([None] * depth, list(free.drives))
    rises: list[Tensor | None] = [None] * depth  # what comes from below,
    falls: list[Tensor | None] = [None] * depth  # and from above, as long as the neighbour has not moved
    for sweep in range(settings.nudged_sweeps):
        last = sweep == settings.nudged_sweeps - 1
        before = list(phase.deltas) if trace else []
        pulls = forces(nudged_states(free, phase, scales)) if callable(forces) else forces
        for group in update_groups(settings.update, depth, sweep):
            for layer in group:
                if rises[layer] is None and settings.feedback:
                    rises[layer] = _rise(net, layer, free, phase, scales, settings.feedback)
            for layer in group:
                if falls[layer] is None:
                    falls[layer] = _fall(net, layer, free, phase, scales)
            for layer in group:
                phase.deltas[layer] = _held_sum([rises[layer], falls[layer]], pulls[layer], free, layer, scales[layer])
            for layer in group:
                if layer:
                    falls[layer - 1] = None
                if layer + 1 < depth:
                    rises[layer + 1] = None
                if last:  # no longer needed
                    rises[layer] = falls[layer] = None
        if trace:
            trace(_delta_changes(phase.deltas, before))
        if watch:
            watch(phase)
    return phase


def nudged_states(free: FreePhase, phase: NudgedPhase, scales: Sequence[float]) -> list[Tensor]:
    """s + δ of every layer."""
    return [
        state if delta is None else torch.add(state, delta, alpha=1 / scale)
        for state, delta, scale in zip(free.states, phase.deltas, scales, strict=True)
    ]


def newest_winners(net: Net, free: FreePhase, phase: NudgedPhase, settings: Settings, beta: float) -> NudgedPhase:
    """The phase with the max-pooling winners of its last states, not of those that its last sweep started from."""
    newest = NudgedPhase(list(phase.deltas), list(phase.drives))
    scales = coordinate_scales(settings, beta, len(free.states), free.states[0].dtype)
    for layer, coupling in enumerate(net.couplings):
        if coupling.max_pool:
            _rise(net, layer, free, newest, scales, settings.feedback)
    return newest


def _held_sum(
    pulls: list[Tensor | None], force: Tensor | None, free: FreePhase, layer: int, scale: float
) -> Tensor | None:
    """clip(c e + Σ pulls − g, −c s, c (1 − s)); None if there is nothing that pulls.

    The order of the sum keeps it exact: e = u − s is exactly 0 where the state is not saturated.
    """
    present = [pull for pull in pulls if pull is not None]
    if not present and force is None:
        return None
    state = free.states[layer]
    total = torch.sub(free.preactivations[layer], state)
    edge = state * -scale
    del state  # here, and with the results in place, lies the peak of a step's memory
    if present:
        torch.add(present[0], total, alpha=scale, out=total)
    else:
        total.mul_(scale)
    for pull in present[1:]:
        total.add_(pull)
    if force is not None:
        total.sub_(force)
    # One bound after the other, in one map: of which is which, the sign of β decides.
    hold, hold_other = (torch.maximum, torch.minimum) if scale > 0 else (torch.minimum, torch.maximum)
    hold(total, edge, out=total)
    return hold_other(total, edge.add_(scale), out=total)


def _rise(
    net: Net, layer: int, free: FreePhase, phase: NudgedPhase, scales: list[float], feedback: float
) -> Tensor | None:
    """c_l [P(W ⋆ (s + δ)) − P(W ⋆ s)] for the δ of the layer below; under max pooling it also updates the drive."""
    below = phase.deltas[layer - 1] if layer else None
    if below is None:
        return None
    at_rest, change = free.drives[layer], net.push(layer, below)
    if at_rest is None or at_rest.unpooled is None:
        return change.mul_(feedback)
    drive = max_pool(torch.add(at_rest.unpooled, change, alpha=1 / scales[layer - 1]))
    phase.drives[layer] = drive
    moved = drive.at_winners(at_rest.unpooled) - at_rest.value
    return moved.mul_(scales[layer]).add_(drive.at_winners(change), alpha=feedback)


def _fall(net: Net, layer: int, free: FreePhase, phase: NudgedPhase, scales: list[float]) -> Tensor | None:
    """c_l λ Wᵀ ⋆ [P'ᵀ(s + δ) − Pᵀ s] for the δ of the layer above."""
    if layer + 1 == len(free.states):
        return None
    difference = routed_difference(layer + 1, free, phase, scales)
    return None if difference is None else net.feedback(layer + 1, difference, free.preactivations[layer])


def routed_difference(layer: int, free: FreePhase, phase: NudgedPhase, scales: list[float]) -> Tensor | None:
    """c_l [P'ᵀ(s_l + δ_l) − Pᵀ s_l]: the layer's difference as its convolution sees it; d_l where pooling is linear."""
    delta, at_rest, nudged = phase.deltas[layer], free.drives[layer], phase.drives[layer]
    if delta is None or at_rest is None or nudged is None or nudged.winners is None:
        return delta
    state = free.states[layer]
    moved = nudged.route(state) - at_rest.route(state)
    return nudged.route(delta).add_(moved, alpha=scales[layer])


def _delta_changes(new: Sequence[Tensor | None], old: Sequence[Tensor | None]) -> list[Tensor]:
    pairs = [
        (torch.zeros(1), torch.zeros(1)) if a is None else (a, torch.zeros_like(a) if b is None else b)
        for a, b in zip(new, old, strict=True)
    ]
    return relative_changes(*zip(*pairs, strict=True))
