"""The exact gradient at the free equilibrium, by implicit differentiation (Almeida 1987; Pineda 1987).

Where the states are at rest, s = F(s, θ), the gradient of a loss on them is

    dL/dθ = vᵀ ∂F/∂θ,    v = ∂L/∂s + vᵀ ∂F/∂s,

and iterating the second equation is backpropagation through time from an equilibrium, for as many steps as it takes, in
the memory of one. F is the synchronous step: each s_l to clip(u_l).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_ep.core.equilibrium import no_autocast, prepared
from timm_ep.core.free_phase import free_phase, relative_changes, synchronous_step
from timm_ep.core.live import LossOfStates
from timm_ep.core.settings import PHYSICAL
from timm_ep.models import EpVgg

__all__ = ["ExactGradient", "exact_gradient", "kernel_weights", "loss_gradient"]

# Relative changes at which an iteration has converged: the cosine to its limit is then 1 to eight digits
# (scripts/README.md, "How much effort is enough"), and float32 still resolves them.
_CONVERGED = 1e-5
_MOST_STEPS = 500


class ExactGradient(NamedTuple):
    """dL/dW_l of every layer's kernel, and how well what it rests on has converged.

    Attributes:
        gradients: flat and in float64.
        residual: the largest relative change of a layer, ‖Δs_l‖/‖s_l‖, in a step from these states.
        error: likewise of v, in the last of its steps.
    """

    gradients: list[Tensor]
    residual: float
    error: float

    @property
    def converged(self) -> bool:
        """Whether there is an equilibrium, and this is its gradient."""
        return self.residual < 10 * _CONVERGED and self.error < 10 * _CONVERGED  # neither of which NaN is


def kernel_weights(model: EpVgg) -> list[Tensor]:
    """The parameter of every layer's kernel.

    Raises:
        ValueError: a kernel is computed from other parameters (`torch.nn.utils.parametrizations`, `prune`).
    """
    for number, layer in enumerate(model.layers):
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            raise ValueError(
                f"The kernel of layers.{number} is computed from other parameters, and no gradient can be taken of it "
                "alone; remove what parametrises it (parametrize.remove_parametrizations, prune.remove)."
            )
    return [layer.get_parameter("weight") for layer in model.layers]


def loss_gradient(loss_of: LossOfStates, states: Sequence[Tensor]) -> list[Tensor]:
    """∂L/∂s of every state; zeros where the loss does not look."""
    leaves = [state.detach().requires_grad_() for state in states]
    return list(torch.autograd.grad(loss_of(leaves), leaves, allow_unused=True, materialize_grads=True))


def exact_gradient(model: EpVgg, images: Tensor, loss_of: LossOfStates) -> ExactGradient:
    """The gradient of a loss at the free equilibrium of the ideal net, whatever the sweeps and noise of the model.

    Args:
        model: any `ep_vgg*`, whose kernels require gradients.
        images: (B, in_chans, H, W).
        loss_of: the states s_1…s_N, a scalar.
    """
    sweeps = max(_MOST_STEPS, model.settings.free_sweeps)
    ideal: dict[str, Any] = dict.fromkeys(PHYSICAL, 0)
    settings = replace(model.settings, **ideal, gradient="bptt", free_sweeps=sweeps, tol=_CONVERGED)
    net, x = prepared(model.net((images.shape[-2], images.shape[-1])), images)
    with no_autocast(x.device.type):
        with torch.no_grad():
            states = free_phase(net, x, settings, states_only=True).states
        leaves = [state.detach().requires_grad_() for state in states]
        moved = synchronous_step(net, x, leaves, settings.feedback)
    forces = errors = loss_gradient(loss_of, states)
    for step in range(2 * sweeps):  # a synchronous step takes errors by one layer, a sweep by as many as there are
        passed = torch.autograd.grad(
            moved, leaves, errors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        following = [force + error for force, error in zip(forces, passed, strict=True)]
        change = float(torch.stack(relative_changes(following, errors)).max())
        errors = following
        if (step > len(states) and change < _CONVERGED) or not math.isfinite(change):
            break
    gradients = torch.autograd.grad(moved, kernel_weights(model), errors)
    residual = float(torch.stack(relative_changes(moved, leaves)).max().detach())
    return ExactGradient([gradient.double().flatten() for gradient in gradients], residual, change)
