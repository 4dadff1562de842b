"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["creating", "replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to: synced and renamed over `path` on success, removed on failure.

    Args:
        path: the file to write; its folder is created.

    Yields:
        an empty file in the same folder, with the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _make_readable(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name is on the disk once its folder is
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def creating(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` to fill: renamed to it on success, removed on failure.

    Raises:
        FileExistsError: there is something in `folder` already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already, and nothing is overwritten; remove it or choose another.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        for path in (temporary, *temporary.iterdir()):
            _make_readable(path)
        os.replace(temporary, folder)  # an empty folder may be replaced
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(path: Path) -> None:
    """Temporary files are private; a result is to be as readable as any other file of the user."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
