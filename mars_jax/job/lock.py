"""Who holds a run directory: a lock of the file system, or a file with a process's name where it has none.

Some network file systems have no locks (Lustre mounted without `flock`, NFS without its daemon, some FUSE mounts).
There the process that made the file `lock.owner` holds the directory until it removes it, or until it is gone. Who
takes over from one that is gone makes `lock.owner.claim` first, so that two can't at once. Whether a process of another
machine still lives can't be seen from here, so that one is believed.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mars_jax.errors import ConfigError
from mars_jax.runtime.durable import refuse_special

LOCK, OWNER = "lock", "lock.owner"
CLAIM = "lock.owner.claim"  # while a process takes over from one that is gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESTALE, errno.EIO)


@dataclass(frozen=True)
class Holder:
    """A process that holds a run directory.

    Attributes:
        process: its id; None where that can't be read.
        machine: where it runs, if not here.
    """

    process: int | None
    machine: str | None = None

    def __str__(self) -> str:
        here = f"process {self.process or '(unknown)'}"
        return f"{here} on {self.machine}" if self.machine else here


@contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Holds a directory for this process alone.

    Raises:
        ConfigError: another process holds it.
        DataError: a pipe, a socket or a device lies in the place of a file.
        OSError: the lock can't be written.
    """
    _refuse_special(directory)
    with (directory / LOCK).open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(directory, holder(directory) or Holder(None)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            with _owning(directory):
                yield
            return
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        yield


def holder(directory: Path) -> Holder | None:
    """The process that holds a directory, if one does.

    Raises:
        DataError: a pipe, a socket or a device lies in the place of a file.
    """
    _refuse_special(directory)
    try:
        with (directory / LOCK).open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = lock.read(20)
                return Holder(int(text) if text.isdigit() else None)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        pass
    owner = _text(directory / OWNER)
    return None if owner is None else _owner(owner)


def _refuse_special(directory: Path) -> None:
    for name in (LOCK, OWNER, CLAIM):
        refuse_special(directory / name)


@contextmanager
def _owning(directory: Path) -> Iterator[None]:
    file, claim = directory / OWNER, directory / CLAIM
    if _is_left(_text(file)):
        # Whoever reads this late must not remove the file of another that took the directory over in between.
        with _own_file(directory, claim):
            if _is_left(_text(file)):
                file.unlink()
    with _own_file(directory, file):
        yield


@contextmanager
def _own_file(directory: Path, file: Path) -> Iterator[None]:
    """Makes a file that names this process, and removes it at the end if it still does.

    Raises:
        ConfigError: there is one already.
    """
    own = f"{os.getpid()} {socket.gethostname()}"
    try:
        with file.open("x") as opened:
            opened.write(own)
    except FileExistsError:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file)) from None
        raise _in_use(directory, _owner(_text(file) or "") or Holder(None), file) from None
    try:
        yield
    finally:
        if _text(file) == own:
            file.unlink()


def _text(file: Path) -> str | None:
    """What a file of an owner holds; None where there is none."""
    try:
        return file.read_text(errors="replace")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _is_left(text: str | None) -> bool:
    """Whether a file of an owner is there, and its process ran here and is gone."""
    return text is not None and _owner(text) is None


def _owner(text: str) -> Holder | None:
    """The process that a file of an owner names, unless it ran here and is gone."""
    process, _, machine = text.partition(" ")
    number = int(process) if process.isdigit() and len(process) < 12 else None
    if machine != socket.gethostname():
        return Holder(number, machine or "(unknown)")
    try:
        os.kill(number or 0, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return Holder(number)


def _in_use(directory: Path, other: Holder, file: Path | None = None) -> ConfigError:
    gone = f" If that process is gone, delete {file}." if file else ""
    return ConfigError(
        f"run directory {directory} is in use by {other}. Wait for it, stop it, or set another run_dir.{gone}"
    )
