"""The literature's algorithm on a batch: its time, extrapolated from single steps, and its gradient."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ep.core.settings import Settings
from timm_ep.models import EpVgg
from timm_ep.studies.exact import kernel_weights
from timm_ep.studies.gradcheck import LayerCheck, compared, exact_gradients
from timm_ep.studies.measure import Step
from timm_ep.studies.reference import Classic, Reference
from timm_ep.studies.workload import Workload, changed

__all__ = ["CLASSIC", "PARTS", "classic_checks", "classic_parts", "extrapolated", "make_classic_step"]

CLASSIC = Settings.preset("classic")
_BETAS = (CLASSIC.beta, -CLASSIC.beta)
PARTS = {"free step": CLASSIC.free_sweeps, "nudged step": len(_BETAS) * CLASSIC.nudged_sweeps, "contrast": len(_BETAS)}
"""What a training step consists of, and how often."""

_SETTLING = 3  # steps from zero, so that what is timed has the values of a settling net


def classic_net(model: EpVgg) -> Classic:
    """The net of a model as the literature runs it: λ = 1 and a softmax read-out outside the dynamics.

    Max pooling, too, unless the model is at λ = 1 itself: then it is the same net.
    """
    net = Reference.of(model)
    if model.feedback != 1:
        net = replace(net, pool="max", feedback=1.0)
    weight, bias = (parameter.detach() for parameter in (model.head.fc.weight, model.head.fc.bias))
    weight = weight / model.unit ** len(model.layers)  # of the states as they are
    return Classic(net, partial(F.cross_entropy, reduction="none"), weight, bias)


def classic_parts(model: EpVgg, images: Tensor, labels: Tensor) -> dict[str, Step]:
    """One of each of `PARTS`; a step goes on from where the last one ended."""
    classic = classic_net(model)
    free = nudged = classic.net.settle(images, steps=_SETTLING)

    def free_step() -> None:
        nonlocal free
        free = classic.net.step(images, free)

    def nudged_step() -> None:
        nonlocal nudged
        nudged = classic.nudged_step(images, labels, nudged, CLASSIC.beta)

    def contrast() -> None:
        classic.estimate(images, labels, nudged, free, CLASSIC.beta)

    return dict(zip(PARTS, (free_step, nudged_step, contrast), strict=True))


def extrapolated(times: dict[str, list[float]]) -> list[float]:
    """Seconds of a training step in each round, from those of its parts."""
    return [
        sum(times * seconds for times, seconds in zip(PARTS.values(), parts, strict=True))
        for parts in zip(*(times[name] for name in PARTS), strict=True)
    ]


def make_classic_step(workload: Workload) -> Step:
    """A training step of a few steps in each phase: its memory is that of all, as none of them is stored."""
    model, images, labels = workload.make()
    classic = classic_net(model)
    return lambda: classic.gradients(images, labels, _SETTLING, _SETTLING, _BETAS)


def classic_checks(model: EpVgg, images: Tensor, labels: Tensor) -> list[LayerCheck] | None:
    """Its gradient, all steps of it, beside the exact one at the equilibrium of the same dynamics, if there is one."""
    classic = classic_net(model)
    exact = exact_gradients(changed(model, **{**vars(CLASSIC), "pool": classic.net.pool}), images, labels)
    if not exact.converged:
        return None
    _, _, estimates = classic.gradients(images, labels, CLASSIC.free_sweeps, CLASSIC.nudged_sweeps, _BETAS)
    kernels = [layer()[0] for layer in model.layers]  # functions of the weights: the chain rule takes it from here
    gradients = torch.autograd.grad(kernels, kernel_weights(model), estimates[: len(kernels)])
    return compared([gradient.double().flatten() for gradient in gradients], exact.gradients)
