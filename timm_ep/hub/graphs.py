"""A trained model's inference as a graph that runs without this package: ONNX, or a program of `torch.export`."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from timm_ep.base.files import replacing
from timm_ep.base.options import Options
from timm_ep.hub.repository import load
from timm_ep.models import EpVgg
from timm_ep.models.named import create_named, set_sweeps

__all__ = ["Export", "export_onnx", "export_program"]

_NEEDED = ("onnx", "onnxscript", "onnxruntime")  # by ONNX; of the extra `export`
_BATCH = 2  # of the example: a size of 1 would be taken for a constant


def export_program(model: nn.Module, images: Tensor, path: str | Path) -> Callable[[Tensor], Tensor]:
    """Write the program that `torch.export.load` reads, for any number of images; gives it as it reads back."""
    batch = torch.export.Dim("batch", min=1)
    written = BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), written)
    Path(path).write_bytes(written.getbuffer())
    return torch.export.load(path).module()


def export_onnx(model: nn.Module, images: Tensor, path: str | Path) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file, input `images`, output `logits`, for any number of images; gives it as onnxruntime runs it.

    Raises:
        ModuleNotFoundError: without the packages of the extra `export`.
        ValueError: a model with short products, which onnxruntime does not compute (`Export` sets them to full).
    """
    if (products := getattr(model, "products", "full")) != "full":
        raise ValueError(
            f"products={products!r}: onnxruntime has no transposed convolution in that dtype. Set "
            "model.products = 'full', or write pt2."
        )
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install timm_ep[export].")
    import onnxruntime

    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own workings
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program.")
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@dataclass
class Export(Options):
    """Write a trained model's inference to a file that runs without this package, and compare its answers.

    It takes normalised images, (batch, channels, height, width), any number at a time, and gives logits. The sweeps of
    the settling are written out, so their number is fixed, and in full precision. It cannot be trained: no gradient
    comes out of it.

    Args:
        model: the folder of a run, or a released name (`timm.list_pretrained("ep_*")`).
        format: `onnx`, or `pt2` for `torch.export.load`.
        output: the file; by default the model's name with the format as its suffix, in the current folder.
        sweeps: of the free phase, if others than the model's own; needed where it settles until it rests (`tol`).
            0 gives its feedforward twin.
        img_size: side of the images in pixels; by default the model's.
    """

    model: str
    format: Literal["onnx", "pt2"] = "onnx"
    output: Path | None = None
    sweeps: int | None = None
    img_size: int | None = None

    def run(self) -> Path:
        """Write the file, print the largest difference of a logit from the model's, and return the path.

        Raises:
            ModuleNotFoundError: ONNX without the packages that it needs.
            ValueError: no such model, a folder that does not pass the checks, a model that cannot be exported, or one
                whose logits come out by more than 1e-4 of the largest otherwise; then nothing is written.
        """
        if not (folder := Path(self.model)).is_dir() and len(folder.parts) > 1 and ":" not in self.model:
            raise FileNotFoundError(f"{folder} does not exist; expected the folder of a run, or a name of timm.")
        model: Any = load(folder) if folder.is_dir() else create_named(self.model, pretrained=True).eval()
        set_sweeps(model, self.sweeps)
        if isinstance(model, EpVgg):
            model.settings = dataclasses.replace(model.settings, products="full")  # shorter ones save time in training
        channels, *sides = resolve_data_config({}, model=model)["input_size"]
        size = (self.img_size, self.img_size) if self.img_size else sides
        images = torch.randn(_BATCH + 1, channels, *size, generator=torch.Generator().manual_seed(0))
        path = self.output or Path(f"{Path(self.model).resolve().name}.{self.format}")  # `.` has a name too
        write = export_onnx if self.format == "onnx" else export_program
        with torch.no_grad(), replacing(path) as file:
            expected = model(images)
            difference = float((write(model, images[:_BATCH], file)(images) - expected).abs().max())
            if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
                raise ValueError(
                    f"As {self.format}, {self.model} gives other logits, by up to {difference:.1e}; nothing is written."
                )
        print(f"saved to {path}; largest difference of a logit: {difference:.1e}")
        return path
