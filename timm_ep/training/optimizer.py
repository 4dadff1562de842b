"""What trains: an optimizer of timm, with a learning rate for each layer where these are given."""

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from timm_ep.models import EpVgg
from timm_ep.signals.task import EpTask
from timm_ep.training.options import TrainingOptions

__all__ = ["create_optimizer"]


def create_optimizer(options: TrainingOptions, task: EpTask) -> torch.optim.Optimizer:
    """The optimizer of timm for all that the task trains.

    Raises:
        ValueError: one that does not work here, or learning rates that do not fit the layers.
    """
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            task.get_trainable_module(),
            opt=options.opt,
            lr=max(options.layer_lr, default=options.lr),
            weight_decay=options.weight_decay,
            param_group_fn=_layer_groups(options, task.get_trainable_module()) if options.layer_lr else None,
            **options.opt_kwargs,
        )
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"opt={options.opt} does not work here: {error}.") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"opt={options.opt} needs second derivatives, which are not taken here; choose another.")
    return optimizer


def _layer_groups(options: TrainingOptions, module: nn.Module) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """One group of parameters for each learning rate of `layer_lr` (and for what does not decay), scaled from the
    largest, as timm's schedules expect of `layer_decay`."""
    objective: Any = module
    if not isinstance(objective.model, EpVgg):
        raise ValueError(f"layer_lr={options.layer_lr} is for an ep_vgg*; {options.model} has one learning rate, lr.")
    if "layer_decay" in options.opt_kwargs:
        raise ValueError("layer_lr and layer_decay both say how fast each layer learns; choose one.")
    if len(options.layer_lr) != len(objective.model.layers) + 1:
        raise ValueError(
            f"layer_lr has {len(options.layer_lr)} rates; {options.model} has {len(objective.model.layers)} "
            "convolutions and a read-out, so give one more than that."
        )
    decays_all = not options.opt_kwargs.get("filter_bias_and_bn", True)

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                number = re.fullmatch(r"model\.layers\.(\d+)\..*", name)
                layer = int(number[1]) if number else len(options.layer_lr) - 1
                decays = decays_all or parameter.dim() > 1
                scale = options.layer_lr[layer] / max(options.layer_lr)
                group = {"lr_scale": scale, "weight_decay": options.weight_decay if decays else 0.0, "params": []}
                found.setdefault((layer, decays), group)["params"].append(parameter)
        return list(found.values())

    return groups
