"""Half precision on processors that have no instructions for it: a warning, and an optimizer without it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from timm_ep.models import EpVgg
from timm_ep.training.distributed import World
from timm_ep.training.options import TrainingOptions

__all__ = ["computes", "optimizer_precision", "precision_notes"]


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for this dtype, `bfloat16` or `float16`, as far as PyTorch knows.

    It asks oneDNN, whose products these are on a CPU: x86 needs AVX-512 for bfloat16, and its FP16 for float16. Without
    them a product takes 8 to 80 times as long as in float32. Of other devices, and without oneDNN, nothing is known.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    asked = torch.ops.mkldnn
    return bool(asked._is_mkldnn_bf16_supported() if dtype is torch.bfloat16 else asked._is_mkldnn_fp16_supported())


def precision_notes(options: TrainingOptions, model: Any, device: torch.device) -> list[str]:
    """What of the options is slow on this device for being in half precision, and what to do."""
    asked: list[tuple[str, str, str]] = []
    if options.amp:
        asked.append(("amp", options.amp_dtype, "leave --amp out"))
    if isinstance(model, EpVgg) and model.settings.products != "full":
        asked.append(("products", model.settings.products, "give --model-args.products full"))
    return [
        f"{name}: this CPU has no instructions for {dtype}, which takes 8 to 80 times as long as float32 without them; "
        f"{remedy}."
        for name, dtype, remedy in asked
        if not computes(device, getattr(torch, dtype))
    ]


class _Float32(TorchFunctionMode):
    """What is converted to bfloat16 inside is converted to float32; what an optimizer keeps in bfloat16 stays so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and kwargs.get("dtype") is torch.bfloat16:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def optimizer_precision(world: World) -> AbstractContextManager[Any]:
    """The context of an optimizer's steps, the same in every process, each of which is to ask.

    timm's Muon makes its updates orthogonal in bfloat16 and has no option for that: on a CPU without instructions for
    it, a step would take several times as long as the gradient does. There it computes in float32.
    """
    return nullcontext() if world.from_primary(computes(world.device, torch.bfloat16)) else _Float32()
