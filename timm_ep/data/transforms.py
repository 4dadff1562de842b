"""From PIL images to tensors: of test images, and of training images with what is changed on the way."""

from functools import partial
from typing import Any, Literal

from PIL import Image
from timm.data import create_transform
from torchvision import transforms

__all__ = ["Augment", "augmentation", "channel_values", "image_transform", "run_transform"]

Augment = Literal["none", "crop", "flip-crop", "rrc"]


def channel_values(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or std per channel for images of `channels`: averaged where it was of another number."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def image_transform(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> transforms.Compose:
    """PIL image → normalised tensor (channels, size, size) without augmentation; channels is the length of `mean`.

    Args:
        size: in pixels; other images are resized on their shorter side and cropped at the centre.
        mean: per channel, for pixels in [0, 1].
        std: per channel.
    """
    return transforms.Compose(
        [
            partial(Image.Image.convert, mode="L" if len(mean) == 1 else "RGB"),
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def run_transform(model: Any, size: int | None = None) -> Any:
    """The transform of test images that the model's pretrained cfg describes, to images of `size` if given."""
    cfg = model.pretrained_cfg
    channels = getattr(model, "in_chans", cfg["input_size"][0])
    mean, std = (channel_values(cfg[name], channels) for name in ("mean", "std"))
    return image_transform(size or cfg["input_size"][-1], mean, std)


def augmentation(
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment = "none",
    **options: Any,
) -> transforms.Compose:
    """The transform of training images: a crop of ours or of timm, then whatever else timm augments with.

    Args:
        size: of the result in pixels.
        mean: per channel, for pixels in [0, 1]; its length is the number of channels.
        std: per channel.
        augment: `none`, `crop` (a random crop after padding by an eighth), `flip-crop` (with horizontal flips too), or
            `rrc` (timm's random resized crop, with flips).
        **options: of `timm.data.create_transform`: hflip, vflip, color_jitter, auto_augment, re_prob, scale, ratio, …
            Values of None leave the choice of flips to `augment` and turn the rest off.
    """
    flips = {"hflip": 0.5 if augment in ("flip-crop", "rrc") else 0.0, "color_jitter": None}
    options = {**flips, **{name: value for name, value in options.items() if value is not None}}
    first, second, last = create_transform(size, is_training=True, separate=True, mean=mean, std=std, **options)
    convert, resize, centre, *_ = image_transform(size, mean, std).transforms
    if augment == "rrc":
        crop = [first.transforms[0]]
    else:
        crop = [resize, centre]
        if augment != "none":
            crop.append(transforms.RandomCrop(size, padding=size // 8))
    return transforms.Compose([convert, *crop, *first.transforms[1:], second, last])
