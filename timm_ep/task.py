"""EP as a task of timm: all losses of a step, on the logits and on the states, enter one nudged phase."""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from timm_ep.models import EpVgg


class _Objective(nn.Module):
    """Model, signals and criterion in one forward pass, so that distributed training wraps all that is trained."""

    def __init__(self, model: nn.Module, signals: nn.ModuleList, criterion: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.signals, self.criterion = model, signals, criterion

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        if isinstance(self.model, EpVgg):
            states = self.model.equilibrium(images)
            output = self.model.forward_head(states[-1])
        else:
            states, output = (), self.model(images)
        output_loss = self.criterion(output, target)
        signal_losses = [signal(states, target, images) for signal in self.signals]
        return {
            "loss": sum(signal_losses, output_loss),
            "output": output,
            "output_loss": output_loss.detach(),
        }


class EpTask(ClassificationTask):
    """timm's classification task, with intermediate error signals.

    `task(images, target)["loss"].backward()` runs one nudged phase for the loss on the logits and every signal.

    Args:
        model: an `EpVgg`; any other model of timm if there are no signals.
        signals: modules `signal(states, target, images) → weighted scalar loss`. Their parameters are trained with the
            model's and are part of the task's state, never of the model.
        **kwargs: of timm's `ClassificationTask`, such as `criterion_kwargs={"smoothing": 0.1}` and `device`.

    Raises:
        ValueError: signals for a model without states.
    """

    def __init__(self, model: nn.Module, signals: nn.ModuleList | None = None, **kwargs: Any) -> None:
        super().__init__(model, **{"verbose": False, **kwargs})
        signals = nn.ModuleList() if signals is None else signals
        if len(signals) and not isinstance(model, EpVgg):
            raise ValueError(
                f"{type(model).__name__} has no states for intermediate error signals; choose an ep_vgg* model, or "
                "train without signals."
            )
        self.trainable_module = _Objective(model, signals, self.criterion)

    @property
    def _objective(self) -> _Objective:
        return unwrap_model(self.trainable_module)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._objective.model

    @property
    def signals(self) -> nn.ModuleList:
        """The signals that are trained with it."""
        return self._objective.signals

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile model, signals and loss; settling stays as it is, compiled code calls it."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **kwargs)
        return self.model

    def setup_ema(self, decay: float = 0.9999, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Average the model's weights; signals, which only serve training, are left out."""
        self.trainable_module_ema = ModelEmaV3(self.model, decay=decay, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the current weights."""
        if self.has_ema():
            self.trainable_module_ema.update(self.model, step=step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The model alone: averaged with `ema` (None where there is no average)."""
        if ema:
            return self.trainable_module_ema.module if self.has_ema() else None
        return self.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The signals' parameters."""
        return {} if ema else dict(self.signals.state_dict())

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore the signals' parameters."""
        if not ema:
            self.signals.load_state_dict(state or {}, strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that is trained; adaptive clipping leaves out the model's read-out, its last two parameters."""
        model = list(self.model.parameters())
        return [*(model[:-2] if exclude_head else model), *self.signals.parameters()]

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses and logits.

        Args:
            input: images, (B, C, H, W).
            target: labels (B,), or soft ones (B, classes).

        Returns:
            `loss` (the sum of all), `output` (logits), `output_loss` (the criterion's part, detached).
        """
        return self.trainable_module(input, target)
