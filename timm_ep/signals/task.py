"""EP as a task of timm: all losses of a step, on the logits and on the states, enter one nudged phase."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from timm_ep.models import EpVgg
from timm_ep.signals.distillation import FeatureDistillation, LogitDistillation
from timm_ep.signals.local_errors import LocalErrors
from timm_ep.signals.losses import readout_criterion
from timm_ep.signals.teachers import Teacher, TeacherEnsemble, TeacherOutput, check_teacher

__all__ = ["EpTask"]


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Objective(nn.Module):
    """Model, signals and criterion in one forward pass, so that distributed training wraps all that is trained."""

    def __init__(self, model: nn.Module, signals: nn.ModuleDict, criterion: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.signals, self.criterion = signals, criterion

    @property
    def beside_model(self) -> nn.ModuleDict:
        """What learns beside the model: the signals, and a criterion with parameters of its own."""
        learns = isinstance(self.criterion, nn.Module) and any(True for _ in self.criterion.parameters())
        return nn.ModuleDict({**self.signals, **({"criterion": self.criterion} if learns else {})})

    def no_weight_decay(self) -> set[str]:
        """As the model's, for timm's optimizer factory."""
        listed = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in listed()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], Any]:
        """As the model's, for layer-wise learning rates; the signals learn at the rate of the read-out."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("model."), last)

    def forward(self, images: Tensor, target: Tensor, taught: TeacherOutput | None) -> dict[str, Tensor]:
        has_states = isinstance(self.model, EpVgg)
        if has_states and any(getattr(self.model, hooks) for hooks in _HOOKS):
            raise ValueError(
                "The model has hooks on its forward or backward pass, which EpTask does not call, as it asks for the "
                "states (equilibrium) and their output; put what they do into the images or the losses, or hook its "
                "parts."
            )
        learns = has_states and (self.model.learns or images.requires_grad)
        if learns and self.model.settings.live and torch.is_grad_enabled():
            return self._live_losses(images, target, taught)
        states = self.model.equilibrium(images) if has_states else (self.model.forward_features(images),)
        return self.losses(states, target, taught)

    def _live_losses(self, images: Tensor, target: Tensor, taught: TeacherOutput | None) -> dict[str, Tensor]:
        """As `forward`; the loss and its parts are those at the free equilibrium, its gradient is that of live EP."""
        free: dict[str, Tensor] = {}

        def objective(states: Sequence[Tensor]) -> Tensor:
            losses = self.losses(states, target, taught)
            if not free:  # first it is called with the free states
                free.update(losses)
            return losses["loss"]

        loss, _ = self.model.live_loss(images, objective, self.beside_model.parameters())
        return {**free, "loss": loss}

    def losses(self, states: Sequence[Tensor], target: Tensor, taught: TeacherOutput | None) -> dict[str, Tensor]:
        has_states = isinstance(self.model, EpVgg)
        output = self.model.output(states) if has_states else self.model.forward_head(states[-1])
        parts = {"output_loss": self.criterion(output, target)}
        for name, signal in self.signals.items():
            if isinstance(signal, LocalErrors):
                parts[name] = signal(states, target)
            elif taught is None:
                raise ValueError(f"{name} needs what the teacher says of the images (taught); got None.")
            elif isinstance(signal, LogitDistillation):
                parts[name] = signal(states, output, taught.logits)
            else:
                parts[name] = signal(states, taught.features)
        return {
            "loss": torch.stack(list(parts.values())).sum() if len(parts) > 1 else parts["output_loss"],
            "output": output,
            **{name: part.detach() for name, part in parts.items()},
        }


