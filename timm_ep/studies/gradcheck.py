"""How well a net settles, and how well EP follows the exact gradient, at init or trained."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ep.base.figures import add_layer_bar, layer_color, new_figure, save_figure
from timm_ep.core.settings import SETTING_NAMES
from timm_ep.hub.cards import RESULTS_NAME, RunFacts
from timm_ep.models import EpVgg
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.losses import Criterion, Signal, loss_of_states
from timm_ep.studies.exact import ExactGradient, exact_gradient, kernel_weights
from timm_ep.studies.gdu import StepChecks, draw_steps, step_check
from timm_ep.studies.workload import Workload, changed
from timm_ep.training.evaluate import images_of

_PLOTTED_STEPS = 30
_UNSETTLED = "The net does not come to rest in hundreds of sweeps, so that there is no exact gradient to compare with"


@dataclass(frozen=True)
class LayerCheck:
    """A gradient of one layer's kernel beside the exact one: cosine, and ratio of the norms to the exact one's."""

    layer: int
    cosine: float
    norm_ratio: float


@torch.enable_grad()
def gradient_check(
    model: EpVgg, images: Tensor, labels: Tensor, criterion: Criterion | None = None, signal: Signal | None = None
) -> list[LayerCheck]:
    """Compare the gradient that the model's settings give, EP by default, with the exact one at the equilibrium.

    Both are taken in eval mode, as dropout would give each a mask of its own, and for frozen layers too.

    Args:
        model: any `ep_vgg*`; it is left as it is. With live forces, EP is `model.live_loss`.
        images: (B, in_chans, H, W).
        labels: (B,), or whatever the criterion takes.
        criterion: loss of outputs and labels, a mean over the batch; by default that of the model's read-out.
        signal: a further loss, of the states and the labels, such as `timm_ep.LocalErrors`.

    Returns:
        one row a layer, from the first. Where the net does not come to rest there is a warning: it has no exact
        gradient.

    Raises:
        ValueError: a model that is no `ep_vgg*`.
    """
    exact = exact_gradients(model, images, labels, criterion, signal)
    if not exact.converged:
        warnings.warn(f"{_UNSETTLED}: {_changes(exact)}.", stacklevel=2)
    return compared(weight_gradients(model, images, labels, criterion, signal), exact.gradients)


def exact_gradients(
    model: EpVgg, images: Tensor, labels: Tensor, criterion: Criterion | None = None, signal: Signal | None = None
) -> ExactGradient:
    """The gradient of every layer's kernel at the equilibrium; see `gradient_check`."""
    twin = _measured(model)
    return exact_gradient(twin, images, loss_of_states(twin, labels, criterion, signal))


def weight_gradients(
    model: EpVgg,
    images: Tensor,
    labels: Tensor,
    criterion: Criterion | None = None,
    signal: Signal | None = None,
    **settings: Any,
) -> list[Tensor]:
    """The gradient of every layer's kernel, flat and in float64, with some of the model's settings changed."""
    twin = _measured(model, **settings)
    twin.set_grad_checkpointing()
    loss_of = loss_of_states(twin, labels, criterion, signal)
    loss = twin.live_loss(images, loss_of)[0] if twin.settings.live else loss_of(twin.equilibrium(images))
    # With gradient="local" a layer without a signal has none.
    gradients = torch.autograd.grad(loss, kernel_weights(twin), allow_unused=True, materialize_grads=True)
    return [gradient.double().flatten() for gradient in gradients]


def _measured(model: EpVgg, **settings: Any) -> EpVgg:
    if not isinstance(model, EpVgg):
        raise ValueError(f"{type(model).__name__} does not settle; expected an ep_vgg*.")
    return changed(model, **settings).eval().requires_grad_(True)


def compared(gradients: Sequence[Tensor], exact: Sequence[Tensor]) -> list[LayerCheck]:
    """Gradients of all layers, from the first, beside the exact ones."""
    return [
        LayerCheck(layer, F.cosine_similarity(ep, true, 0).item(), (ep.norm() / true.norm()).item())
        for layer, (ep, true) in enumerate(zip(gradients, exact, strict=True), 1)
    ]


