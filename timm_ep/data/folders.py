"""Class folders: pictures in `cat/`, `dog/` and so on, in a folder or in a tar.

The readers of timm and torchvision take the last folder of a path for the class, read three kinds of files, and say
nothing of others. Here the first folder is the class, whatever is below it.
"""

import io
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from timm_ep.base.text import in_order, is_plain_text, same_name
from timm_ep.data.pictures import PICTURE_SUFFIXES, Pictures

__all__ = ["ClassFolders", "ClassTar", "files_below", "is_picture", "passed_over_line"]

# What systems leave in folders, besides names that begin with a dot.
_HIDDEN = {"thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "@eadir", "lost+found", "$recycle.bin"}


def files_below(folder: Path, passed_over: Counter[str]) -> Iterator[str]:
    """The files in a folder and all folders below it, by paths from there with `/`.

    Links are followed, but not back to a folder that they are in. What is hidden is left out.

    Args:
        folder: to look through.
        passed_over: counts what is left out, by kind.
    """
    yield from _files_below(os.fspath(folder), "", frozenset([os.path.realpath(folder)]), passed_over)


def _files_below(folder: str, prefix: str, above: frozenset[str], passed_over: Counter[str]) -> Iterator[str]:
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _is_hidden(name):
            passed_over["hidden"] += 1
        elif os.path.isdir(path):
            if (real := os.path.realpath(path)) in above:
                passed_over["link back to a folder above"] += 1
            else:
                yield from _files_below(path, f"{prefix}{name}/", above | {real}, passed_over)
        elif os.path.isfile(path):
            yield prefix + name
        else:
            passed_over["broken link" if os.path.islink(path) else "no file"] += 1


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def is_picture(name: str, passed_over: Counter[str]) -> bool:
    """Whether a file's name is that of a picture; counts it otherwise."""
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in PICTURE_SUFFIXES:
        passed_over[suffix or "without a suffix"] += 1
        return False
    return True


def passed_over_line(where: str | Path, passed_over: Counter[str]) -> list[str]:
    """One line that says what was passed over, or none."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    return [f"{where}: passed over {kinds}"] if kinds else []


class _Classified(Pictures):
    """Pictures by the first folder of their paths.

    Args:
        root: folder or tar.
        names: of all files in it, with `/`.
        passed_over: what has been left out so far.

    Attributes:
        names: of the pictures.
        passed_over: what is left out, by kind.
    """

    def __init__(self, root: Path, names: Iterable[str], passed_over: Counter[str]) -> None:
        self.root, self.passed_over = root, passed_over
        self.names: list[str] = []
        for name in sorted(names, key=in_order):
            if is_picture(name, passed_over):
                if "/" in name:
                    self.names.append(name)
                else:
                    passed_over["picture beside the class folders"] += 1
        if not self.names:
            raise FileNotFoundError(
                f"{root} holds no images in class folders: expected a folder for each class, with pictures such as "
                f"{root}/cat/1.png. {'; '.join(passed_over_line('Of it', passed_over))}".rstrip()
            )
        labels = [same_name(name.partition("/")[0]) for name in self.names]
        self.classes = tuple(sorted(set(labels), key=in_order))
        for label in self.classes:
            if not is_plain_text(label):
                raise ValueError(
                    f"{root}: the name of the class folder {label!a} is not text that can be shown (it is not "
                    "UTF-8, or has control characters); rename it."
                )
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.targets = [numbers[label] for label in labels]

    def renumber(self, classes: tuple[str, ...]) -> None:
        """Label the images by the order of `classes`, which holds all of theirs."""
        numbers = [classes.index(name) for name in self.classes]
        self.targets, self.classes = [numbers[label] for label in self.targets], classes

    def name(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def key(self, index: int) -> str:
        return self.names[index]


class ClassFolders(_Classified):
    """Pictures in class folders, with links followed.

    Args:
        root: folder of the class folders.

    Raises:
        FileNotFoundError: no picture in it.
        ValueError: a class folder whose name is no text.
    """

    def __init__(self, root: Path) -> None:
        passed_over: Counter[str] = Counter()
        super().__init__(root, files_below(root, passed_over), passed_over)
        held = {name.partition("/")[0] for name in self.names}
        for name in os.listdir(root):
            if name not in held and not _is_hidden(name) and os.path.isdir(root / name):
                passed_over[f"folder without pictures ({name!a})"] += 1

    def open(self, index: int) -> IO[bytes]:
        return open(self.name(index), "rb")


class ClassTar(_Classified):
    """Pictures in class folders of a tar, or in tars in it, one a class; one folder around all of them is no class.

    Args:
        root: path of the tar, which is not compressed.

    Raises:
        FileNotFoundError: no picture in it.
        ValueError: no such tar, or a class folder whose name is no text.
    """

    def __init__(self, root: Path) -> None:
        passed_over: Counter[str] = Counter()
        self._places: dict[str, tuple[int, int]] = {}  # first byte and size
        try:
            with tarfile.open(root, "r:") as tar:
                self._list(tar, "", 0, passed_over)
        except tarfile.TarError as error:
            raise ValueError(f"{root} is no whole, uncompressed tar: {error}.") from error
        pictures = [name for name in self._places if posixpath.splitext(name)[1].lower() in PICTURE_SUFFIXES]
        if len({name.partition("/")[0] for name in pictures}) == 1 and all(name.count("/") > 1 for name in pictures):
            self._places = {name.partition("/")[2] or name: place for name, place in self._places.items()}
        super().__init__(root, self._places, passed_over)

    def _list(self, tar: tarfile.TarFile, prefix: str, start: int, passed_over: Counter[str]) -> None:
        members = {posixpath.normpath(member.name): member for member in tar}
        # Python takes a damaged header for the end, and a file that is cut off for whole.
        file: Any = tar.fileobj
        size, end = file.seek(0, os.SEEK_END), file.seek(tar.offset)
        if end > size or file.read(512).strip(b"\0"):
            raise tarfile.ReadError(f"it is cut off, or damaged after {len(members)} members")
        for name, member in members.items():
            if member.isdir():
                continue
            if any(map(_is_hidden, name.split("/"))):
                passed_over["hidden"] += 1
                continue
            target = _target(members, name)
            if target is None:
                passed_over["link to nothing, or no file"] += 1
            elif name.lower().endswith(".tar"):
                with tarfile.open(fileobj=tar.extractfile(target), mode="r:") as inner:
                    self._list(inner, f"{prefix}{name[:-4]}/", start + target.offset_data, passed_over)
            else:
                self._places[prefix + name] = start + target.offset_data, target.size

    def open(self, index: int) -> IO[bytes]:
        first, size = self._places[self.names[index]]
        with self.root.open("rb") as file:
            file.seek(first)
            return io.BytesIO(file.read(size))


def _target(members: dict[str, tarfile.TarInfo], name: str) -> tarfile.TarInfo | None:
    """The file that a member is or links to."""
    for _ in range(10):
        member = members.get(posixpath.normpath(name))
        if member is None or not (member.islnk() or member.issym()):
            return member if member is not None and member.isreg() else None
        beside = posixpath.dirname(member.name) if member.issym() else ""
        name = posixpath.join(beside, member.linkname)
    return None
