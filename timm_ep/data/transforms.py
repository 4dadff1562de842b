"""From PIL images to tensors: of test images, and of training images with what is changed on the way."""

from functools import partial
from typing import Any, Literal

from timm.data import create_transform, resolve_data_config
from torchvision import transforms

from timm_ep.base.channels import channel_values
from timm_ep.data.pictures import as_shown

__all__ = ["Augment", "augmentation", "image_transform", "run_transform"]

Augment = Literal["none", "crop", "flip-crop", "rrc"]


def image_transform(
    size: int | tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str = "bilinear",
    crop_pct: float = 1.0,
    crop_mode: str = "center",
) -> transforms.Compose:
    """PIL image → normalised tensor (channels, height, width) without augmentation; channels is the length of `mean`.

    It is timm's own, `timm.data.create_transform`, of the picture in the mode that the model takes. The defaults are
    what training takes, and `timm_ep.hub.export.save` writes into a run's configuration.

    Args:
        size: in pixels, of a side or (height, width); other images are resized and cropped to it.
        mean: per channel, for pixels in [0, 1].
        std: per channel.
        interpolation: of timm, such as `bilinear` or `bicubic`.
        crop_pct: share of the resized image's side that is kept.
        crop_mode: `center` (the shorter side is fitted, and the centre cropped), `squash` or `border`.
    """
    sides = (size, size) if isinstance(size, int) else size
    transform = create_transform(
        sides, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    convert = partial(as_shown, mode="L" if len(mean) == 1 else "RGB")
    return transforms.Compose([convert, *transform.transforms])


def run_transform(model: Any, size: int | None = None) -> transforms.Compose:
    """The transform of test images that the model's configuration describes, as timm reads it, to images of `size` if
    given."""
    config = resolve_data_config({}, model=model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    mean, std = (channel_values(config[name], channels) for name in ("mean", "std"))
    chosen = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    return image_transform(size or config["input_size"][-2:], mean, std, **chosen)


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
