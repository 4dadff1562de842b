"""EP of a loss that is given as a function of the states: the published algorithm.

`timm_ep.core.equilibrium` knows a loss by its gradient at the free equilibrium alone. Here the nudged phase is that of
the literature's F = E + β Σ_i L_i, the sum over the samples of the batch: it goes on from the last free states,
recomputes its forces ∂L_i/∂s_l from the current states in every step, and β is absolute. The estimate, for all
parameters,

    dL/dθ ≈ (1/β) [∂F/∂θ(s^β, β) − ∂F/∂θ(s^0, 0)],

is the contrast of the two phases for the parameters of the energy, and ∂L/∂θ *at the nudged states* for those of the
loss (a read-out outside the dynamics, the classifiers of error signals); the mean over ±β where nudging is centered.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.checkpoint import get_device_states, set_device_states

from timm_ep.core.energy import Net
from timm_ep.core.equilibrium import (
    autocast_dtype,
    averaged,
    contrast,
    layers_needed,
    no_autocast,
    prepared,
    refuse_forward_mode,
    refuse_second_derivatives,
)
from timm_ep.core.free_phase import FreePhase, free_phase, phase_at
from timm_ep.core.nudged_phase import (
    newest_winners,
    nudged_phase,
    nudged_states,
    nudging_strengths,
    warn_of_unreached,
)
from timm_ep.core.settings import Settings

__all__ = ["LossOfStates", "live_loss"]

LossOfStates = Callable[[Sequence[Tensor]], Tensor]
"""The mean over the batch of the loss of s_1…s_N, a scalar."""


@torch.compiler.disable
def live_loss(
    net: Net, x: Tensor, settings: Settings, loss: LossOfStates, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss at the free equilibrium; its `backward` hands out the gradient by live nudging.

    Both phases run here (the nudged one only where a gradient is wanted), and only the gradient is kept.

    Args:
        net: couplings, kernels and biases.
        x: input, (B, in, H, W).
        settings: see `Settings`.
        loss: called with the free states, then with those of every nudged step, which carry a gradient; within one call
            of `live_loss` it sees the same random numbers each time (dropout), as F is to be one function. As a mean
            over the batch it makes β the strength per sample, whatever the batch.
        parameters: of the loss, each once; whatever else it depends on gets no gradient.

    Returns:
        The loss, a scalar, and the free states s_1…s_N, which carry no gradient.

    Raises:
        ValueError: the loss is no scalar, or depends on no state; or the nudge would drown in rounding.
    """
    settled_net, settled_x = prepared(net, x)
    inputs = (settled_x, *settled_net.kernels, *settled_net.biases, *parameters)
    needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs]
    if any(unpack_dual(tensor).tangent is not None for tensor in inputs):
        refuse_forward_mode()
    objective = _Objective(loss, x)
    with torch.no_grad(), no_autocast(x.device.type):
        free = free_phase(settled_net, settled_x, settings)
        # With a graph, as parametrize.cached() keeps for the calls to come what the first one computes of the weights.
        with torch.set_grad_enabled(any(needed)):
            value = objective([state.detach() for state in free.states]).detach()
        gradients: list[Tensor | None] = [None] * len(inputs)
        if any(needed):
            _check_strength(settings, len(free.states), settled_x.dtype)
            gradients = _live_gradient(settled_net, settled_x, free, objective, list(parameters), settings, needed)
    return _Known.apply(value, gradients, *inputs), tuple(free.states)


def _check_strength(settings: Settings, depth: int, dtype: torch.dtype) -> None:
    """The nudge of the first layer against the rounding of its state, which live forces integrate with it.

    At λ = 0 nothing is left to integrate: the states are those of a single pass.
    """
    nudge = abs(settings.beta) * settings.feedback ** (depth - 1)
    if settings.feedback and nudge < 10 * torch.finfo(dtype).eps:
        raise ValueError(
            f"Live forces would drown: feedback={settings.feedback:g} and beta={settings.beta:g} nudge the first of "
            f"{depth} layers by {nudge:.1g}, and rounding alone moves its state by {torch.finfo(dtype).eps:.1g}. Use "
            "forces='frozen', which loses nothing by it, or feedback near 1 and a larger beta (preset='classic')."
        )


