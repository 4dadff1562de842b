"""Images that a net can settle on, and what is said of those that it cannot."""

from itertools import count
from typing import Any

import torch
from torch import Tensor

from timm_ep.core.equilibrium import autocast_dtype
from timm_ep.core.recording import has_values, recording, transformed, vectorised

__all__ = ["check_images"]


def check_images(model: Any, x: Tensor) -> None:
    """Refuse what an `EpVgg` would make nothing of, before it settles.

    Raises:
        NotImplementedError: EP under a transform of torch.func.
        TypeError: not floating point, or of another dtype than the model's, without autocast; or float16, whose range
            is too short, for a net whose states fall from layer to layer.
        ValueError: wrong rank or channels, an empty batch, an image too small for the poolings, pixels that are not
            finite (on the CPU only, as it would make another device wait), or an export in training mode.
    """
    if isinstance(x, torch.fx.Proxy):  # a name for images that are yet to come
        return
    if recording() and model.training:
        raise ValueError(
            "What is exported is inference: call model.eval() first. EP's gradient comes from two phases, which no "
            "exported graph holds."
        )
    if transformed() and model.settings.gradient == "ep":
        raise NotImplementedError(
            "EP settles twice by itself, and transforms of torch.func (grad, vmap, …) do not pass through. Take "
            "loss.backward() or torch.autograd.grad; for gradients per sample one sample at a time, as a "
            "sample's EP gradient does not depend on those beside it (with tol=0); or gradient='bptt' (under "
            "vmap with tol=0)."
        )
    if vectorised(x) and model.settings.tol > 0 and model.settings.settles:
        raise ValueError(
            f"tol={model.settings.tol:g} looks at the states to know when to stop, which vmap does not allow; set "
            "model.tol = 0, which runs all free sweeps."
        )
    if not x.is_floating_point():
        raise TypeError(f"The images have dtype {x.dtype}; expected floating point, for example x.float() / 255.")
    dtype, cast = model.layers[0].weight.dtype, autocast_dtype(x.device.type)
    if x.dtype != dtype and not cast:
        raise TypeError(f"The images have dtype {x.dtype} and the model {dtype}; convert one, or use autocast.")
    _check_range(model, cast or dtype)
    if x.dim() != 4 or x.shape[1] != model.in_chans:
        raise ValueError(
            f"The images have shape {tuple(x.shape)}; expected (batch, {model.in_chans}, height, width). "
            f"For other channels create the model with in_chans=…"
        )
    if model.top_size(min(x.shape[-2:])) < 1:
        smallest = next(size for size in count(1) if model.top_size(size) > 0)
        raise ValueError(
            f"Images of {x.shape[-2]}×{x.shape[-1]} pixels are too small: {sum(model.pooled)} poolings need at "
            f"least {smallest}×{smallest}. Resize or pad them, or choose a model with fewer poolings."
        )
    if recording():
        return  # values, and the size of the batch, are those of an example
    if len(x) == 0:
        raise ValueError(f"The batch is empty: shape {tuple(x.shape)}. Expected at least one image.")
    if x.device.type == "cpu" and has_values(x) and not transformed() and not torch.isfinite(x.detach().sum()):
        # A sum is one cheap pass; only where it is not finite is it worth telling NaN from overflow.
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{bad} of {x.numel()} pixels are NaN or infinite; check the images and mean and std.")


def _check_range(model: Any, dtype: torch.dtype) -> None:
    """A net whose states fall from layer to layer, and with them the bounds of a nudge, in float16.

    In products alone, whose factors are states or differences, it is enough that the states are normal numbers.
    """
    least, settings = model.unit ** len(model.layers), model.settings
    in_products = settings.gradient == "ep" and settings.products == "float16"
    if (model.unit < 1 and dtype == torch.float16) or (in_products and least < torch.finfo(torch.float16).tiny):
        raise TypeError(
            f"float16 has too short a range for this net, whose states fall to {least:.0e} (unit={model.unit:.2g}) and "
            "their differences further. Use bfloat16, as autocast's dtype or in products."
        )
