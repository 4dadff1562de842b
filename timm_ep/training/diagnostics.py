"""What each layer sees of the nudge: the measurements by which one judges whether EP trains a deep net.

Where plain EP fails with depth, it is because a finite nudge fades on its way down from the loss, or because strong
feedback settles slowly (Lin, Bal & Sengupta, arXiv:2508.15989). Both show here, layer by layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_ep.core.coupling import coupling_norms, feedback_shares
from timm_ep.core.equilibrium import normalised_forces
from timm_ep.core.free_phase import free_phase
from timm_ep.core.nudged_phase import force_gains, nudged_phase
from timm_ep.models import EpVgg
from timm_ep.signals.task import EpTask

__all__ = ["Diagnosis", "LayerDiagnosis", "Settling", "diagnose"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer on one batch.

    Attributes:
        layer: from 1.
        nudge: root mean square over batch and neurons of s^β − s^0, at the model's β.
        scaled_nudge: the same over β λ^(N−l), the part that λ takes by construction: what the layer's gradient is made
            of. The two differ only by β at λ = 1.
        weight_gradient: ‖dL/dW_l‖, as training takes it.
        bias_gradient: ‖dL/db_l‖.
        free_residual: ‖Δs_l‖/‖s_l‖ in the last free sweep.
        nudged_residual: the same of s^β − s^0 in the last nudged sweep. 1 where it had but one sweep.
        saturated: share of the states at 0 or 1, which no small nudge moves.
        coupling: c_l = √λ‖P_l W_l‖, how strongly the layer is coupled to the one below (`timm_ep.core.coupling`).
        feedback_share: ‖s* − s_ff‖ / ‖s*‖, how far feedback moves the state from the feedforward pass.
        gain_gradient: ‖dL/d gain_l‖; None for plain kernels.
    """

    layer: int
    nudge: float
    scaled_nudge: float
    weight_gradient: float
    bias_gradient: float
    free_residual: float
    nudged_residual: float
    saturated: float
    coupling: float
    feedback_share: float
    gain_gradient: float | None = None


@dataclass(frozen=True)
class Settling:
    """The relative change of one layer in one sweep of a phase (`free` or `nudged`); both count from 1."""

    phase: str
    sweep: int
    layer: int
    residual: float


@dataclass(frozen=True)
class Diagnosis:
    """Every layer of a net, and how it settled."""

    layers: list[LayerDiagnosis]
    settling: list[Settling]


def diagnose(task: EpTask, images: Tensor, target: Tensor) -> Diagnosis:
    """Measure every layer on a batch, in eval mode; the task, its model and their gradients are left as they are.

    Nudge and settling are those of the ideal net with these weights, one-sided and with forces taken at the free
    equilibrium, whatever training does: live forces, ±β, a device, or none of it (`backprop`, `local`). It costs about
    two steps of training.

    Args:
        task: with an `EpVgg`, whose output loss and signals all nudge.
        images: (B, C, H, W).
        target: labels (B,), or soft ones.

    Raises:
        TypeError: a model without its task.
        ValueError: the model has no states.
    """
    if not isinstance(task, EpTask):
        raise TypeError(
            f"What is diagnosed is a task, EpTask(model, …), as signals nudge too; got a {type(task).__name__}."
        )
    model = task.model
    if not isinstance(model, EpVgg):
        raise ValueError(f"{type(model).__name__} has no states to diagnose; expected an ep_vgg* model.")
    was_training = task.training
    task.eval()
    taught = None if task.teacher is None else task.teacher(images)
    norms = _gradient_norms(model, task(images, target, taught)["loss"])

    settling: list[Settling] = []
    with torch.no_grad():
        net, settings = model.net((images.shape[-2], images.shape[-1])), model.settings
        free = free_phase(net, images, settings, trace=_Recorder("free", settling))
    gains = force_gains(settings.feedback, len(free.states))
    states = [state.detach().requires_grad_() for state in free.states]
    grads = torch.autograd.grad(task.losses(states, target, taught)["loss"], states, allow_unused=True)
    forces, _ = normalised_forces(grads)
    with torch.no_grad():
        for layer, coupling in enumerate(net.couplings):
            if coupling.max_pool:  # of which the nudged phase asks for the winners at the equilibrium
                free.newest_drive(net, layer)
        nudged = nudged_phase(net, free, forces, settings, settings.beta, trace=_Recorder("nudged", settling))
        couplings = coupling_norms(net, (images.shape[-2], images.shape[-1]), settings.feedback)
        shares = feedback_shares(net, images, free.states)
    task.train(was_training)

    last = {(one.phase, one.layer): one.residual for one in settling}  # later sweeps replace earlier ones
    rows = []
    convolutions = len(model.layers)  # an output inside the dynamics is no row of its own
    for layer, (state, delta) in enumerate(
        zip(free.states[:convolutions], nudged.deltas[:convolutions], strict=True), 1
    ):
        scaled = 0.0 if delta is None else float(delta.double().square().mean().sqrt())
        rows.append(
            LayerDiagnosis(
                layer=layer,
                nudge=abs(settings.beta) * gains[layer - 1] * scaled,
                scaled_nudge=scaled,
                **norms[layer - 1],
                free_residual=last.get(("free", layer), 0.0),
                nudged_residual=last.get(("nudged", layer), 0.0),
                saturated=float(((state == 0) | (state == 1)).double().mean()),
                coupling=couplings[layer - 1],
                feedback_share=shares[layer - 1],
            )
        )
    return Diagnosis(rows, settling)


def _gradient_norms(model: EpVgg, loss: Tensor) -> list[dict[str, float]]:
    """‖dL/dp‖ of the parameters of each layer; 0 where p is frozen."""
    params = [dict(layer.named_parameters()) for layer in model.layers.children()]
    trained = [param for layer in params for param in layer.values() if param.requires_grad]
    # With gradient="local" a layer without a signal has none.
    grads = iter(torch.autograd.grad(loss, trained, materialize_grads=True) if trained else ())
    return [
        {f"{name}_gradient": float(next(grads).norm()) if param.requires_grad else 0.0 for name, param in layer.items()}
        for layer in params
    ]


class _Recorder:
    """A trace of a phase: appends the relative changes of each sweep."""

    def __init__(self, phase: str, rows: list[Settling]) -> None:
        self.phase, self.rows, self.sweep = phase, rows, 0

    def __call__(self, changes: list[Tensor]) -> None:
        self.sweep += 1
        self.rows += [Settling(self.phase, self.sweep, layer, float(change)) for layer, change in enumerate(changes, 1)]
