"""How states settle without a loss.

A state at rest satisfies s_l = clip(u_l, 0, 1) with the pre-activation

    u_l = P_l(W_l ⋆ s_(l−1)) + b_l + λ · W_(l+1)ᵀ ⋆ P_(l+1)ᵀ s_(l+1).

The free phase iterates this, in the order of `timm_ep.core.schedule`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timm_ep.core.energy import Drive, Net
from timm_ep.core.recording import has_values, recording, transformed
from timm_ep.core.schedule import Sweep, Visit, schedule
from timm_ep.core.settings import Settings

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

    Pre-activations are kept of each layer's last update; before it s_l stands in their place, and costs no memory.

    A product is None once the neighbour it was computed from has moved. With a short dtype for differences the drive
    stays instead, and `moves` holds by how much s_l has moved since the drive of the layer above was computed.
    """

    states: Sequence[Tensor]
    preactivations: list[Tensor]
    drives: list[Drive | None]
    feedbacks: list[Tensor | None]
    moves: list[Tensor | None]

    @classmethod
    def at(cls, states: Sequence[Tensor], preactivations: list[Tensor], drives: list[Drive | None]) -> "FreePhase":
        """These, with no product of a layer above and nothing that has moved."""
        depth = len(preactivations)
        return cls(states, preactivations, drives, [None] * depth, [None] * depth)

    def kept_state(self, layer: int) -> Tensor | None:
        """s_l, or None where it is no more than clip(u_l)."""
        return None if isinstance(self.states, Clipped) else self.states[layer]

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

    def newest_feedback(self, net: Net, layer: int) -> Tensor:
        """The product of the layer above, which must not be the last, at the present states."""
        known = self.feedbacks[layer]
        if known is None:
            above = self.states[layer + 1]
            if net.couplings[layer + 1].max_pool:
                above = self.newest_drive(net, layer + 1).route(above)
            known = net.feedback(layer + 1, above, self.states[layer])
        self.feedbacks[layer] = known
        return known


def feedforward_pass(net: Net, x: Tensor, recompute: bool = False, local: bool = False) -> FreePhase:
    """The pass without feedback, s_l = clip(P(W_l ⋆ s_(l−1)) + b_l).

    With `recompute`, autograd stores only states; with `local` no gradient passes from a layer to the one below.
    """

    def layer(index: int, below: Tensor) -> tuple[Tensor, Drive]:
        drive = net.drive(index, below)
        return drive.value.clamp(0, 1), drive

    run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
    states: list[Tensor] = []
    drives: list[Drive | None] = []
    for index in range(len(net.kernels)):
        below = states[-1] if index else x
        state, drive = run(index, below.detach() if local and index else below)
        states.append(state)
        drives.append(drive)
    preactivations = [drive.value for drive in drives if drive]
    return FreePhase.at(states, preactivations, drives)


Store = Literal["all", "last", "none"]
"""Of which updates to keep the pre-activations: of all, of each layer's last, or of none."""


def _sweep(net: Net, phase: FreePhase, sweep: Sweep, feedback: float, store: Store = "all") -> FreePhase:
    """One update of every layer of the sweep. The phase itself moves on, so that old tensors are freed on the way.

    Args:
        net: couplings, kernels and biases.
        phase: where the last sweep ended.
        sweep: the visits.
        feedback: λ.
        store: the pre-activations to keep.
    """
    states, top = cast("list[Tensor]", phase.states), len(phase.states) - 1
    drives, feedbacks, moves = phase.drives, phase.feedbacks, phase.moves
    for group in sweep:
        for layer, state in [(visit.layer, _update(net, phase, visit, feedback, store)) for visit in group]:
            before, states[layer] = states[layer] if net.half else None, state  # frees the old state
            if layer:
                feedbacks[layer - 1] = None
            if layer < top:
                if net.half is None:
                    drives[layer + 1] = None
                elif drives[layer + 1] is not None and before is not None:
                    move, earlier = (state - before).to(net.half[layer].dtype), moves[layer]
                    moves[layer] = move if earlier is None else move.add_(earlier)
    return phase