class EpTask(ClassificationTask):
    """timm's classification task, with intermediate error signals.

    `task(images, target)["loss"].backward()` runs one nudged phase for the loss on the logits and every signal. Where
    the model's settings ask for live forces, they are recomputed from all of these losses in every nudged step.

    Args:
        model: an `EpVgg`; or any other model of timm, which has no states but can learn from a teacher's logits.
        local_errors: classifiers at the layers.
        distill_features: the teacher's features as targets of the states.
        distill_logits: the teacher's logits.
        teacher: for distillation.
        **kwargs: of timm's `ClassificationTask`, such as `criterion_kwargs={"smoothing": 0.1}` and `device`. The
            default criterion is `readout_criterion`: with `readout="state"` the squared error.

    Raises:
        TypeError: a teacher that is a model alone.
        ValueError: distillation without a teacher, or a model that is compiled or distributed already.
    """

    def __init__(
        self,
        model: nn.Module,
        local_errors: LocalErrors | None = None,
        distill_features: FeatureDistillation | None = None,
        distill_logits: LogitDistillation | None = None,
        teacher: Teacher | TeacherEnsemble | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, EpVgg) and isinstance(unwrap_model(model), EpVgg):
            raise ValueError(
                f"EpTask got a {type(model).__name__}, which hides the states of the model inside; give it the model "
                "itself, then call task.compile() or task.prepare_distributed()."
            )
        if kwargs.get("criterion") is None:
            kwargs["criterion"] = readout_criterion(model, **(kwargs.pop("criterion_kwargs", None) or {}))
        super().__init__(model, **{"verbose": False, **kwargs})
        named = {
            "local_error": local_errors,
            "distill_features": distill_features,
            "distill_logits": distill_logits,
        }
        signals = nn.ModuleDict({name: signal for name, signal in named.items() if signal is not None})
        if (distill_features or distill_logits) and teacher is None:
            raise ValueError("Distillation needs a teacher; none was given.")
        if teacher is not None:
            check_teacher(teacher)
        self.teacher = teacher
        self.trainable_module = _Objective(model, signals, self.criterion)

    @property
    def _objective(self) -> _Objective:
        return unwrap_model(self.trainable_module)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._objective.model

    @property
    def signals(self) -> nn.ModuleDict:
        """The signals that are trained with it, by name."""
        return self._objective.signals

    def set_progress(self, progress: float) -> None:
        """Tell the signals' schedules how much of the training is done, from 0 to 1."""
        for signal in self.signals.values():
            if isinstance(signal, LocalErrors):
                signal.progress = progress

    def losses(
        self, states: Sequence[Tensor], target: Tensor, taught: TeacherOutput | None = None
    ) -> dict[str, Tensor]:
        """As `forward`, of states at hand."""
        return self._objective.losses(states, target, taught)

    def setup_ema(self, decay: float = 0.9999, **kwargs: Any) -> nn.Module:
        """Average the model's weights; signals, which only serve training, are left out."""
        self.trainable_module_ema = ModelEmaV3(self.model, decay=decay, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the current weights, under the current settings."""
        if self.has_ema():
            self.trainable_module_ema.update(self.model, step=step)
            if isinstance(self.model, EpVgg):
                self.trainable_module_ema.module.settings = self.model.settings

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "EpTask":
        """As timm's; DDP is told to expect parameters without a gradient where a signal rests (see `rests`), or where
        layers learn by signals alone (`gradient="local"`), which need not be on every one."""
        alone = isinstance(self.model, EpVgg) and self.model.gradient == "local"
        rests = alone or any(signal.rests for signal in self.signals.values())
        super().prepare_distributed(device_ids, **{"find_unused_parameters": rests, **ddp_kwargs})
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The model alone: averaged with `ema` (None where there is no average)."""
        if ema:
            return self.trainable_module_ema.module if self.has_ema() else None
        return self.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The parameters of the signals, and those of the criterion."""
        return {} if ema else dict(self._objective.beside_model.state_dict())

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Restore the parameters of the signals, and those of the criterion."""
        if not ema:
            self._objective.beside_model.load_state_dict(state or {}, strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that is trained; adaptive clipping leaves out the model's read-out, its last two parameters."""
        model = list(self.model.parameters())
        return [*(model[:-2] if exclude_head else model), *self._objective.beside_model.parameters()]

    def forward(self, input: Tensor, target: Tensor, taught: TeacherOutput | None = None) -> dict[str, Tensor]:
        """Losses and logits.

        Args:
            input: images, (B, C, H, W).
            target: labels (B,), or soft ones (B, classes).
            taught: what the teacher says of these images; it is asked if None.

        Returns:
            `loss` (the sum of all), `output` (logits), and each part, detached: `output_loss`, `local_error`,
            `distill_features`, `distill_logits`.
        """
        if taught is None and self.teacher is not None:
            taught = self.teacher(input)
        return self.trainable_module(input, target, taught)
