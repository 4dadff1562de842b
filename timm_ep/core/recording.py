"""Who else looks at the operations: what writes a model down for inference elsewhere, and the transforms of torch."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

__all__ = ["has_values", "recording", "transformed", "vectorised"]


def recording() -> bool:
    """Whether operations are being recorded, by `torch.export`, `torch.onnx.export` or `torch.jit.trace`.

    Nothing may then depend on the values of the images, or on how many there are.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether a transform of torch.func (`grad`, `vmap`, `jvp`, …) is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def vectorised(tensor: Tensor) -> bool:
    """Whether it stands for many, as in `vmap`, `is_grads_batched=True` and `jacobian(…, vectorize=True)`."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor) and not functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)  # of a transform around or inside
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def has_values(x: Tensor) -> bool:
    """Whether there are numbers to look at: tensors on `meta`, and those of `FakeTensorMode`, are shapes alone."""
    return not x.is_meta and not is_fake(x)
