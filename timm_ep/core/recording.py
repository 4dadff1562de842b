"""Models that are written down for inference elsewhere: as `torch.export` programs, ONNX graphs, or traces."""

import torch

__all__ = ["recording"]


def recording() -> bool:
    """Whether operations are being recorded, by `torch.export`, `torch.onnx.export` or `torch.jit.trace`.

    Nothing may then depend on the values of the images, or on how many there are.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
