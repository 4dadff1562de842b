"""How well a net settles and how well EP follows BPTT, at init or trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ep.data import create_loader, limit, open_data
from timm_ep.evaluate import feedback_share, load_run, run_transform
from timm_ep.models import EpVgg

# Sweeps of the exact gradient: at every default λ the residual is below 1e-4 by then.
_CONVERGED_SWEEPS = 24


@dataclass(frozen=True)
class LayerCheck:
    """The EP gradient of one layer's kernel beside the exact one: cosine, and ratio of the norms EP/exact."""

    layer: int
    cosine: float
    norm_ratio: float


def gradient_check(
    model: EpVgg,
    images: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    sweeps: int = _CONVERGED_SWEEPS,
) -> list[LayerCheck]:
    """Compare the EP gradient, by the model's settings, with autograd through the converged settling.

    Args:
        model: any `ep_vgg*`; it is left as it is.
        images: (B, in_chans, H, W). The exact gradient stores `sweeps` times the states of these.
        labels: (B,), or whatever the criterion takes.
        criterion: loss of logits and labels.
        sweeps: free sweeps of the exact gradient.

    Returns:
        one row a layer, from the first.
    """

    def kernel_gradients(**settings: Any) -> list[Tensor]:
        twin = copy.deepcopy(model)
        twin.settings = replace(model.settings, **settings)
        weights = [twin.get_parameter(f"layers.{layer}.weight") for layer in range(len(twin.layers))]
        gradients = torch.autograd.grad(criterion(twin(images), labels), weights)
        return [gradient.double().flatten() for gradient in gradients]

    rows = zip(kernel_gradients(gradient="ep"), kernel_gradients(gradient="bptt", free_sweeps=sweeps), strict=True)
    return [
        LayerCheck(layer, F.cosine_similarity(ep, exact, 0).item(), (ep.norm() / exact.norm()).item())
        for layer, (ep, exact) in enumerate(rows, 1)
    ]


@dataclass
class Gradcheck:
    """Print how a model settles and how its EP gradient compares with BPTT, layer by layer.

    Args:
        model: name of an `ep_vgg*`, at its default init, or the folder of a run.
        dataset: as in training; test images are used.
        data_dir: where the images are, if not embedded.
        model_args: further arguments of a model at init.
        batch_size: images.
        seed: of the init.
    """

    model: str
    dataset: str = "digits"
    data_dir: Path | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    seed: int = 0

    def run(self) -> list[LayerCheck]:
        """Print the table and return its rows."""
        data = open_data(self.dataset, self.data_dir)
        torch.manual_seed(self.seed)
        if Path(self.model).is_dir():
            model, _ = load_run(self.model)
        else:
            shape = {"num_classes": len(data.classes), "in_chans": data.channels}
            model = timm.create_model(self.model, **shape, **self.model_args)
        if not isinstance(model, EpVgg):
            raise ValueError(f"{self.model} is no ep_vgg*: it has no settling to check.")
        data.test.transform = run_transform(model)
        images, labels = next(iter(create_loader(limit(data.test, self.batch_size), self.batch_size)))
        rows = gradient_check(model, images, labels)
        residuals = " ".join(f"{residual:.4f}" for residual in model.free_residual(images))
        print(f"{self.model}: λ={model.feedback:g}, feedback share {feedback_share(model, images):.3f}")
        print(f"relative change per free sweep: {residuals}")
        for row in rows:
            print(f"layer {row.layer:2d}: cosine {row.cosine:.4f}, norm ratio {row.norm_ratio:.4f}")
        print(f"worst layer: cosine {min(row.cosine for row in rows):.4f}")
        return rows
