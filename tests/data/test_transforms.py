"""Pixels reach a model as timm's own evaluation would show them to it: its scripts and this package see the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_data_config

from timm_ep.data.transforms import image_transform, run_transform
from timm_ep.hub.export import save

CARDS = Path(__file__).parents[2] / "model_cards"
SHAPES = {"square": (32, 32), "wide": (60, 40), "tall": (33, 50), "smaller": (20, 17), "larger": (130, 97)}


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise of (width, height); opaque where the mode has transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def by_timm(model, image: Image.Image, folder) -> torch.Tensor:
    """The picture from a file, by timm's own dataset and transform."""
    (folder / "class").mkdir(parents=True)
    image.save(folder / "class" / "0.png")
    config = resolve_data_config({}, model=model)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    dataset = ImageDataset(str(folder), transform=create_transform(**config), input_img_mode=mode)
    return dataset[0][0]


def run_of(folder, channels: int, size: int, **changes) -> torch.nn.Module:
    """A model that was saved as training saves it, read again by timm; `changes` are made to its configuration."""
    model = timm.create_model("ep_vgg5_025", num_classes=2, in_chans=channels)
    save(folder, model, ["a", "b"], size, (0.4,) * channels, (0.3,) * channels)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_run_sees_what_timm_shows_it(tmp_path, shape, mode, channels):
    run = tmp_path / "run"
    run.mkdir()
    model, image = run_of(run, channels, 32), picture(SHAPES[shape], mode)
    ours = run_transform(model)(image)
    assert ours.shape == (channels, 32, 32)
    assert torch.equal(ours, by_timm(model, image, tmp_path))
    # and it is what the run was trained and tested with
    assert torch.equal(ours, image_transform(32, (0.4,) * channels, (0.3,) * channels)(image))


@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation": "bicubic"},
        {"crop_pct": 0.8},
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"crop_mode": "border", "interpolation": "nearest"},
        {"input_size": [3, 32, 48]},
    ],
)
def test_every_entry_of_the_configuration_counts(tmp_path, changes):
    run = tmp_path / "run"
    run.mkdir()
    plain, image = run_transform(run_of(run, 3, 32)), picture(SHAPES["larger"])
    model = run_of(run, 3, 32, **changes)
    ours = run_transform(model)(image)
    assert torch.equal(ours, by_timm(model, image, tmp_path))
    assert ours.shape[-1] == changes.get("input_size", [32])[-1]
    assert not torch.equal(ours[..., :32], plain(image))


@pytest.mark.parametrize("name", timm.list_pretrained("ep_*"))
def test_shipped_models_see_what_timm_shows_them(tmp_path, name):
    """Under the name that timm knows, and as the folder that is on the Hub."""
    models = [timm.create_model(source, pretrained=True) for source in (name, f"local-dir:{CARDS / name}")]
    image = picture(SHAPES["wide"])
    seen = [run_transform(model)(image) for model in models]
    assert torch.equal(*seen)
    assert torch.equal(seen[0], by_timm(models[0], image, tmp_path))
