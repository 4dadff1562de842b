"""From timm's feedforward VGGs, trained by backprop, to a start for EP: convert, calibrate, fine-tune.

`convert` takes over kernels and biases. `calibrate` then fits them, layer by layer, to states that are clipped at 1:
ReLU nets are positively homogeneous, so that a layer can be scaled by 1/c if the next one is scaled by c.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_ep.base.channels import channel_values
from timm_ep.base.files import creating
from timm_ep.base.options import Options
from timm_ep.data.datasets import limit, open_data
from timm_ep.data.transforms import image_transform
from timm_ep.hub.export import save
from timm_ep.models import EpVgg
from timm_ep.models.named import create_named
from timm_ep.models.weights import checkpoint_filter_fn
from timm_ep.signals.teachers import load_trained
from timm_ep.training.guard import layer_residuals

__all__ = ["Convert", "calibrate", "convert"]


def convert(source: nn.Module, model: EpVgg) -> None:
    """Give `model` the kernels and biases of `source`; the read-out stays its own.

    Args:
        source: one of timm's VGGs, with or without batch normalisation.
        model: of the same depth, widths and channels of the image, with `center_kernels=False`; with `pool="max"` it
            computes the same, but for feedback and clipping.

    Raises:
        ValueError: another number of convolutions, poolings elsewhere, or centred kernels.
        RuntimeError: other widths.
    """
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model))


@torch.no_grad()
def calibrate(model: EpVgg, images: Tensor, quantile: float = 0.999) -> list[float]:
    """Scale every layer so that its states fill [0, 1].

    From the first layer to the last, on the states without feedback: kernel and bias are divided by the `quantile` of
    the layer's states, and the next kernel is multiplied by it. One scale a layer, not one a channel: so it is gains
    and biases alone that change, the channels keep their proportions, and the loop gain that of the source.

    Args:
        model: converted.
        images: a batch as the model will see them, (B, in_chans, H, W); some dozens.
        quantile: share of the states below 1, of all positions, channels and images; 1 for no clipping on these.

    Returns:
        c_l of each layer: its state was c_l · s_l before, as long as nothing is clipped.

    Raises:
        ValueError: a quantile outside of (0, 1], or a layer that none of the images excites.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} must be above 0 and at most 1.")
    layers: Any = model.layers
    scales: list[float] = []
    below, scale = images, 1.0
    for index, layer in enumerate(layers):
        layer.get_parameter(layer.size_name).mul_(scale)
        state = model.net((images.shape[-2], images.shape[-1])).drive(index, below).value.clamp_min(0)
        flat = state.flatten()
        scale = float(flat.kthvalue(max(1, round(quantile * len(flat)))).values)
        if not scale > 0:
            raise ValueError(f"No image excites layer {index + 1}; give more, prepared as for the source.")
        layer.get_parameter(layer.size_name).mul_(1 / scale)
        layer.bias.div_(scale)
        scales.append(scale)
        below = state.div_(scale).clamp_max_(1)
    return scales


@dataclass
class Convert(Options):
    """Make a start for EP of a feedforward VGG of timm: its kernels, calibrated on images, under a new read-out.

    Args:
        source: the VGG, as for `timm_ep.signals.teachers.create_teacher`: a name of timm such as `vgg16_bn.tv_in1k`,
            `hf-hub:…`, `local-dir:…`, or the folder of a run.
        output: folder to make, for `timm-ep train --initial-checkpoint`.
        checkpoint: weights for the model that `source` names.
        model: name of the `ep_vgg*`; by default the one of the source's depth.
        model_args: further arguments of the model, such as `feedback`.
        dataset: whose training images to calibrate on, as in training.
        data_dir: where the images are.
        img_size: side of the images in pixels, as they will be in training; by default the source's.
        images: to calibrate on.
        quantile: share of a layer's states that stay below 1.
    """

    source: str
    output: Path
    checkpoint: Path | None = None
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    data_dir: Path | None = None
    img_size: int | None = None
    images: int = 64
    quantile: float = 0.999

    def run(self) -> EpVgg:
        """Write the folder, print how the net settles, and return the model.

        Raises:
            FileExistsError: there is something in the folder already.
            FileNotFoundError: no such weights or images.
            ValueError: a source that is no VGG, or does not fit the model.
        """
        source = load_trained(self.source, self.checkpoint)
        if not isinstance(source, VGG):
            raise ValueError(f"{self.source} is a {type(source).__name__}; only VGGs of timm (vgg11 … vgg19) convert.")
        cfg, data = resolve_data_config(model=source), open_data(self.dataset, self.data_dir)
        for note in data.notes:
            print(f"warning: {note}", file=sys.stderr)
        mean, std = (channel_values(cfg[name], source.in_chans) for name in ("mean", "std"))
        size = self.img_size or cfg["input_size"][-1]
        name = self.model or "ep_" + source.pretrained_cfg["architecture"].removesuffix("_bn")
        args = {"pool": "max", "center_kernels": False, **self.model_args}
        model: Any = create_named(name, num_classes=len(data.classes), in_chans=source.in_chans, **args)
        convert(source, model.eval())
        data.train.transform = image_transform(size, mean, std)
        batch, _ = next(iter(DataLoader(limit(data.train, self.images), self.images)))
        calibrate(model, batch, self.quantile)
        if license := source.pretrained_cfg.get("license"):
            model.pretrained_cfg["license"] = license
        with creating(self.output) as folder:
            save(folder, model, data.classes, size, mean, std)
        residuals = layer_residuals(model, batch)
        change = f"{float(residuals[-1].max()):.2g}" if residuals.numel() else "none, there is no feedback"
        print(f"saved to {self.output}\n{name}, λ={model.feedback:g}: relative change in the last free sweep {change}")
        return model