class _Known(torch.autograd.Function):
    """A value whose gradient is at hand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        return (None, None, *(None if known is None else known * grad.to(known.dtype) for known in ctx.saved_tensors))


class _Objective:
    """The loss under the caller's autocast, and its derivatives. F is one function, so dropout draws the same mask in
    every call: the first leaves the random number generators as it finds them moved, the others replay it."""

    def __init__(self, loss: LossOfStates, x: Tensor) -> None:
        self.loss, self.batch, self.calls = loss, len(x), 0
        self.forced: list[bool] = []  # whether the loss looks at each state, once forces were asked for
        device = x.device.type
        dtype = autocast_dtype(device)
        self.autocast = partial(torch.autocast, device, dtype) if dtype else nullcontext
        self.cpu_state, (self.devices, self.device_states) = torch.get_rng_state(), get_device_states(x)
        self.device_type = device if self.devices else "cuda"  # not looked at without devices

    def __call__(self, states: Sequence[Tensor]) -> Tensor:
        """L of the states."""
        with torch.random.fork_rng(self.devices, enabled=self.calls > 0, device_type=self.device_type):
            if self.calls:
                torch.set_rng_state(self.cpu_state)
                set_device_states(self.devices, self.device_states, device_type=self.device_type)
            self.calls += 1
            with self.autocast():
                value = self.loss(states)
        if not isinstance(value, Tensor) or value.dim():
            found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise ValueError(f"The loss {found}; expected a scalar tensor, the mean over the batch.")
        return value

    def forces(self, states: Sequence[Tensor]) -> list[Tensor]:
        """∂(Σ_i L_i)/∂s of every state; zeros where the loss does not look."""
        with torch.enable_grad():
            leaves = [state.detach().requires_grad_() for state in states]
            value = self(leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else ()
        self.forced = [grad is not None for grad in grads]
        if not any(self.forced):
            raise ValueError("The loss depends on no state; compute it from the states it is called with.")
        return [
            torch.zeros_like(state)
            if grad is None
            else (grad * self.batch).contiguous(memory_format=torch.channels_last)
            for state, grad in zip(states, grads, strict=True)
        ]

    def gradients(self, states: Sequence[Tensor], parameters: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
        """∂L/∂θ of the loss's own parameters at the states; None where not needed, zeros where not used."""
        wanted = [parameter for parameter, wants in zip(parameters, needed, strict=True) if wants]
        if not wanted:
            return [None] * len(parameters)
        with torch.enable_grad():
            value = self([state.detach().requires_grad_() for state in states])
        # Kept, as parametrize.cached() shares a part of the graph between calls.
        grads = iter(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True, materialize_grads=True))
        return [next(grads) if wants else None for wants in needed]


def _live_gradient(
    net: Net,
    x: Tensor,
    free: FreePhase,
    objective: _Objective,
    parameters: list[Tensor],
    settings: Settings,
    needed: list[bool],
) -> list[Tensor | None]:
    """The gradient for x, kernels, biases and the parameters of the loss."""
    # The dynamics go on from these states, so what holds them are the pre-activations at them, not the ones before.
    free = phase_at(net, x, free.states, settings.feedback)
    estimates = []
    for beta in nudging_strengths(settings):
        nudged = nudged_phase(net, free, objective.forces, settings, beta)
        nudged = newest_winners(net, free, nudged, settings)
        of_energy = contrast(net, x, free, nudged, settings.feedback, needed)
        of_loss = objective.gradients(nudged_states(free, nudged), parameters, needed[len(needed) - len(parameters) :])
        estimates.append([*(None if part is None else part / objective.batch for part in of_energy), *of_loss])
    warn_of_unreached(objective.forced, layers_needed(needed, len(free.states)), settings)
    return averaged(estimates)