def _update(net: Net, phase: FreePhase, visit: Visit, feedback: float, store: Store) -> Tensor:
    """The new state of a layer; the pre-activation goes into the phase."""
    layer = visit.layer
    # A new map costs as much as what is computed in it; what differentiates or batches has to see one all the same.
    in_place = not (torch.is_grad_enabled() or recording() or transformed())
    drive, spare = phase.newest_drive(net, layer), None
    total = drive.value
    # The layer below still needs the winners of max pooling, and a drive beside short products is there to be shifted.
    if visit.drive_spent and not net.couplings[layer].max_pool and (net.half is None or visit.last):
        phase.drives[layer], spare = None, total
    if feedback and layer + 1 < len(phase.states):
        back = phase.newest_feedback(net, layer)
        if visit.feedback_spent:
            phase.feedbacks[layer], spare = None, back
        total = spare = torch.add(total, back, alpha=feedback, out=spare if in_place else None)
    keeps = store == "all" or (store == "last" and visit.last)
    state = total.clamp_(0, 1) if in_place and spare is not None and not keeps else total.clamp(0, 1)
    phase.preactivations[layer] = total if keeps else state
    return state


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
        phase = FreePhase.at(zeros, list(zeros), [phase.drives[0], *[None] * (depth - 1)])
        first = 1  # upwards: there is nothing above to come down
    elif settings.feedback == 0:
        return phase  # the feedforward pass is the equilibrium
    measures = trace is not None or settings.tol > 0
    store: Store = "none" if states_only else "all" if settings.tol > 0 else "last"
    steps = range(first, first + settings.free_sweeps)
    sweeps = schedule(settings.update, depth, steps, started=settings.start == "feedforward")
    for step, sweep in zip(steps, sweeps, strict=True):
        before = list(phase.states) if measures else []
        if recompute:
            phase = checkpoint(_sweep_copy, net, phase, sweep, settings.feedback, use_reentrant=False)
        else:
            phase = _sweep(net, phase, sweep, settings.feedback, store)
        # Going down, sweeps change little but the lower layers: only both directions together tell whether it rests.
        judges = settings.tol > 0 and has_values(x) and (settings.update != "sweep" or step % 2 == 1)
        if trace or judges:
            with torch.no_grad():
                changes = relative_changes(phase.states, before)
            if trace:
                trace(changes)
            if judges and torch.stack(changes).max() < settings.tol:
                break
    return phase


def free_residuals(net: Net, x: Tensor, settings: Settings) -> Tensor:
    """‖Δs_l‖/‖s_l‖ of every layer in each free sweep, (sweeps, layers); no sweeps where the net does not settle."""
    changes: list[Tensor] = []
    if settings.settles:
        free_phase(net, x, settings, trace=lambda sweep: changes.append(torch.stack(sweep)))
    return torch.stack(changes) if changes else x.new_zeros(0, len(net.couplings))


def _sweep_copy(net: Net, phase: FreePhase, sweep: Sweep, feedback: float) -> FreePhase:
    """As `_sweep`, of a phase that stays where it is, to settle again from."""
    return _sweep(net, phase.copy(), sweep, feedback)


def synchronous_step(net: Net, x: Tensor, states: Sequence[Tensor], feedback: float) -> list[Tensor]:
    """All states at once to clip(u_l) of these; differentiable with respect to all."""
    return [u.clamp(0, 1) for u in phase_at(net, x, states, feedback).preactivations]


def phase_at(net: Net, x: Tensor, states: Sequence[Tensor], feedback: float) -> FreePhase:
    """Any states with the products and pre-activations at these very states, differentiable with respect to all.

    A synchronous step takes each s_l to clip(u_l). At an equilibrium nothing moves.
    """
    drives = [net.drive(layer, states[layer - 1] if layer else x) for layer in range(len(states))]
    preactivations = [
        torch.add(below.value, net.feedback(layer, above.route(states[layer]), states[layer - 1]), alpha=feedback)
        for layer, (below, above) in enumerate(pairwise(drives), 1)
    ]
    return FreePhase.at(list(states), [*preactivations, drives[-1].value], list(drives))
