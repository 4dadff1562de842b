"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["creating", "only_one", "remove_unfinished", "replacing"]

_LOCK_SECONDS = 3.0  # a killed owner's own processes, which hold the lock too, end in less


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
        with _named(path):
            yield temporary
        _make_readable(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)  # the new name is on the disk once its folder is
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left beside `path` when they were about to replace it."""
    path = Path(path)
    for left in path.parent.glob(f".{escape(path.stem)}-{'?' * 8}{escape(path.suffix)}"):  # as `tempfile` names it
        left.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the system that names no file, such as that the disk is full, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def creating(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` to fill: renamed to it on success, removed on failure.

    Raises:
        FileExistsError: there is something in `folder` already.
    """
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there; remove it or make that."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already, and nothing is overwritten; remove it or choose another.")
    there = folder.is_dir()  # where one works in it, or something is mounted on it, it cannot be replaced but filled
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder if there else folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        for path in (temporary, *temporary.iterdir()):
            _make_readable(path)
        if there:
            for path in list(temporary.iterdir()):
                os.replace(path, folder / path.name)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_one(folder: str | os.PathLike[str]) -> Iterator[None]:
    """While inside, no other process is: the lock ends with its owner, however that ends.

    Args:
        folder: to lock; made if need be, and removed again on failure if nothing else was written to it.

    Raises:
        FileExistsError: another process is inside, or it is a file.
    """
    folder = Path(folder)
    made = not folder.exists()
    if not made and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder, or a name that is free for one.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        raise FileExistsError(
            f"Another process is writing to {folder}; wait for it or stop it, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise
        warnings.warn(f"{folder} cannot be locked ({error}): start nothing else there.", stacklevel=3)
    try:
        yield
    except BaseException:
        if made and not [other for other in folder.iterdir() if other != path]:
            path.unlink(missing_ok=True)
            folder.rmdir()
        raise
    finally:
        lock.release()


def _sync(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # not every file system can, such as those over a network
        warnings.warn(
            f"{folder} cannot be synced ({error}): after a power cut the newest file may be lost.", stacklevel=4
        )


def _make_readable(path: Path) -> None:
    """Temporary files are private; a result is to be as readable as any other file of the user."""
    umask = os.umask(0)
    os.umask(umask)
    try:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    except OSError as error:  # not every file system has permissions
        warnings.warn(f"The permissions of {path.name} cannot be set ({error}).", stacklevel=4)
