"""Files that are on the disk before anything says so: synced, replaced whole or not at all, and known by their content.

After a power cut a file that was written and renamed without a sync may be there and empty. So contents are synced
before the rename, and the folder after it: once a document, a phase or a checkpoint, never once a line.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mars_jax.errors import DataError

_TEMPORARY = re.compile(r".+\.\d+\.tmp")
_CHECKPOINT_TEMPORARY = ".orbax-checkpoint-tmp"
# A folder can't be synced on some network file systems, which have no such operation.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
# File systems tell times apart by some milliseconds, network file systems by up to two seconds.
_GRAIN_NS = 2 * 10**9

Stamp = tuple[int, int, int, int]
"""Size, times of the last write and the last change, and inode: what changes with a file's content."""


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        sha256: of its bytes.
        bytes: their number.
    """

    sha256: str
    bytes: int


def content_of(path: Path) -> Content:
    """Reads a file for its checksum, unless this process has read it and nothing was written to it since."""
    with naming(path):
        stamp = stamp_of(path, time.time_ns())
    return _content_at(path, stamp) if stamp else _content(path)


def stamp_of(path: Path, before_ns: int) -> Stamp | None:
    """The stamp of a file; None where a change after `before_ns` could come within the same tick of the clock."""
    status = path.stat()
    if max(status.st_mtime_ns, status.st_ctime_ns) > before_ns - _GRAIN_NS:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@cache
def _content_at(path: Path, stamp: Stamp) -> Content:
    return _content(path)


def _content(path: Path) -> Content:
    with naming(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Content(digest, file.tell())


def sync(path: Path) -> None:
    """Has a file, or the list of names in a folder, on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not (path.is_dir() and error.errno in _NO_SYNC):
                raise
        finally:
            os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Has a file or a folder with all that is in it on the disk, and the name that it has in its own folder."""
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
    else:
        sync(path)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it that are not there yet, on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


@contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Gives a temporary path, whose file takes the place of `path` if the block ends well, and is removed otherwise.

    Args:
        path: of the file; its folder is made.
        synced: whether the file must outlast a power cut once the block has ended.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            if synced:
                sync(temporary)
            os.replace(temporary, path)
            if synced:
                sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder, whose files go to `folder` if the block ends well; it is removed in any case.

    Files of the same names are replaced, others stay. All are on the disk before the first is moved.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    make_folder(temporary)
    try:
        with naming(folder, temporary):
            yield temporary
            sync_tree(temporary)
            make_folder(folder)
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
            sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders that killed writers left in a folder or below; refuses what is no file.

    Raises:
        DataError: as `refuse_special`.
    """
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            if not (_TEMPORARY.fullmatch(name) or _CHECKPOINT_TEMPORARY in name):
                refuse_special(path)
            elif name in folders:
                folders.remove(name)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def refuse_special(path: Path) -> None:
    """Refuses a pipe, a socket, a device or a link to one in the place of a file: reading it may never end.

    Raises:
        DataError: it is one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path} is a pipe, a socket or a device where a file belongs. Move it away, and run the command again."
        )


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Adds the path to an `OSError` without one, as those of `write`, or with that of its temporary file."""
    try:
        yield
    except OSError as error:
        if not error.filename or (temporary and str(error.filename).startswith(str(temporary))):
            error.filename, error.filename2 = str(path), None
        raise
