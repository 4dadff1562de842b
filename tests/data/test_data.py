import io
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from timm_ep.data.datasets import labels_of, limit, open_data, split_off
from timm_ep.data.loader import EpochOrder, Samples, training_loader
from timm_ep.data.transforms import image_transform


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
    with pytest.raises(ValueError, match=r"train lacks \['fish'\]; .*test lacks \['cat'\]"):
        open_data("folder", tmp_path)


def test_differing_classes_of_torchvisions_folders_are_named(tmp_path):
    """They are numbered in each part by themselves: `ape` would be `cat`."""
    make_folders(tmp_path, splits=("train", "val"))
    assert open_data("torch/image_folder", tmp_path).classes == ("cat", "dog")
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "ape")
    with pytest.raises(ValueError, match=r"training images lacks \['ape'\]; .*test images lacks \['cat'\]"):
        open_data("torch/image_folder", tmp_path)


def test_a_model_is_tested_without_training_images(tmp_path):
    """The labels are the model's; classes that it does not know are refused."""
    make_folders(tmp_path, classes=("dog",), splits=("test",))
    data = open_data("folder", tmp_path, ["bird", "cat", "dog"])
    assert (data.train, data.classes, labels_of(data.test)) == (None, ("bird", "cat", "dog"), [2, 2, 2])
    assert any("no image of 2 classes, such as bird" in note for note in data.notes)
    with pytest.raises(ValueError, match=r"the model lacks \['dog'\]"):
        open_data("folder", tmp_path, ["bird", "cat"])


def test_transform_normalises_resizes_and_converts():
    image = Image.new("RGB", (64, 40), (255, 0, 128))
    tensor = image_transform(32, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0))(image)
    assert tensor.shape == (3, 32, 32)
    torch.testing.assert_close(tensor[:, 5, 5], torch.tensor([1.0, -2.0, 128 / 255]))
    assert image_transform(16, (0.0,), (1.0,))(image).shape == (1, 16, 16)


def test_a_subset_is_fixed():
    dataset = list(range(10))
    assert list(limit(dataset, 4)) == list(limit(dataset, 4))
    assert len(set(limit(dataset, 4))) == 4
    assert limit(dataset, None) is limit(dataset, 99) is dataset


def test_the_validation_split_is_stratified_fixed_and_apart_from_training():
    train = open_data("digits").train
    kept, aside = split_off(train, 0.1)
    assert (len(kept), len(aside)) == (1293, 144)
    assert not set(kept.indices) & set(aside.indices)
    assert set(kept.indices) | set(aside.indices) == set(range(len(train)))
    assert aside.indices == split_off(train, 0.1)[1].indices
    share = np.bincount(labels_of(aside)) / np.bincount(labels_of(train))
    assert np.abs(share - 0.1).max() < 0.01
    nested_kept, nested_aside = split_off(limit(train, 50), 0.5)
    assert (len(nested_kept), len(nested_aside)) == (25, 25)
    for share in (0.0001, 1.0):
        with pytest.raises(ValueError, match=f"val_split={share}"):
            split_off(train, share)


def test_labels_are_known_without_reading_images(tmp_path):
    make_folders(tmp_path)
    data = open_data("folder", tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_text("no image")
    assert labels_of(data.train) == [0, 0, 0, 1, 1, 1]
    assert labels_of([("image", 3)]) is None


@pytest.mark.parametrize("content", [b"not an image", None])
def test_an_unreadable_image_is_named(tmp_path, content):
    """Text, or a picture that is cut off: no other image silently takes its place."""
    make_folders(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    data = open_data("folder", tmp_path)
    assert data.train[3][1] == 1
    data.train.transform = data.test.transform = image_transform(32, (0.0,), (1.0,))
    for workers in (0, 1):  # without the tracebacks of the process that met it
        with pytest.raises(ValueError, match=r"^\S*dog/1\.png is not an image that Pillow can read.*Repair or remove"):
            list(DataLoader(data.train, 2, num_workers=workers))


def test_a_tar_is_read_by_several_processes_at_once(tmp_path):
    make_folders(tmp_path / "folders", count=40)
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "folders" / split, arcname=".")
    data = open_data("folder", tmp_path)
    assert data.train[0][1] == 0  # open before the others are forked
    data.train.transform = image_transform(32, (0.0,), (1.0,))
    one, several = ([images for images, _ in DataLoader(data.train, 8, num_workers=workers)] for workers in (0, 2))
    assert all(torch.equal(*pair) for pair in zip(one, several, strict=True))


def test_hugging_face_datasets_by_name(tmp_path):
    """A local folder in the layout of the Hub; the columns and the splits are found."""
    pytest.importorskip("datasets")
    make_folders(tmp_path / "pets", splits=("train", "validation"))
    data = open_data(f"hfds/{tmp_path / 'pets'}", tmp_path / "cache")
    assert (data.classes, data.channels) == (("cat", "dog"), 3)
    assert (len(data.train), len(data.test), labels_of(data.test)) == (6, 6, [0, 0, 0, 1, 1, 1])
    assert data.train[0][0].size == (40, 36)
    with pytest.raises(FileNotFoundError, match="hfds/"):
        open_data(f"hfds/{tmp_path / 'nothing'}", tmp_path / "cache")


def test_hidden_labels_of_the_hub_test_nothing(tmp_path):
    """-1 for all images of a test split: the validation images are tested on then, and without any nothing is."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, labels in {"train": [0, 1, 0], "validation": [1, 0], "test": [-1, -1]}.items():
        rows = {"image": [{"bytes": image_bytes(40 * i), "path": None} for i in range(len(labels))], "label": labels}
        path = tmp_path / "pets" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    data = open_data(f"hfds/{tmp_path / 'pets'}", tmp_path / "cache")
    assert labels_of(data.test) == labels_of(data.validation) == [1, 0]
    assert "split test, has no labels; tested is on the validation images" in data.notes[0]


@pytest.mark.slow
def test_workers_go_on_when_a_job_is_told_to_end():
    """SIGTERM goes to every process of a job; the trainer asks for the batches under way, and ends its workers."""
    samples = Samples([(image, 0) for image in torch.arange(64.0)], torch.as_tensor, 0)
    loader = training_loader(samples, EpochOrder(64, 4, 0), workers=1)
    batches = iter(loader)
    first = next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    assert sorted(torch.cat([first[0], *(images for images, _, _ in batches)]).tolist()) == list(range(64))