@dataclass(frozen=True)
class Report:
    """What the check found of one model.

    Attributes:
        model: name, or folder of a run.
        settings: of the model, as checked.
        residuals: ‖Δs_l‖/‖s_l‖ in each free sweep, the largest over the layers.
        feedback_shares: ‖s_l* − s_l,ff‖ / ‖s_l*‖ of every layer.
        couplings: √λ‖P_l W_l‖ of every layer (`timm_ep.core.coupling`).
        layers: the model's gradient (`settings["gradient"]`, EP by default) beside the exact one.
        unsettled: why there is no exact gradient, if there is none.
        steps: EP beside BPTT step by step, if asked for.
        accuracy: a run's test accuracy in percent, where no setting was changed.
        train_seconds: a run's training time, likewise.
    """

    model: str
    settings: dict[str, Any]
    residuals: list[float]
    feedback_shares: list[float]
    couplings: list[float]
    layers: list[LayerCheck]
    unsettled: str | None = None
    steps: StepChecks | None = None
    accuracy: float | None = None
    train_seconds: float | None = None

    @property
    def worst(self) -> float:
        """The lowest cosine of a layer."""
        return min(row.cosine for row in self.layers)

    @property
    def feedback_share(self) -> float:
        """The largest of a layer."""
        return max(self.feedback_shares)

    @property
    def residual(self) -> float:
        """The relative change in the last free sweep; 0 without any."""
        return self.residuals[-1] if self.residuals else 0.0


@dataclass
class Gradcheck(Workload):
    """Print how a model settles and how its gradient compares with the exact one at the equilibrium, layer by layer.

    Args:
        model: name of an `ep_vgg*`, at its default init or with the weights of its tag; or the folder of a run.
        dataset: as in training; test images are used. By default that of the run; digits for a name.
        data_dir: where the images are, if they are not embedded or no longer where the run had them.
        over: check once for each of the values `at`: a setting, such as `beta`, `free_sweeps`, `nudged_sweeps` or
            `feedback`, or `gradient` to compare others than EP; or `model`, for nets of other depth or other runs (the
            option `model` then serves as the first).
        at: the values of `over`, a list such as [0.1,0.01].
        local_error: weight of local errors, by classifiers as they are drawn at init; 0 for none.
        local_error_args: further arguments of `timm_ep.LocalErrors`, such as `schedule`.
        gdu: steps of the comparison of EP with BPTT step by step (`timm_ep.studies.gdu`); by default 30 for a plot
            without `over`, else none.
        plot: a picture to draw (png, svg, pdf): the updates step by step, or the cosines over the values.
        json: print JSON and nothing else.
    """

    model: str = field()  # to be named
    over: str | None = None
    at: list[int | float | str] = field(default_factory=list)
    local_error: float = 0.0
    local_error_args: dict[str, Any] = field(default_factory=dict)
    gdu: int | None = None
    plot: Path | None = None
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over is not None and self.over not in ("model", *SETTING_NAMES):
            raise ValueError(f"over={self.over!r} is unknown; choose model, {', '.join(SETTING_NAMES)}.")
        if (self.over is None) != (not self.at):
            raise ValueError(f"over={self.over} and at={self.at} belong together: --over beta --at [0.1,0.01].")
        self.at_least(gdu=1)

    def run(self) -> list[Report]:
        """Print the tables and return what is in them: one report, or one for each value of `over`."""
        if self.over == "model":
            reports = [self._check(name, {}) for name in dict.fromkeys([self.model, *map(str, self.at)])]
        else:
            changes = [{self.over: value} for value in self.at] if self.over else [{}]
            reports = [self._check(self.model, change) for change in changes]
        if self.json:
            print(json.dumps(_without_nan([asdict(report) for report in reports]), indent=2, allow_nan=False))
        elif self.over is None:
            _print_report(reports[0])
        else:
            _print_table(self.over, reports)
        if self.plot is not None:
            if self.over is not None:
                draw_cosines(reports, self.over, self.plot)
            elif (checks := reports[0].steps) is not None:
                draw_steps(checks, reports[0].model, reports[0].settings, self.plot)
        return reports

    def _check(self, name: str, changes: dict[str, Any]) -> Report:
        run, facts = Path(name), RunFacts.find(Path(name, RESULTS_NAME))
        chosen = self.dataset, self.data_dir
        dataset, data_dir = images_of(run, facts, *chosen) if run.is_dir() else (chosen[0] or "digits", chosen[1])
        model, images, labels = replace(self.workload, model=name, dataset=dataset, data_dir=data_dir).make()
        model = changed(model, **changes).eval()  # the same read-out in every pass, without dropout
        told = facts if not changes and not self.model_args else None  # what was tested is the run as it is
        signal = LocalErrors(model, self.local_error, **self.local_error_args) if self.local_error else None
        steps = self.gdu or (_PLOTTED_STEPS if self.plot is not None and self.over is None else 0)
        exact = exact_gradients(model, images, labels, signal=signal)
        return Report(
            name,
            asdict(model.settings),
            model.free_residual(images),
            model.feedback_shares(images),
            model.couplings((images.shape[-2], images.shape[-1])),
            compared(weight_gradients(model, images, labels, signal=signal), exact.gradients),
            None if exact.converged else _changes(exact),
            step_check(model, images, labels, signal=signal, steps=steps) if steps else None,
            told.top1 if told else None,
            told.train_seconds if told else None,
        )


