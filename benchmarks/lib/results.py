"""Result files, a quiet machine, and interleaved timing: what the benchmarks share.

It imports neither JAX nor torch, and measures nothing by itself.
"""

import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mars_jax.runtime.jsonfiles import dump_json, write_json

RESULTS = Path(__file__).parents[1] / "results"
MAX_FOREIGN_CORES = 0.5

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")

K = TypeVar("K")
T = TypeVar("T")


def write_result(
    name: str, figure: float, unit: str, goal: str, command: str, detail: Mapping[str, Any], folder: Path | None
) -> dict[str, Any]:
    """Prints a result on stdout, and writes it as `folder/<name>.json`.

    Args:
        name: the benchmark's id, such as "xla_flops": the name of its script.
        figure: the headline number.
        unit: what the figure counts.
        goal: what it should reach, in words; see `benchmarks.lib.tables.reached`.
        command: the command line that makes the file again.
        detail: everything behind the figure.
        folder: where the file goes; None: it is only printed.
    """
    document = {
        "id": name,
        "figure": figure,
        "unit": unit,
        "goal": goal,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "detail": dict(detail),
    }
    if folder is not None:
        write_json(folder / f"{name}.json", document)
    print(dump_json(document, indent=2))
    return document


def versions() -> dict[str, Any]:
    """Python, the installed packages that matter, and the machine; a package that isn't installed is null."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cpu": _cpu_model(), "cores": os.cpu_count()}


def foreign_load(seconds: float = 1.0) -> float:
    """Cores that other processes keep busy, on average over `seconds`.

    Raises:
        OSError: no /proc/stat (not Linux).
    """
    ticks, own = _busy_ticks(), time.process_time()
    start = time.perf_counter()
    time.sleep(seconds)
    elapsed = time.perf_counter() - start
    everyone = (_busy_ticks() - ticks) / os.sysconf("SC_CLK_TCK")
    return max(0.0, everyone - (time.process_time() - own)) / elapsed


def require_quiet(anyway: bool) -> float:
    """The foreign load, for the result file; ends the process when it would spoil timings, unless `anyway`."""
    load = foreign_load()
    if load > MAX_FOREIGN_CORES and not anyway:
        sys.exit(
            f"Other processes keep {load:.2f} cores busy, more than {MAX_FOREIGN_CORES}: timings would mislead. "
            f"Wait until the machine is quiet, or pass --anyway; the load is written into the result."
        )
    return load


class Seconds(NamedTuple):
    """Of one side in one round."""

    wall: float
    cpu: float  # of all threads of this process


def timed(call: Callable[[], T]) -> tuple[T, Seconds]:
    """The call's value and its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return value, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def rounds(sides: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """Calls every side once a round, forwards and backwards in turn (A-B-C, C-B-A), so that drift falls on all."""
    found: dict[K, list[T]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            found[name].append(sides[name]())
    return found


def spread(values: Iterable[float]) -> dict[str, Any]:
    """All values, their median and their minimum."""
    listed = list(values)
    return {"all": listed, "median": statistics.median(listed), "minimum": min(listed)}


def _busy_ticks() -> int:
    # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time.
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
