"""Teachers for distillation: any of timm's trained models, matched to what the student sees."""

import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_ep.base.channels import channel_values
from timm_ep.base.text import same_name
from timm_ep.models.named import check_known, create_named

__all__ = [
    "Teacher",
    "TeacherCache",
    "TeacherEnsemble",
    "TeacherOutput",
    "check_teacher",
    "create_teacher",
    "fingerprint",
    "load_trained",
]

_CACHE_LIMIT = 8 * 2**30  # bytes


class TeacherOutput(NamedTuple):
    """Feature maps, (B, C, H, W) each, from the finest, and logits (B, classes).

    Features have a mean square of 1 in each image and map: targets are normalised in any case, and the states of a net
    at λ = 1, which fall to 1e-10, would be nothing in half precision.
    """

    features: tuple[Tensor, ...]
    logits: Tensor


class Teacher(nn.Module):
    """A frozen model in eval mode, called with the student's images: features and logits in one pass.

    Args:
        model: with trained weights; frozen and put into eval mode itself, not a copy.
        mean: per channel, with which the student's images were normalised.
        std: per channel, likewise.
        img_size: side of the images that the model is shown, in pixels; by default its own.

    Attributes:
        input_size: height and width of the images that the model is shown; None: as the student sees them.
        channels: of each feature.
        reductions: pixels per cell of each feature.
    """

    student_mean: Tensor
    student_std: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], img_size: int | None = None
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        if getattr(inner := unwrap_model(model), "pretrained_cfg", None):
            config = resolve_data_config(model=inner)
            self.in_chans, *own_size = config["input_size"]
        else:  # no model of timm's: nothing says that it knows other images than the student's, but in grey or colour
            first = next((part for part in inner.modules() if isinstance(part, nn.Conv2d)), None)
            self.in_chans, own_size = len(mean) if first is None else first.in_channels, []
            config = {"mean": channel_values(mean, self.in_chans), "std": channel_values(std, self.in_chans)}
        size = (img_size, img_size) if img_size else _only_size(inner) or tuple(own_size)
        self.input_size: tuple[int, ...] | None = size or None
        for name, values in (
            ("student_mean", mean),
            ("student_std", std),
            ("mean", config["mean"]),
            ("std", config["std"]),
        ):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        # All of timm's models can return their features; another module that cannot still has logits to teach.
        info: Any = getattr(model, "feature_info", []) if hasattr(model, "forward_intermediates") else []
        self.channels = [int(feature["num_chs"]) for feature in info]
        self.reductions = [int(feature["reduction"]) for feature in info]

    def extra_repr(self) -> str:
        """What it is shown."""
        size = f"{'×'.join(map(str, self.input_size))} pixels" if self.input_size else "the student's images"
        return f"shown {size} in {self.in_chans} channels"

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher stays in eval mode."""
        return super().train(False)

    def adapt(self, images: Tensor) -> Tensor:
        """The student's images as the teacher knows images: its channels, its size, its mean and std."""
        images = images * self.student_std + self.student_mean
        if images.shape[1] != self.in_chans:
            images = images.mean(1, keepdim=True).expand(-1, self.in_chans, -1, -1)
        if self.input_size and images.shape[-2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """What the teacher makes of the student's normalised images, (B, channels, H, W)."""
        model: Any = self.model
        images = self.adapt(images)
        if not self.channels:
            return TeacherOutput((), model(images))
        last, features = model.forward_intermediates(images)
        return TeacherOutput(tuple(map(_in_own_units, features)), model.forward_head(last))


def _in_own_units(feature: Tensor) -> Tensor:
    """A feature map, (B, C, H, W), over its root mean square in each image, in float32 at least."""
    feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
    least = torch.finfo(feature.dtype).tiny
    scaled = feature / feature.abs().amax((1, 2, 3), keepdim=True).clamp_min(least)  # whose squares do not underflow
    return scaled / scaled.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(least)


class TeacherEnsemble(nn.Module):
    """Teachers that answer together: the mean of their probabilities, which is more often right than each of them.

    They give no features: those of different models have nothing in common.

    Args:
        members: of the same classes.
    """

    channels: Sequence[int] = ()
    reductions: Sequence[int] = ()

    def __init__(self, members: Iterable[Teacher]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def extra_repr(self) -> str:
        """What each is shown."""
        return "; ".join(str(member.extra_repr()) for member in self.members)

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """The logarithm of the mean probabilities as logits, of the student's normalised images (B, channels, H, W)."""
        logs = [F.log_softmax(member(images).logits.float(), 1) for member in self.members]
        return TeacherOutput((), torch.stack(logs).logsumexp(0) - math.log(len(logs)))


def fingerprint(teacher: nn.Module) -> int:
    """Of its weights: what tells that a teacher has been trained again."""
    code = 0
    for value in teacher.state_dict().values():
        code = zlib.crc32(value.cpu().contiguous().flatten().view(torch.uint8).numpy(), code)
    return code


def check_teacher(teacher: Any) -> None:
    """Refuse a model that does not know how the student's images are normalised.

    Raises:
        TypeError: neither a `Teacher` nor a `TeacherEnsemble`.
    """
    if not isinstance(unwrap_model(teacher), Teacher | TeacherEnsemble):
        raise TypeError(
            f"The teacher is a {type(teacher).__name__}; expected what timm_ep.create_teacher(model, mean, std) makes "
            "of a model, which shows it the student's images as it knows them."
        )


def create_teacher(
    source: str | Path | nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    checkpoint: str | Path | None = None,
    classes: Sequence[str] | None = None,
    img_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Teacher:
    """A teacher from timm, always with the head it was trained with. `Teacher.input_size` says what it is shown.

    Args:
        source: a name of timm (`resnet18.a1_in1k`), `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, a folder that training
            wrote or a file in it, or a module with trained weights, which is frozen and put into eval mode (hand in a
            `copy.deepcopy` of one that goes on learning). A module that is no model of timm's is shown the student's
            images as they are, normalised by `mean` and `std`.
        mean: per channel, with which the student's images are normalised; its length is their number of channels.
        std: per channel.
        checkpoint: weights for the model that `source` names, a file of timm's training scripts or safetensors.
        classes: names of the student's classes, if the teacher's logits are to be used: they must be the teacher's
            classes. None if only its features are.
        img_size: side of the images that the teacher is shown, in pixels, to which the student's are resized: what it
            was trained at, where its configuration does not say so. By default its own: that of its position
            embeddings, or of its configuration. Models of one size, such as a ViT, are built for this one.
        model_args: further arguments of the model that `source` names: `{"free_sweeps": 0}` has an `ep_vgg*` answer by
            a single pass, at the price of its feedback (from a zero start, as in `classic`, it is `gradient: backprop`
            that does).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no trained weights, other classes than the student's, a model that takes one size alone, another, or
            arguments for a module that exists already.
    """
    given = isinstance(source, nn.Module)
    if given and model_args:
        raise ValueError(f"model_args={dict(model_args)} are of a model to create; {_title(source)} exists already.")
    model: Any = source if given else load_trained(str(source), checkpoint, img_size, **(model_args or {}))
    inner: Any = unwrap_model(model)
    if img_size and (only := _only_size(inner)) and only != (img_size, img_size):
        if given or not hasattr(model, "set_input_size"):
            raise ValueError(
                f"The teacher {_title(source)} takes images of {only[0]}×{only[1]} pixels alone, not of img_size="
                f"{img_size}; leave img_size out, and it is shown those, or create the model with img_size."
            )
        model.set_input_size(img_size=(img_size, img_size))
    if classes is not None:
        count = getattr(inner, "num_classes", len(classes))
        if count != len(classes):
            raise ValueError(
                f"The teacher {_title(source)} has {count} classes and the student {len(classes)}: its logits mean "
                "something else. Distil its features only (--distill-features), or train a teacher on these classes."
            )
        names = (getattr(inner, "pretrained_cfg", None) or {}).get("label_names")
        if names and [*map(same_name, names)] != [*map(same_name, classes)]:
            raise ValueError(
                f"The teacher {_title(source)} names its classes {list(names)[:5]}… and the student "
                f"{list(classes)[:5]}…: logits are matched by position, so both need equal classes in the same order."
            )
    return Teacher(model, mean, std, img_size)


def _only_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that the model is built for, if it takes no others."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None and cfg.get("fixed_input_size"):
        size = cfg["input_size"][-2:]
    return None if size is None else (int(size[0]), int(size[1]))


def load_trained(
    source: str, checkpoint: str | Path | None = None, img_size: int | None = None, **model_args: Any
) -> nn.Module:
    """A model of timm with trained weights; arguments and errors as for `create_teacher`, `img_size` for weights in a
    checkpoint of a model that takes one size alone."""
    if checkpoint is not None:
        return _load_checkpoint(source, Path(checkpoint), img_size, model_args)
    path = Path(source.removeprefix("local-dir:"))
    if path.is_file():
        path = path.parent
    if path.is_dir() or source.startswith("local-dir:"):
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} holds no config.json, which says what model its weights are; give the name of the model as "
                "the teacher and the file of weights as its checkpoint."
            )
        return timm.create_model(f"local-dir:{path}", pretrained=True, **model_args)
    if not source.startswith(("hf-hub:", "hf_hub:")) and ("/" in source or os.sep in source):  # no name of timm
        raise FileNotFoundError(
            f"There is no folder {source}; give that of a run, a name of timm, or hf-hub:OWNER/NAME."
        )
    return create_named(source, pretrained=True, **model_args)


def _load_checkpoint(name: str, path: Path, img_size: int | None, model_args: Mapping[str, Any]) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected weights for the teacher {name}.")
    if ":" in name or Path(name).is_dir():
        raise ValueError(
            f"The teacher {name} comes with weights of its own, and a checkpoint, {path}, with others: leave one out, "
            "or name the model of timm that the checkpoint is of."
        )
    check_known(name)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a file of weights alone, and nothing else is ever unpickled: {error}"
        ) from error
    # Created with the classes of the weights: otherwise timm would replace the head by a random one.
    cfg = timm.get_pretrained_cfg(name)
    classifier, first_conv = map(_first, (cfg.classifier, cfg.first_conv))
    weight = state.get(f"{classifier}.weight")
    if weight is None:
        raise ValueError(f"{path} holds no {classifier}.weight: it has no head, or is not of {name}.")
    stem = state.get(f"{first_conv}.weight")
    shape: dict[str, Any] = {} if stem is None else {"in_chans": stem.shape[1]}
    if img_size and cfg.fixed_input_size:
        shape["img_size"] = img_size
    model = timm.create_model(name, **{"num_classes": len(weight), **shape, **model_args})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        hint = " If it was trained on images of another size, give that (img_size)." if cfg.fixed_input_size else ""
        raise ValueError(f"{path} does not hold the weights of {name}: {error}{hint}") from error
    return model


