"""What every benchmark shares: a quiet machine, interleaved timing, and one JSON file a result.

What is measured, and against what, is each benchmark's own business.
"""

import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mars_jax.runtime.jsonfiles import dump_json, write_json

RESULTS = Path(__file__).parents[1] / "results"
MAX_FOREIGN_CORES = 0.5

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")


def write_result(
    name: str, figure: float, unit: str, goal: str, command: str, detail: Mapping[str, Any], folder: Path = RESULTS
) -> dict[str, Any]:
    """Writes `folder/<name>.json` and prints it on stdout.

    Args:
        name: the benchmark's id, such as "xla_flops".
        figure: the headline number.
        unit: what the figure counts.
        goal: what it should reach, in words.
        command: the command line that makes the file again.
        detail: everything behind the figure.
        folder: where the file goes.
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


@dataclass(frozen=True)
class Timings:
    """Seconds of one side, a repeat each."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """The lists with their medians and minima."""
        sides = {"wall": self.wall, "cpu": self.cpu}
        return {
            f"{name}_seconds": {"all": list(times), "median": statistics.median(times), "minimum": min(times)}
            for name, times in sides.items()
        }


def interleave(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[Timings, Timings]:
    """Times two thunks A-B-B-A, so that slow drift of the machine falls on both.

    Args:
        a: the first side; it must wait for its own work (`jax.block_until_ready`).
        b: the second side.
        repeats: calls of each.

    Returns:
        Timings of a and of b, in the order of their calls; CPU seconds are of all threads of this process.
    """
    seconds: tuple[list[tuple[float, float]], ...] = ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            (a, b)[side]()
            seconds[side].append((time.perf_counter() - wall, time.process_time() - cpu))
    first, second = (Timings(*map(tuple, zip(*pairs, strict=True))) for pairs in seconds)
    return first, second


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
