"""Who else looks at the operations: what writes a model down for inference elsewhere, and the transforms of torch."""

import torch

__all__ = ["recording", "transformed"]


def recording() -> bool:
    """Whether operations are being recorded, by `torch.export`, `torch.onnx.export` or `torch.jit.trace`.

    Nothing may then depend on the values of the images, or on how many there are.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether a transform of torch.func (`grad`, `vmap`, `jvp`, …) is at work."""
    return bool(torch._C._are_functorch_transforms_active())