def _changes(exact: ExactGradient) -> str:
    return f"relative changes of {exact.residual:.1e} (states) and {exact.error:.1e} (errors) a step are left"


def _print_report(report: Report) -> None:
    residuals = [f"{residual:.4f}" for residual in report.residuals]
    if len(residuals) > 12:
        residuals[4:-4] = [f"… ({len(residuals) - 8} more) …"]
    gradient = "" if report.settings["gradient"] == "ep" else f", gradient {report.settings['gradient']}"
    print(f"{report.model}: λ={report.settings['feedback']:g}{gradient}, feedback share {report.feedback_share:.3f}")
    print(f"relative change per free sweep: {' '.join(residuals)}")
    for row, share, coupling in zip(report.layers, report.feedback_shares, report.couplings, strict=False):
        print(
            f"layer {row.layer:2d}: cosine {row.cosine:.4f}, norm ratio {row.norm_ratio:.4f}, coupling {coupling:.2f}, "
            f"feedback share {share:.3f}"
        )
    print(
        f"worst layer: cosine {report.worst:.4f}, at a relative change of {report.residual:.1e} in the last free sweep"
    )
    if report.unsettled is not None:
        print(f"{_UNSETTLED}: {report.unsettled}.")
    if report.steps is not None:
        _print_steps(report.steps)


def _print_steps(checks: StepChecks) -> None:
    """Per layer: the sum of the differences over that of BPTT's norms, and the step with the lowest cosine."""
    print(f"step by step (relative change {checks.residual:.1e} per synchronous free step):")
    for layer in sorted({row.layer for row in checks.rows}):
        rows = [row for row in checks.rows if row.layer == layer and not math.isnan(row.cosine)]
        if not rows:
            print(f"layer {layer:2d}: not reached")
            continue
        worst = min(rows, key=lambda row: row.cosine)
        error = sum(row.difference for row in rows) / sum(row.bptt_norm for row in rows)
        print(f"layer {layer:2d}: difference {error:.1e}, lowest cosine {worst.cosine:.4f} (step {worst.step})")


def _print_table(over: str, reports: list[Report]) -> None:
    names = [_value(over, report) for report in reports]
    width = max(len(name) for name in [over, *names])
    trained = any(report.accuracy is not None for report in reports)
    head = f"{over:{width}}  residual  share  worst cosine"
    print(head + ("  accuracy  training" if trained else "") + "  cosine per layer")
    for name, report in zip(names, reports, strict=True):
        row = f"{name:{width}}  {report.residual:8.1e}  {report.feedback_share:5.3f}  {report.worst:12.4f}"
        if trained:
            known = report.accuracy is not None
            row += f"  {report.accuracy:6.1f} %  {report.train_seconds:6.0f} s" if known else " " * 20
        print(f"{row}  {' '.join(f'{layer.cosine:.3f}' for layer in report.layers)}")
    for name, report in zip(names, reports, strict=True):
        if report.unsettled is not None:
            print(f"{over} {name}: {_UNSETTLED[0].lower()}{_UNSETTLED[1:]}: {report.unsettled}.")


def _value(over: str, report: Report) -> str:
    return report.model if over == "model" else f"{report.settings[over]}"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; a figure that does not exist is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_cosines(reports: Sequence[Report], over: str, output: Path) -> None:
    """The cosine to the exact gradient per layer: over the values of a setting, or over the layers of several models.

    Args:
        reports: one for each value, or each model.
        over: the setting's name, or `model`.
        output: the picture; its suffix chooses the format.
    """
    figure, ((axis,),) = new_figure(1)
    if over == "model":
        for report in reports:
            label = f"{Path(report.model).name}, relative change per sweep {report.residual:.0e}"
            axis.plot([row.layer for row in report.layers], [row.cosine for row in report.layers], ".-", label=label)
        axis.set(xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", fontsize="small")
    else:
        depth = len(reports[0].layers)
        values = [report.settings[over] for report in reports]
        for layer in range(depth):
            cosines = [report.layers[layer].cosine for report in reports]
            axis.plot(values, cosines, ".-", color=layer_color(layer + 1, depth), lw=1)
        if all(isinstance(value, float | int) and value > 0 for value in values):
            axis.set(xscale="log")
        axis.set(xlabel=over, title=reports[0].model)
        add_layer_bar(figure, axis, depth)
    axis.set(ylabel="cosine to the exact gradient")
    save_figure(figure, output)
