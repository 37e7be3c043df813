"""JAX's persistent compilation cache in a safe folder, and a counter of compiles.

The programs in such a folder are executed, so it must belong to the user alone. XLA compiles for the exact kind of CPU,
so each kind has a folder of its own.
"""

import hashlib
import os
import platform
import re
import stat
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from mars_jax.errors import ConfigError

# JAX's defaults leave out programs that compile in under a second: most of a probe's.
_THRESHOLDS = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
_CHECKED = "checked"
_CPU_KEYS = re.compile(r"(vendor_id|cpu( family)?|model|model name|stepping|flags|Features|CPU [a-z]+)\s*:")
_ZSTD = b"\x28\xb5\x2f\xfd"
_PROGRAM = "/jax/core/compile/backend_compile_duration"  # recorded for compiles and for cache hits
_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


def enable(directory: Path | None = None) -> str:
    """Turns on JAX's persistent compilation cache for this process; programs compiled earlier stay as they are.

    On a CPU with AVX-512, XLA logs a false error for each program that it loads from the cache (openxla/xla#44565),
    unless TF_CPP_MIN_LOG_LEVEL is 3 before JAX is imported.

    Args:
        directory: folder of the programs; made if absent. None: $JAX_COMPILATION_CACHE_DIR, unchecked, where the user
            has set it; else `mars_jax/xla-<hash>` in $XDG_CACHE_HOME or ~/.cache, with a hash of the CPU, the system
            and jaxlib.

    Returns:
        The folder, or the address that the user has set.

    Raises:
        ConfigError: the folder can't be made or written, belongs to someone else, or others may write to it. The
            process is unchanged: work can go on without the cache.
    """
    user_setting = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    address = user_setting if directory is None and user_setting else str(_prepared_folder(directory))
    for name, value in _THRESHOLDS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", address)
    # JAX opens its cache once; a folder set later would be ignored.
    compilation_cache.reset_cache()
    return address


@dataclass
class CompileCounter:
    """Counts the programs that this process compiles while a `with` block runs.

    >>> with CompileCounter() as counter:
    ...     _ = jax.jit(lambda x: x + 1)(1.0)
    >>> counter.compiles + counter.hits == len(counter.programs) > 0
    True

    Attributes:
        programs: names of the programs that JAX requested from its backend, in order; programs that this process has
            in memory already aren't requested.
        hits: programs read from the persistent cache.
        misses: programs compiled and then written to it; 0 where it is off.
        seconds: wall time of compiles and hits, without tracing and lowering.
    """

    programs: list[str] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    seconds: float = 0.0

    @property
    def compiles(self) -> int:
        """Programs that were compiled because the cache lacked them."""
        return len(self.programs) - self.hits

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_listener(self._on_event)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def _on_event(self, event: str, **_: str | int) -> None:
        self.hits += event == _HIT
        self.misses += event == _MISS

    def _on_duration(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == _PROGRAM:
            self.programs.append(str(details.get("fun_name", "")))
            self.seconds += duration_secs


def _prepared_folder(directory: Path | None) -> Path:
    """Makes and checks the folder, and deletes truncated entries in it."""
    folder = (_default_folder() if directory is None else directory).absolute()
    try:
        folder = folder.resolve()
        if directory is None:
            _make_private(folder.parent)
        _make_private(folder)
        _delete_truncated(folder)
    except OSError as error:
        raise _refusal(folder, f"{error.strerror} ({error.filename})") from None
    return folder


def _default_folder() -> Path:
    # The XDG rule: a relative path is to be ignored.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        root = Path("~/.cache")
        try:
            root = root.expanduser()
        except RuntimeError:
            raise _refusal(root, "this user has no home") from None
    # JAX's key of a program includes the backend and its version; asking for them here would start the devices.
    parts = [_cpu(), platform.system(), platform.machine(), jaxlib.__version__]
    return root / "mars_jax" / f"xla-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _cpu() -> str:
    """Identifies the kind of CPU, or this machine where the kind can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.processor()} of {platform.node()}"
    return "\n".join(sorted({line for line in lines if _CPU_KEYS.match(line)}))


def _make_private(folder: Path) -> None:
    """Makes the folder for this user alone, or checks an existing one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise _refusal(folder, f"it belongs to user {status.st_uid}, not to you, and what it holds is executed")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise _refusal(folder, f"others may write to it (mode {mode:o}), and what it holds is executed; chmod 700 it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(folder, "you can't write to it")


def _refusal(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"can't keep compiled programs in {folder}: {reason}. "
        "Set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder that only you can write."
    )


def _delete_truncated(folder: Path) -> None:
    """Deletes entries that a kill or a full disk truncated: JAX would warn of them each time, and never replace them.

    Entries that an earlier call has checked are not read again.
    """
    now = time.time()
    marker = folder / _CHECKED
    since = marker.stat().st_mtime if marker.exists() else 0.0
    for entry in folder.glob("*-cache"):
        try:
            if entry.stat().st_mtime >= since and not _is_complete(entry.read_bytes()):
                entry.unlink()
        except FileNotFoundError:
            continue  # another process has deleted it
    marker.touch(mode=0o600)
    os.utime(marker, (now, now))


def _is_complete(compressed: bytes) -> bool:
    if compressed.startswith(_ZSTD):
        return True  # can't be checked without the zstandard library
    try:
        zlib.decompress(compressed)
    except zlib.error:
        return False
    return True