def _first(names: str | Sequence[str] | None) -> str | None:
    """timm names several where a model has several, such as the two heads of a distilled one."""
    return names if names is None or isinstance(names, str) else names[0]


def _title(source: str | Path | nn.Module) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


class TeacherCache:
    """What a teacher said of each image of a data set without augmentation, kept in memory at half precision.

    It is asked of every image once, in their order, at the start: what it says then does not depend on where a run
    began.

    Args:
        teacher: to ask.
        batches: the images of the data set, (B, C, H, W), in order.
        count: how many they are.

    Raises:
        MemoryError: the answers are too many to keep.
    """

    def __init__(self, teacher: Teacher | TeacherEnsemble, batches: Iterable[Tensor], count: int) -> None:
        self.rows: list[Tensor] = []
        first = 0
        for images in batches:
            answer = teacher(images)
            fresh = [tensor.half().cpu() for tensor in (*answer.features, answer.logits)]
            if not self.rows:
                size = sum(tensor[0].numel() * 2 for tensor in fresh) * count
                if size > _CACHE_LIMIT:
                    raise MemoryError(
                        f"What the teacher says of {count:,} images takes {size / 2**30:.1f} GiB; the limit is "
                        f"{_CACHE_LIMIT / 2**30:.0f} GiB. Turn the cache off (--cache-teacher false)."
                    )
                self.rows = [tensor.new_empty((count, *tensor.shape[1:])) for tensor in fresh]
            for row, tensor in zip(self.rows, fresh, strict=True):
                row[first : first + len(tensor)] = tensor
            first += len(images)

    def __call__(self, indices: Tensor, device: torch.device | str = "cpu") -> TeacherOutput:
        """The teacher's answer to the images with these numbers, (B,), of the data set."""
        *features, logits = (row[indices].to(device, torch.float32) for row in self.rows)
        return TeacherOutput(tuple(features), logits)
