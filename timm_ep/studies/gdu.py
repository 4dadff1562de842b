"""The gradient-descending-updates property, step by step, after Ernoult et al., *Updates of Equilibrium Prop Match
Gradients of Backprop Through Time for an RNN with Static Input* (NeurIPS 2019).

From a free equilibrium, with synchronous dynamics and as β → 0, the update of EP in the nudged step t,

    Δ_EP(t) = (1/β) [∂E/∂θ(s^β_(t+1)) − ∂E/∂θ(s^β_t)],

equals what backpropagation through time adds on its way back in step t, the gradient with respect to the parameters as
they are used in the step T−t alone, Δ_BPTT(t) = ∂L(s_T)/∂θ_(T−t). The sums over t are the two gradients, so this tells
*where* they part: at the first layers, at late steps, or everywhere. It holds with λ too: feedback with gain λ is a
gradient descent on E with a step size per layer, and these commute with the clip of the states.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ep.base.figures import add_layer_bar, layer_color, new_figure, save_figure
from timm_ep.core.energy import Net
from timm_ep.core.equilibrium import contrast, normalised_forces
from timm_ep.core.free_phase import free_phase, phase_at, relative_changes, synchronous_step
from timm_ep.core.live import LossOfStates
from timm_ep.core.nudged_phase import NudgedPhase, newest_winners, nudged_phase, nudging_strengths
from timm_ep.models import EpVgg
from timm_ep.signals.losses import Criterion, loss_of_states
from timm_ep.studies.exact import loss_gradient

__all__ = ["StepCheck", "StepChecks", "draw_steps", "step_check"]

# Synchronous free steps: at every default λ, and at λ = 1 where a net settles at all, little moves after as many.
_FREE_STEPS = 200


@dataclass(frozen=True)
class StepCheck:
    """EP's update of one layer's kernel in one nudged step beside BPTT's gradient of that step.

    Attributes:
        layer: from 1; of a read-out inside the dynamics, the last.
        step: t, from 0.
        cosine: between Δ_EP(t) and Δ_BPTT(t); NaN where BPTT's is zero (before the nudge has come down to the layer) or
            below 1e-12 of the layer's largest, where rounding shows.
        ep_norm: ‖Δ_EP(t)‖.
        bptt_norm: ‖Δ_BPTT(t)‖.
        difference: ‖Δ_EP(t) − Δ_BPTT(t)‖.
    """

    layer: int
    step: int
    cosine: float
    ep_norm: float
    bptt_norm: float
    difference: float


@dataclass(frozen=True)
class StepChecks:
    """All steps of all layers, and the relative change in the last free step: where it is large, nothing is at rest."""

    residual: float
    rows: list[StepCheck]


def step_check(
    model: EpVgg,
    images: Tensor,
    labels: Tensor,
    criterion: Criterion | None = None,
    signal: nn.Module | None = None,
    steps: int = 30,
    free_steps: int | None = None,
) -> StepChecks:
    """Compare EP with BPTT step by step, in float64, so that rounding has no part in it.

    Holds about four times `steps` copies of the kernels at once, in 8 bytes a weight.

    The settings are the model's, β, forces and nudging too; only the update is synchronous, and the net is the ideal
    one without the noise of a device.

    Args:
        model: any `ep_vgg*`; it is left as it is.
        images: (B, in_chans, H, W).
        labels: (B,), or whatever the criterion takes.
        criterion: loss of outputs and labels, a mean over the batch; by default that of the model's read-out.
        signal: a further loss, of the states and the labels, such as `timm_ep.LocalErrors`.
        steps: of the nudged phase, and of BPTT from the end of the free phase. It takes two more than layers until all
            that reaches the first layer directly is there.
        free_steps: T, at least `steps`; by default the larger of the model's own, `steps` and 200.

    Raises:
        ValueError: fewer than one step, or free steps fewer than the steps to look back on.
    """
    model = copy.deepcopy(model).double().eval()
    images = images.double()
    free_steps = max(_FREE_STEPS, steps, model.settings.free_sweeps) if free_steps is None else free_steps
    if not 1 <= steps <= free_steps:
        raise ValueError(f"steps={steps} must be at least 1, and free_steps={free_steps} at least as many.")
    loss_of = loss_of_states(model, labels, criterion, signal and copy.deepcopy(signal).double())
    with torch.no_grad():
        net = model.net((images.shape[-2], images.shape[-1]))
        trajectory = _trajectory(model, net, images, steps, free_steps)
    gradient = loss_gradient(loss_of, trajectory[-1])
    exact = _bptt_contributions(model, net, images, trajectory, gradient)
    with torch.no_grad():
        updates = _ep_updates(model, net, images, trajectory, loss_of, steps)
    rows = []
    for layer in range(len(net.kernels)):
        least = 1e-12 * max(gradients[layer].norm().item() for gradients in exact)
        for step in range(steps):
            ours, theirs = updates[step][layer], exact[step][layer]
            norms = ours.norm().item(), theirs.norm().item()
            cosine = (ours * theirs).sum().item() / (norms[0] * norms[1]) if norms[1] > least and norms[0] else math.nan
            rows.append(StepCheck(layer + 1, step, cosine, *norms, (ours - theirs).norm().item()))
    return StepChecks(float(max(relative_changes(trajectory[-1], trajectory[-2]))), rows)


def _trajectory(model: EpVgg, net: Net, x: Tensor, steps: int, free_steps: int) -> list[list[Tensor]]:
    """s_(T−steps)…s_T."""
    settings = replace(model.settings, update="synchronous", free_sweeps=free_steps - steps, tol=0.0)
    states = [list(free_phase(net, x, settings).states)]
    for _ in range(steps):
        states.append(synchronous_step(net, x, states[-1], settings.feedback))
    return states


def _bptt_contributions(
    model: EpVgg, net: Net, x: Tensor, trajectory: list[list[Tensor]], gradient: list[Tensor]
) -> list[list[Tensor]]:
    """∂L(s_T)/∂W_l at the steps T, T−1, …: backpropagation with one step's graph in memory at a time."""
    contributions = []
    for states in reversed(trajectory[:-1]):
        leaves = [state.detach().requires_grad_() for state in states]
        kernels = [kernel.detach().requires_grad_() for kernel in net.kernels]
        moved = synchronous_step(net._replace(kernels=tuple(kernels)), x, leaves, model.settings.feedback)
        inputs = [*leaves, *kernels]
        grads = torch.autograd.grad(moved, inputs, gradient, allow_unused=True, materialize_grads=True)
        gradient = list(grads[: len(leaves)])
        contributions.append(list(grads[len(leaves) :]))
    return contributions


