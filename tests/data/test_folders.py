"""Class folders and tars: what is a class, what is a picture of it, in what order, and what is passed over."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from timm.data import create_dataset

from timm_ep.data.damaged import damaged_images, without_images
from timm_ep.data.datasets import open_data
from timm_ep.data.folders import ClassFolders, ClassTar, files_below

NAMES = ["cat/10.png", "cat/9.png", "Dog 2/a.JPG", "Dog 10/x.jpeg", "Dog 10/B.png", "Dog 10/a.png"]


def png(value=0):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def write(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def make_tar(path, files, links=()):
    """`files`: name → content; `links`: (name, target, kind)."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.linkname, info.type = target, kind
            tar.addfile(info)
    return path


def contents(pictures):
    return [(pictures.names[i], pictures.classes[pictures.targets[i]]) for i in range(len(pictures))]


def test_order_and_labels_are_those_of_timms_readers_where_these_read_all(tmp_path):
    """So that runs of before go on with the same images."""
    folder = write(tmp_path / "a", NAMES)
    tar = make_tar(tmp_path / "b.tar", {name: png() for name in NAMES})
    for path, ours in ((folder, ClassFolders(folder)), (tar, ClassTar(tar))):
        reader = create_dataset("", str(path)).reader
        theirs = (
            [str(Path(reader.filename(index, absolute=True)).relative_to(folder)) for index in range(6)]
            if (path == folder)
            else [reader.filename(index) for index in range(6)]
        )
        assert ours.names == theirs
        labels = [label for _, label in reader.samples] if path == folder else reader.targets.tolist()
        assert ours.targets == labels
        assert ours.classes == ("cat", "Dog 2", "Dog 10")


def test_names_that_differ_in_case_alone_or_hold_odd_digits_have_an_order(tmp_path):
    names = ["a/1²3.png", "a/٣.png", "a/A.png", "a/a.png"]
    assert ClassFolders(write(tmp_path, reversed(names))).names == names


def test_a_tar_may_have_one_folder_around_all_of_it_tars_in_it_and_links(tmp_path):
    inner = make_tar(tmp_path / "inner", {"x/1.png": png(7), "2.png": png(8)}).read_bytes()
    links = [
        ("./all/cat/hard.png", "./all/cat/1.png", tarfile.LNKTYPE),
        ("./all/cat/soft.png", "../cat/1.png", tarfile.SYMTYPE),
        ("./all/cat/lost.png", "nowhere.png", tarfile.SYMTYPE),
    ]
    files = {
        "./all/cat/1.png": png(5),
        "./all/cat/._1.png": b"x",
        "./all/__MACOSX/1.png": b"x",
        "./all/cat/readme.txt": b"x",
        "./all/dog.tar": inner,
    }
    pictures = ClassTar(make_tar(tmp_path / "all.tar", files, links))
    assert contents(pictures) == [
        ("cat/1.png", "cat"),
        ("cat/hard.png", "cat"),
        ("cat/soft.png", "cat"),
        ("dog/2.png", "dog"),
        ("dog/x/1.png", "dog"),
    ]
    assert [pictures[index][0].getpixel((0, 0))[0] for index in range(5)] == [5, 5, 5, 8, 7]
    assert pictures.passed_over == {"hidden": 2, ".txt": 1, "link to nothing, or no file": 1}


def test_a_tar_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is no whole, uncompressed tar"):
        ClassTar(tmp_path / "a.tar")
    whole = make_tar(tmp_path / "b.tar", {"cat/1.png": png(), "cat/2.png": png()}).read_bytes()
    for cut in (whole[:1400], whole[:1560], whole[:1024] + b"x" + whole[1025:]):
        (tmp_path / "b.tar").write_bytes(cut)
        with pytest.raises(ValueError, match=r"b\.tar is no whole, .*(it is cut off, or|unexpected end)"):
            ClassTar(tmp_path / "b.tar")


def test_loops_end_and_what_is_passed_over_is_counted(tmp_path):
    write(tmp_path / "data", ["cat/1.png", ".git/2.png", "cat/Thumbs.db"])
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "cat" / "lost").symlink_to("nowhere")
    passed_over = Counter()
    assert list(files_below(tmp_path / "data", passed_over)) == ["cat/1.png"]
    assert passed_over == {"hidden": 2, "link back to a folder above": 1, "broken link": 1}


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", b"a\xffb"])
def test_names_of_classes_that_cannot_be_shown_are_refused(tmp_path, name):
    import os

    folder = os.path.join(os.fsencode(tmp_path), name if isinstance(name, bytes) else name.encode())
    os.mkdir(folder)
    with open(os.path.join(folder, b"1.png"), "wb") as file:
        file.write(png())
    with pytest.raises(ValueError, match=r"the name of the class folder 'a\\.*b' is not text that can be shown"):
        ClassFolders(tmp_path)


def test_labels_of_tests_follow_the_classes_of_training(tmp_path):
    write(tmp_path, ["train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png", "test/a/1.png"])
    data = open_data("folder", tmp_path)
    assert [data.test[index][1] for index in range(2)] == [0, 2]
    assert data.test.classes == data.classes == ("a", "b", "c")
    assert data.notes == ("test: no image of 1 classes, such as b",)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/a/1.png", "val/a/1.png"], ("val", "val")),
        (["train/a/1.png", "VAL/a/1.png", "Test/a/1.png"], ("VAL", "Test")),
        (["train/a/1.png", "test/a/1.png"], (None, "test")),
    ],
)
def test_which_folder_is_for_what(tmp_path, names, expected):
    data = open_data("folder", write(tmp_path, names))
    found = [part and part.root.name for part in (data.validation, data.test)]
    assert tuple(found) == expected
    assert (data.validation is data.test) == (expected[0] == expected[1])


@pytest.mark.parametrize("other", ["Train", "training", "training.tar"])
def test_two_folders_that_may_both_be_meant_are_refused(tmp_path, other):
    write(tmp_path, ["train/a/1.png", "test/a/1.png", f"{other}/a/1.png"])
    if other.endswith(".tar"):
        (tmp_path / other).rename(tmp_path / "x")
        make_tar(tmp_path / other, {"a/1.png": png()})
    with pytest.raises(ValueError, match="either of which may be the train images"):
        open_data("folder", tmp_path)


def test_a_tar_beside_the_folder_that_was_unpacked_from_it_is_left_alone(tmp_path):
    write(tmp_path, ["train/a/1.png", "test/a/1.png"])
    (tmp_path / "train.tar").write_bytes(b"")
    assert open_data("folder", tmp_path).train.root == tmp_path / "train"


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_found_by_shares_and_left_out_by_name(tmp_path, workers):
    names = [f"{part}/{label}/{index}.png" for part in ("train", "val") for label in "ab" for index in range(5)]
    write(tmp_path, names)
    bad = {"train/a/3.png", "train/b/0.png", "test/b/4.png"}  # the validation images are tested on
    for name in bad:
        (tmp_path / name.replace("test", "val")).write_bytes(b"no picture")
    source = open_data("folder", tmp_path)
    shares = [damaged_images(source, workers, rank, 2) for rank in range(2)]
    assert not shares[0].keys() & shares[1].keys()
    found = shares[0] | shares[1]
    assert found.keys() == bad
    assert all("is not an image that Pillow can read" in reason for reason in found.values())
    left = without_images(source, list(found))
    assert (len(left.train), len(left.test)) == (8, 9)
    assert left.validation is left.test
    assert [label for _, label in left.train] == [0] * 4 + [1] * 4
    assert without_images(left, []).train is left.train  # which is of another kind by now, and stays as it is
