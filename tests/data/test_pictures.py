"""A picture is opened as a viewer shows it; `test_first_hour.py` has the kinds of files, this what is between."""

import io
import random
import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader

from timm_ep.data.pictures import IMAGE_ERRORS, Pictures, UnreadableImage, as_shown, open_picture
from timm_ep.data.transforms import run_transform


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def noise(mode="RGB", size=(6, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tiff(width, height, bits, strip):
    """A grey TIFF of any depth: Pillow reads those of 12 bits, and writes none."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    tags[279] = len(strip)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return io.BytesIO(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_orientation_is_turned_as_pillow_turns_it_and_once_only(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(noise(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    shown = open_picture(file)
    assert (shown.size, shown.tobytes()) == (expected.size, expected.tobytes())
    assert as_shown(shown).tobytes() == expected.tobytes()
    assert as_shown(Image.open(file)).tobytes() == expected.tobytes()


def test_sixteen_bits_are_scaled_over_all_of_their_range_and_twelve_too():
    values = np.linspace(0, 65535, 24).round().astype(np.uint16).reshape(4, 6)
    for kind in ("PNG", "TIFF"):
        shown = open_picture(saved(Image.fromarray(values), kind), "L")
        assert np.abs(np.asarray(shown, float) - values / 257).max() <= 0.5
    bits = "".join(f"{value >> 4:012b}" for value in values.flatten())
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    twelve = open_picture(tiff(6, 4, 12, packed), "L")
    assert np.abs(np.asarray(twelve, float) - values / 257).max() <= 1
    inverted = saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.abs(np.asarray(open_picture(inverted, "L"), float) - (255 - values / 257)).max() <= 0.5


def test_a_transparent_grey_of_sixteen_bits_is_white():
    values = np.array([[0, 300, 301], [40000, 300, 65535]], np.uint16)
    file = saved(Image.fromarray(values), "PNG", transparency=300)
    assert np.asarray(open_picture(file, "L")).tolist() == [[0, 255, 1], [156, 255, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_brightness_that_nobody_knows_is_refused(mode):
    with pytest.raises(ValueError, match="nobody knows how bright white is"):
        open_picture(saved(Image.new(mode, (4, 4), 3), "TIFF"))


def test_what_is_transparent_is_on_white():
    """Against the formula: α of the colour and 1 − α of white."""
    rgba = Image.merge("RGBA", (*noise().split(), noise("L").rotate(180)))
    pixels = np.asarray(rgba, float)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    for kind in ("PNG", "TIFF"):
        assert np.abs(np.asarray(open_picture(saved(rgba, kind)), float) - expected).max() <= 1


def test_pictures_in_color_or_grey_are_what_they_were():
    """Bit for bit what `convert` made of them: runs of before go on with the same pixels."""
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        file = saved(noise(), kind)
        for mode in ("RGB", "L"):
            assert open_picture(file, mode).tobytes() == Image.open(file).convert(mode).tobytes()
    assert open_picture(saved(noise("L"), "PNG"), "L").tobytes() == noise("L").tobytes()


def test_timms_pipeline_gives_the_same_of_an_opened_picture():
    model = timm.create_model("ep_vgg5_025", num_classes=3)
    exif = Image.Exif()
    exif[0x0112] = 8
    file = saved(noise("LA", (50, 40)), "PNG", exif=exif)
    theirs = create_transform(**resolve_data_config({}, model=model))
    opened = theirs(open_picture(file))
    assert torch.equal(run_transform(model)(Image.open(file)), opened)
    assert torch.equal(run_transform(model)(open_picture(file)), opened)


def test_damaged_files_raise_what_is_expected_of_them():
    """Bytes changed, added and cut off, of every kind: never another error than those that name the file."""
    draw = random.Random(0)
    kinds = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA", "PCX", "ICO"]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        saved(noise(size=(20, 17)), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF") else {}))
        for kind in kinds
    ]
    refused = 0
    for _ in range(600):
        data = bytearray(draw.choice(files).getvalue())
        for _ in range(draw.randint(1, 5)):
            place = draw.randrange(min(len(data), draw.choice((100, 10_000))))
            data[place : place + draw.choice((1, 1, 1, 0, 10))] = draw.randbytes(draw.choice((1, 1, 1, 4)))
        if draw.random() < 0.2:
            del data[draw.randrange(1, len(data)) :]
        try:
            open_picture(io.BytesIO(bytes(data)))
        except IMAGE_ERRORS:
            refused += 1
    assert 100 < refused < 600


class Broken(Pictures):
    classes, targets = ("a",), [0]

    def open(self, index):
        return io.BytesIO(b"no picture")

    def name(self, index):
        return "file 7"


def test_an_unreadable_picture_is_named_from_other_processes_too():
    for workers in (0, 1):
        with pytest.raises(UnreadableImage, match=r"^file 7 is not an image that Pillow can read"):
            list(DataLoader(Broken(), 1, num_workers=workers))


def test_lab_is_shown_in_grey_as_in_colour():
    """Pillow converts it to RGB alone."""
    image = Image.merge("LAB", noise().split())
    grey = as_shown(image.copy(), "L")
    assert grey.tobytes() == as_shown(image.copy(), "RGB").convert("L").tobytes()
    assert len(set(grey.tobytes())) > 1
