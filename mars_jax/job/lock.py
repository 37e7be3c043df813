"""Who holds a run directory: a lock of the file system, or a file with a process's name where it has none.

Some network file systems have no locks (Lustre mounted without `flock`, NFS without its daemon, some FUSE mounts).
There the process that made the file `lock.owner` holds the directory until it removes it, or until it is gone. Whether
a process of another machine still lives can't be seen from here, so that one is believed.
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
from mars_jax.runtime.jsonfiles import refuse_special

LOCK, OWNER = "lock", "lock.owner"
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
        OSError: the lock can't be written.
    """
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
    for name in (LOCK, OWNER):
        refuse_special(directory / name)
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
    return _owner(directory)


@contextmanager
def _owning(directory: Path) -> Iterator[None]:
    file = directory / OWNER
    text = f"{os.getpid()} {socket.gethostname()}"
    if not (other := _owner(directory)):
        file.unlink(missing_ok=True)
    try:
        with file.open("x") as owner:
            owner.write(text)
    except FileExistsError:
        raise _in_use(directory, other or _owner(directory) or Holder(None), file) from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _owner(directory: Path) -> Holder | None:
    """The process that a file of an owner names, unless it ran here and is gone."""
    try:
        process, _, machine = (directory / OWNER).read_text(errors="replace").partition(" ")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
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
