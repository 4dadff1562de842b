import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_ep.data import create_loader, image_transform, limit, open_data


def image_bytes(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 36), (value, 0, 255 - value)).save(file, "PNG")
    return file.getvalue()


def make_folders(root, classes=("cat", "dog"), count=3, splits=("train", "test")):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(image_bytes(50 * label + index))


def test_digits_are_scikit_learns_split_in_two_without_overlap():
    data = open_data("digits")
    assert (len(data.train), len(data.test), data.channels) == (1437, 360, 1)
    originals = {image.tobytes(): target for image, target in zip(*load_digits(return_X_y=True), strict=True)}
    seen = []
    for part in (data.train, data.test):
        for index in range(0, len(part), 7):
            image, label = part[index]
            assert image.size == (32, 32)
            assert originals[part.images[index].tobytes()] == label
            pixels = np.asarray(image)[4:28:3, 4:28:3]
            assert np.abs(pixels / 255 * 16 - part.images[index]).max() < 0.1
        seen.append({image.tobytes() for image in part.images})
    assert not seen[0] & seen[1]


def test_folders_and_tars_give_the_same_images_and_classes(tmp_path):
    make_folders(tmp_path / "folders")
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "test"):
        with tarfile.open(tars / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "folders" / split, arcname=".")
    sources = [open_data("folder", tmp_path / "folders"), open_data("folder", tars)]
    for data in sources:
        assert data.classes == ("cat", "dog")
        assert len(data.train) == len(data.test) == 6
    for ours, theirs in zip(sources[0].test, sources[1].test, strict=True):
        assert ours[1] == theirs[1]
        assert ours[0].tobytes() == theirs[0].tobytes()


def test_torchvision_datasets_by_name(tmp_path):
    """MNIST's own files, written here by hand: two images a part."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(range(196)) * 8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            (0x801).to_bytes(4, "big") + (2).to_bytes(4, "big") + b"\x03\x09"
        )
    data = open_data("torch/mnist", tmp_path)
    assert data.channels == 1
    assert len(data.classes) == 10
    assert [data.test[i][1] for i in range(2)] == [3, 9]


@pytest.mark.parametrize(
    ("name", "make", "error", "message"),
    [
        ("imagenet", lambda d: None, ValueError, "dataset='imagenet' is unknown"),
        ("folder", lambda d: None, FileNotFoundError, "has none of train"),
        ("folder", lambda d: make_folders(d, splits=("train",)), FileNotFoundError, "test, test.tar"),
        ("folder", lambda d: [(d / n).mkdir() for n in ("train", "test")], FileNotFoundError, "no images"),
        ("torch/cifar10", lambda d: None, FileNotFoundError, "No torch/cifar10"),
        ("torch/nothing", lambda d: None, ValueError, "torch/nothing"),
    ],
)
def test_missing_data_is_named(tmp_path, name, make, error, message):
    make(tmp_path)
    with pytest.raises(error, match=message):
        open_data(name, tmp_path)


def test_a_folder_is_needed_and_must_exist(tmp_path):
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="--data-dir"):
            open_data("folder", folder)


def test_differing_classes_are_named(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "fish")
    with pytest.raises(ValueError, match=r"\['cat', 'fish'\]"):
        open_data("folder", tmp_path)


def test_transform_normalises_resizes_and_converts():
    image = Image.new("RGB", (64, 40), (255, 0, 128))
    tensor = image_transform(32, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0))(image)
    assert tensor.shape == (3, 32, 32)
    torch.testing.assert_close(tensor[:, 5, 5], torch.tensor([1.0, -2.0, 128 / 255]))
    assert image_transform(16, (0.0,), (1.0,))(image).shape == (1, 16, 16)


def test_augmentation_moves_and_flips():
    image = Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32))
    plain = image_transform(32, (0.0,), (1.0,))(image)
    for augment in ("crop", "flip-crop"):
        seen = [image_transform(32, (0.0,), (1.0,), augment)(image) for _ in range(20)]
        assert any(not torch.equal(one, plain) for one in seen)
    assert torch.equal(image_transform(32, (0.0,), (1.0,))(image), plain)


def test_loaders_repeat_their_order_by_seed():
    dataset = list(range(10))

    def batches(seed):
        return [batch.tolist() for batch in create_loader(dataset, 4, seed)]

    assert batches(3) == batches(3) != batches(4)
    assert [len(batch) for batch in batches(3)] == [4, 4]
    assert [batch.tolist() for batch in create_loader(dataset, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(limit(dataset, 4)) == list(limit(dataset, 4))
    assert len(set(limit(dataset, 4))) == 4
    assert limit(dataset, None) is limit(dataset, 99) is dataset
