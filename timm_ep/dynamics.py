"""How states settle: the settings, the free phase, the nudged phase.

A state at rest satisfies s_l = clip(u_l, 0, 1) with the pre-activation

    u_l = P_l(W_l ⋆ s_(l−1)) + b_l + λ · W_(l+1)ᵀ ⋆ P_(l+1)ᵀ s_(l+1).

The free phase iterates this. The nudged phase adds the force −β λ^(N−l) ∂L/∂s_l to u_l and integrates the *difference*
δ_l from the free equilibrium itself, in coordinates δ_l = β λ^(N−l) d_l in which feedback has gain 1, feedforward has
gain λ and the force is −∂L/∂s_l, whatever β, λ and depth: no small number is ever the difference of two large ones, and
none underflows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timm_ep.energy import Drive, Net


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Settings:
    """How a net settles and how its gradient is taken. Every field is a constructor argument and attribute of a model.

    Attributes:
        feedback: λ ≥ 0, the gain of the feedback. Weak feedback keeps deep nets well inside the range where they
            settle; 1 is the literature's net; 0 is the feedforward net, where EP is backpropagation.
        free_sweeps: updates of every layer in the free phase, at most. Each divides the residual by about the inverse of
            the loop gain λ‖W‖².
        nudged_sweeps: updates of every layer in the nudged phase, at most. With `update="sweep"` one already carries
            the nudge from the last layer to the first.
        beta: β ≠ 0, the nudging strength, relative to the largest |∂L/∂s| of the batch. Small, because the one-sided
            estimate has a bias of order β and the difference form loses nothing at small β. Negative nudges away.
        tol: stop the free phase when the largest relative change of a layer, ‖Δs_l‖/‖s_l‖ over the batch, falls below
            this. 0 runs all sweeps and never waits for the device.
        nudging: `one-sided`: (∂E(β) − ∂E(0))/β. `centered`: (∂E(β) − ∂E(−β))/2β, twice the cost and a bias of order β²
            (Laborieux et al. 2021).
        update: `sweep`: layer after layer, each from its newest neighbours (upwards in the free phase, downwards in the
            nudged phase: the way the news travels). `odd-even`: two halves. `synchronous`: all at once, the
            literature's.
        start: `feedforward`: from the pass without feedback, which is already near the equilibrium when λ is small.
            `zero`: the literature's.
        pool: `avg`: linear, so that every layer update is an exact minimisation of the energy, and cheaper (it is
            folded into the kernel). `max`: the literature's.
        gradient: `ep`: equilibrium propagation. `bptt`: autograd through the settling, the exact gradient at many times
            the memory. `backprop`: the feedforward twin (no feedback at all), trained by backpropagation.

    Raises:
        ValueError: a value outside of these.
    """

    feedback: float = 0.03
    free_sweeps: int = 2
    nudged_sweeps: int = 2
    beta: float = 1e-3
    tol: float = 0.0
    nudging: str = _choice("one-sided", "centered")
    update: str = _choice("sweep", "odd-even", "synchronous")
    start: str = _choice("feedforward", "zero")
    pool: str = _choice("avg", "max")
    gradient: str = _choice("ep", "bptt", "backprop")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            choices = option.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{option.name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")
            kinds = {float: (int, float), int: (int,)}.get(option.type)  # type: ignore[call-overload]
            if kinds and (not isinstance(value, kinds) or isinstance(value, bool) or value != value):
                raise ValueError(f"{option.name}={value!r} is not a number of type {option.type.__name__}.")  # type: ignore[union-attr]
        if not 0 <= self.feedback < float("inf"):
            raise ValueError(
                f"feedback={self.feedback} is not a gain; λ must be finite and at least 0 (1 is classic EP)."
            )
        if self.beta == 0 or abs(self.beta) == float("inf"):
            raise ValueError(f"beta={self.beta}: the nudging strength must be finite and not 0, for example 0.001.")
        if self.free_sweeps < 0 or self.nudged_sweeps < 1:
            raise ValueError(
                f"free_sweeps={self.free_sweeps}, nudged_sweeps={self.nudged_sweeps}: at least 0 free and 1 nudged sweep."
            )
        if self.tol < 0:
            raise ValueError(f"tol={self.tol}: the tolerance must be at least 0 (0 runs all sweeps).")


SETTING_NAMES = tuple(option.name for option in fields(Settings))

Trace = Callable[[list[Tensor]], None]
"""Called after each sweep with the relative change ‖Δs_l‖/‖s_l‖ of every layer, as scalar tensors."""


class FreePhase(NamedTuple):
    """Where the free phase ended: per layer the state s_l, the pre-activation u_l with s_l = clip(u_l), and the drive."""

    states: list[Tensor]
    preactivations: list[Tensor]
    drives: list[Drive | None]


class NudgedPhase(NamedTuple):
    """Where the nudged phase ended: per layer d_l = δ_l / (β λ^(N−l)) (None: not reached), and the drive at s_l + δ_l."""

    deltas: list[Tensor | None]
    drives: list[Drive | None]


def update_groups(update: str, depth: int) -> list[list[int]]:
    """Which layers (from 0) move together, in the order of the free phase; a sweep visits all groups once."""
    if update == "synchronous":
        return [list(range(depth))]
    if update == "odd-even":
        return [list(range(0, depth, 2)), list(range(1, depth, 2))]
    return [[layer] for layer in range(depth)]


def feedforward_pass(net: Net, x: Tensor, recompute: bool = False) -> FreePhase:
    """The pass without feedback: s_l = clip(P(W_l ⋆ s_(l−1)) + b_l). With `recompute`, autograd stores no layer twice."""

    def layer(index: int, below: Tensor) -> tuple[Tensor, Drive]:
        drive = net.couplings[index].drive(net.kernels[index], below, net.biases[index])
        return drive.value.clamp(0, 1), drive

    run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
    states: list[Tensor] = []
    drives: list[Drive | None] = []
    for index in range(len(net.kernels)):
        state, drive = run(index, states[-1] if states else x)
        states.append(state)
        drives.append(drive)
    return FreePhase(states, [drive.value for drive in drives if drive], drives)


def _sweep(net: Net, input_drive: Drive, phase: FreePhase, groups: list[list[int]], feedback: float) -> FreePhase:
    """One update of every layer."""
    states, preactivations, drives = map(list, phase)
    for group in groups:
        for layer in group:
            if layer == 0:
                drives[0] = input_drive
            else:
                drives[layer] = net.couplings[layer].drive(net.kernels[layer], states[layer - 1], net.biases[layer])
        for layer in group:
            preactivations[layer] = drives[layer].value
            above = drives[layer + 1] if layer + 1 < len(states) else None
            if above is not None and feedback:
                routed = net.couplings[layer + 1].unpool(states[layer + 1], above)
                back = net.couplings[layer + 1].feedback(net.kernels[layer + 1], routed, states[layer].shape)
                preactivations[layer] = back.mul_(feedback).add_(preactivations[layer])
        for layer in group:
            states[layer] = preactivations[layer].clamp(0, 1)
    return FreePhase(states, preactivations, drives)


def relative_changes(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """‖new − old‖/‖new‖ of each layer over the batch; 0 where both are 0."""
    changes = []
    for after, before in zip(new, old, strict=True):
        size = torch.linalg.vector_norm(after.float()).clamp_min(torch.finfo(torch.float32).tiny)
        changes.append(torch.linalg.vector_norm((after - before).float()) / size)
    return changes


def free_phase(
    net: Net, x: Tensor, settings: Settings, trace: Trace | None = None, recompute: bool = False
) -> FreePhase:
    """Settle from the start to the free equilibrium.

    Differentiable when autograd is on (that is BPTT), and without a graph otherwise.

    Args:
        net: couplings, kernels and biases, all in the dtype of `x`.
        x: input, (B, in, H, W).
        settings: the sweeps, their order, λ, the start and the tolerance.
        trace: receives the residuals of each sweep; measuring them costs two passes over the states.
        recompute: under autograd, store the states between sweeps only and settle again in the backward pass.

    Returns:
        States, pre-activations and drives, lists of N.
    """
    feedforward = feedforward_pass(net, x, recompute)
    input_drive = feedforward.drives[0]
    phase = feedforward
    if settings.start == "zero":
        zeros = [torch.zeros_like(state) for state in feedforward.states]
        phase = FreePhase(zeros, zeros, [None] * len(zeros))
    elif settings.feedback == 0:
        return phase  # the feedforward pass is the equilibrium
    groups = update_groups(settings.update, len(phase.states))
    sweep = partial(_sweep, net, input_drive)
    if recompute:
        sweep = partial(checkpoint, sweep, use_reentrant=False)
    for _ in range(settings.free_sweeps):
        previous, phase = phase, sweep(phase, groups, settings.feedback)
        if trace or (settings.tol and not x.is_meta):
            with torch.no_grad():
                changes = relative_changes(phase.states, previous.states)
            if trace:
                trace(changes)
            if settings.tol and torch.stack(changes).max() < settings.tol:
                break
    return phase


def coordinate_scales(settings: Settings, beta: float, depth: int, dtype: torch.dtype) -> list[float]:
    """1/(β λ^(N−l)) of each layer: multiplies a state's difference into the nudged phase's coordinates.

    Limited to the square root of the dtype's range. It only scales the distance of a state from its bounds, which is
    practically infinite there, so that λ = 0 needs no case of its own.
    """
    limit = torch.finfo(dtype).max ** 0.5
    gains = [abs(beta) * settings.feedback ** (depth - layer) for layer in range(1, depth + 1)]
    return (
        [min(1 / gain, limit) if gain else limit for gain in gains]
        if beta > 0
        else [-min(1 / gain, limit) if gain else -limit for gain in gains]
    )


def nudged_phase(
    net: Net,
    free: FreePhase,
    forces: Sequence[Tensor | None],
    settings: Settings,
    beta: float,
    trace: Trace | None = None,
) -> NudgedPhase:
    """Settle from the free equilibrium under the forces −β λ^(N−l) g_l.

        d_l ← clip(W_(l+1)ᵀ ⋆ d_(l+1) + λ W_l ⋆ d_(l−1) − g_l + c e_l, −c s_l, c (1 − s_l)),   c = 1/(β λ^(N−l)),

    with e_l = u_l − s_l the distance by which a saturated state is held. Under max pooling the winners are those of
    s + δ, and the drive's difference is that of the winners plus that of the values: exact, and free of cancellation
    where the winners stay.

    Args:
        net: as in the free phase.
        free: where the free phase ended.
        forces: g_l per layer (None: none), normalised to about 1, in the shape of the states.
        settings: the sweeps, their order and λ.
        beta: nudging strength, with sign.
        trace: receives the relative change of every d_l in each sweep.

    Returns:
        d_l and drives per layer. Zero forces give None or exact zeros.
    """
    depth = len(free.states)
    scales = coordinate_scales(settings, beta, depth, free.states[0].dtype)
    deltas: list[Tensor | None] = [None] * depth
    drives: list[Drive | None] = list(free.drives)
    pulls: list[Tensor | None] = [None] * depth
    for _ in range(settings.nudged_sweeps):
        before = list(deltas)
        for group in reversed(update_groups(settings.update, depth)):
            for layer in group:
                pulls[layer] = None
                if layer and deltas[layer - 1] is not None and settings.feedback:
                    pulls[layer], drives[layer] = _drive_difference(
                        net, layer, deltas[layer - 1], free.drives[layer], scales, settings.feedback
                    )
            for layer in group:
                if layer + 1 < depth and deltas[layer + 1] is not None:
                    difference = routed_difference(net, layer + 1, free, deltas, drives, scales)
                    back = net.couplings[layer + 1].feedback(
                        net.kernels[layer + 1], difference, free.states[layer].shape
                    )
                    pulls[layer] = back if pulls[layer] is None else back.add_(pulls[layer])
                force = forces[layer]
                if force is not None:
                    pulls[layer] = -force if pulls[layer] is None else pulls[layer].sub_(force)
            for layer in group:
                if pulls[layer] is not None:
                    deltas[layer] = _held(pulls[layer], free.preactivations[layer], scales[layer])
        if trace:
            trace(_delta_changes(deltas, before))
    return NudgedPhase(deltas, drives)


def _held(pull: Tensor, preactivation: Tensor, scale: float) -> Tensor:
    """clip(c e + a, −c s, c (1 − s)) for a = `pull`.

    Written clip(a, lower, upper) − clip(0, lower, upper) with lower = −c u and upper = c (1 − u): the same, and exactly a
    where neither bound is met and exactly 0 where the state stays saturated.
    """
    edges = (-scale * preactivation, torch.add(torch.full_like(preactivation, scale), preactivation, alpha=-scale))
    lower, upper = edges if scale > 0 else edges[::-1]
    rest = torch.zeros_like(pull).clamp_(lower, upper)
    return pull.clamp_(lower, upper).sub_(rest)


def _drive_difference(
    net: Net, layer: int, below: Tensor, free: Drive | None, scales: list[float], feedback: float
) -> tuple[Tensor, Drive | None]:
    """c_l [P(W ⋆ (s + δ)) − P(W ⋆ s)] for δ = d/c of the layer below, and the nudged drive (max pooling only)."""
    change = net.couplings[layer].drive(net.kernels[layer], below)
    if free is None or free.winners is None or free.unpooled is None or change.unpooled is None:
        return change.value.mul_(feedback), free
    nudged = torch.add(free.unpooled, change.unpooled, alpha=1 / scales[layer - 1])
    value, winners = torch.nn.functional.max_pool2d(nudged, 2, return_indices=True)
    at_winners = partial(_take, indices=winners)
    difference = (
        (at_winners(free.unpooled) - free.value).mul_(scales[layer]).add_(at_winners(change.unpooled), alpha=feedback)
    )
    return difference, Drive(value, winners, nudged)


def _take(maps: Tensor, indices: Tensor) -> Tensor:
    return maps.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)


def routed_difference(
    net: Net,
    layer: int,
    free: FreePhase,
    deltas: Sequence[Tensor | None],
    drives: Sequence[Drive | None],
    scales: list[float],
) -> Tensor:
    """c_l [P'ᵀ(s_l + δ_l) − Pᵀ s_l]: the layer's difference as its convolution sees it; d_l where pooling is linear."""
    coupling, delta, old, new = net.couplings[layer], deltas[layer], free.drives[layer], drives[layer]
    if not coupling.max_pool or old is None or new is None:
        return delta
    moved = coupling.unpool(free.states[layer], new) - coupling.unpool(free.states[layer], old)
    return coupling.unpool(delta, new).add_(moved, alpha=scales[layer])


def _delta_changes(new: Sequence[Tensor | None], old: Sequence[Tensor | None]) -> list[Tensor]:
    pairs = [
        (torch.zeros(1), torch.zeros(1)) if a is None else (a, torch.zeros_like(a) if b is None else b)
        for a, b in zip(new, old, strict=True)
    ]
    return relative_changes(*zip(*pairs, strict=True))
