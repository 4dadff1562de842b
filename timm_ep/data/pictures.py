"""One way to open a picture for training, testing and prediction alike: as a viewer shows it."""

import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch.utils.data import Dataset

__all__ = ["IMAGE_ERRORS", "PICTURE_SUFFIXES", "Pictures", "UnreadableImage", "as_shown", "open_picture"]

# Fixed, so that another version of Pillow does not find other pictures in a folder.
_NAMES = "apng avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpg pbm pcx pgm png pnm ppm tga tif tiff webp"
PICTURE_SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())

# What Pillow raises for files that are no images, are cut off or damaged, or unpack to an absurd size.
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(ValueError):
    """A file that should be an image and cannot be read."""

    def __init__(self, message: str) -> None:
        # From a process that loads images it arrives as the last line of a traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def open_picture(file: str | Path | IO[bytes], mode: str = "RGB") -> Image.Image:
    """The picture in a file, see `as_shown`; of an animation the first frame.

    Args:
        file: a path, or an open file.
        mode: `RGB`, or `L` for grey.

    Raises:
        IMAGE_ERRORS: nothing that Pillow can read, or whose brightness is not known.
    """
    with Image.open(file) as image:
        return as_shown(image, mode)


def as_shown(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """A picture as a viewer shows it, on white and without a colour profile.

    Turned as its EXIF data say; 16 (or 12) bits of grey scaled to 8; palettes looked up; what is transparent on white;
    CMYK and others converted.

    Args:
        image: of any mode; it is turned itself, once.
        mode: `RGB`, or `L` for grey.

    Raises:
        ValueError: pixels of 32 bits, of which nobody knows how bright white is.
    """
    image.load()  # before its orientation is asked for: a TIFF turns itself
    with suppress(*IMAGE_ERRORS):  # damaged EXIF data are no reason not to show the picture
        ImageOps.exif_transpose(image, in_place=True)  # a copy would know neither format nor tags
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _scaled(image)
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have 32 bits (Pillow's mode {image.mode}), of which nobody knows how bright white is; save it "
            "with 8 or 16"
        )
    if image.mode == "LAB":  # which Pillow converts to RGB alone
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    shown = image.convert(mode)
    shown.info = {}  # what it says of the file's pixels is not true of these
    return shown


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits in 8, white where it is transparent. Those of a TIFF are as many as it says, and zero
    may be white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    raw = np.asarray(image)
    grey = raw.astype(np.float64) * (255 / (2**bits - 1))
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[raw == transparent] = 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


class Pictures(Dataset[tuple[Any, int]]):
    """Labelled pictures in RGB, each read when it is asked for. None is ever passed over: see `__getitem__`.

    Attributes:
        classes: names in the order of the labels.
        targets: the labels, without reading an image.
        transform: of each image; None to give the PIL image.
    """

    classes: tuple[str, ...]
    targets: list[int]
    transform: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def open(self, index: int) -> IO[bytes]:
        """The file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What the file is called in a message."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """What it is called within the dataset, wherever that lies."""
        return str(index)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image and label.

        Raises:
            UnreadableImage: the file is no picture, or a damaged one.
        """
        try:
            with self.open(index) as file:
                image = open_picture(file)
        except IMAGE_ERRORS as error:
            raise UnreadableImage(
                f"{self.name(index)} is not an image that Pillow can read ({error}). Repair or remove it."
            ) from error
        return self.transform(image) if self.transform else image, self.targets[index]