def _ep_updates(
    model: EpVgg, net: Net, x: Tensor, trajectory: list[list[Tensor]], loss_of: LossOfStates, steps: int
) -> list[list[Tensor]]:
    """Δ_EP(t) of every kernel, the mean over the nudged phases of the settings."""
    settings = replace(model.settings, update="synchronous", nudged_sweeps=steps, tol=0.0)
    states = trajectory[-1]
    free = phase_at(net, x, states, settings.feedback)
    if settings.forces == "frozen":  # held where the last step left them, settled or not
        free = free._replace(preactivations=phase_at(net, x, trajectory[-2], settings.feedback).preactivations)
    kernels_only = [False, *[True] * len(states), *[False] * len(states)]

    def live(at: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            return [g * len(x) for g in loss_gradient(loss_of, at)]

    frozen, scales = normalised_forces(live(states))
    forces, weights = (live, 1.0) if settings.forces == "live" else (frozen, scales)
    sums: list[list[Tensor]] = [[torch.zeros_like(kernel) for kernel in net.kernels] for _ in range(steps + 1)]
    strengths = nudging_strengths(settings)
    for beta in strengths:
        seen = iter(sums[1:])

        def record(phase: NudgedPhase, seen: Any = seen) -> None:
            newest = newest_winners(net, free, phase, settings)
            estimate = contrast(net, x, free, newest, settings.feedback, kernels_only, weights)[1 : len(states) + 1]
            for total, part in zip(next(seen), estimate, strict=True):
                if part is not None:
                    total.add_(part, alpha=1 / (len(x) * len(strengths)))

        nudged_phase(net, free, forces, settings, beta, watch=record)
    return [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(sums[1:], sums[:-1], strict=True)]


def draw_steps(checks: StepChecks, model: str, settings: dict[str, Any], output: Path) -> None:
    """Size and direction of EP's updates in each nudged step, beside BPTT's gradient of that step, for every layer.

    Args:
        checks: of `step_check`.
        model: its name.
        settings: of the model, as checked.
        output: the picture; its suffix chooses the format.
    """
    figure, (axes,) = new_figure(2)
    sizes, differences = axes
    layers = sorted({row.layer for row in checks.rows})
    for layer in layers:
        color = layer_color(layer, len(layers))
        # Every second step is empty where what comes down to a layer can only come back after two steps.
        rows = [row for row in checks.rows if row.layer == layer and not math.isnan(row.cosine)]
        steps = [row.step for row in rows]
        sizes.plot(steps, [row.bptt_norm for row in rows], color=color, lw=1)
        sizes.plot(steps, [row.ep_norm for row in rows], ".", color=color, ms=5)
        relative = [row.difference / row.bptt_norm for row in rows]
        differences.plot(steps, relative, ".-", color=color, lw=1, ms=5)
    sizes.plot([], [], "k.", label="EP: update in nudged step t")
    sizes.plot([], [], "k-", lw=1, label="BPTT: gradient of step T − t")
    sizes.legend(fontsize="small")
    sizes.set(yscale="log", xlabel="step t", ylabel="norm, per kernel")
    differences.set(yscale="log", xlabel="step t", ylabel="‖EP − BPTT‖ / ‖BPTT‖")
    differences.axhline(1, color="0.7", lw=0.8, zorder=0)  # as far off as no update at all
    nudge = f"β={settings['beta']:g} ({settings['nudging']}, {settings['forces']} forces)"
    rest = f"relative change per free step {checks.residual:.0e}"
    figure.suptitle(f"{model}: λ={settings['feedback']:g}, {nudge}, {rest}", fontsize="medium")
    add_layer_bar(figure, differences, len(layers))
    save_figure(figure, output)
