"""Lanes of the demo's model on a task, run once and kept in files: what the experiments on rules and ranks share.

Nothing is judged here. A file that is there is read in place of running its lanes again, so an experiment that was
stopped goes on when it is started again.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.lib.child import ROOT, Warnings, demo_config
from mars_jax.job.programs import Program
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.buckets import Bucket
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import Rates, Row
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.runtime.jsonfiles import read_json, write_json
from mars_jax.search.probes.design import readings
from mars_jax.search.probes.records import EPSILONS, lane_records
from mars_jax.search.probes.run import probe_schedule, run_probe_group, splice_probes

Rows = list[list[Row]]
NARROW = 8  # ranks up to this are run apart from wider ones

RULES: dict[str, ConvergenceRule] = {name: ConvergenceRule(name, epsilon) for name, epsilon in EPSILONS.items()}


def make_data(folder: Path, shift: Sequence[str]) -> Path:
    """Data of a task, by scripts/make_demo_data.py with some arguments."""
    if not (folder / "test.json").exists():
        script = str(ROOT / "scripts" / "make_demo_data.py")
        subprocess.run([sys.executable, script, "--out", str(folder), *shift], check=True, stdout=sys.stderr)
    return folder


def task_workspace(data: Path, *overrides: str) -> Workspace:
    """The demo's job on other data and with some settings changed; lanes never leave early."""
    files = [f"data.{name}={data / name}.json" for name in ("train", "validation", "test")]
    return Workspace(demo_config(data / "run", [*files, "probe.patience=null", *overrides]), Warnings())


def probe_rows(file: Path, workspace: Workspace, lanes: Sequence[Lane], rates: Sequence[Rates] | None = None) -> Rows:
    """Rows of all that is read off probes of the same data, with what remained for each module at every look.

    Args:
        file: of the rows.
        workspace: of the task.
        lanes: to run together, of which `reads` are read.
        rates: learning rates of each; None: the config's.
    """
    if file.exists():
        return [[_with_nan(row) for row in rows] for rows in read_json(file)]
    found: dict[int, Rows] = {}
    for places in by_width([lane.ranks for lane in lanes], wide=lambda over: any(over.values())):
        some = [lanes[place] for place in places]
        their_rates = None if rates is None else [rates[place] for place in places]
        found |= zip(places, _group_rows(workspace, some, their_rates), strict=True)
    rows = [rows for place in range(len(lanes)) for rows in found[place]]
    write_json(file, rows)
    return rows


def reads(workspace: Workspace, lanes: Sequence[Lane]) -> list[Lane]:
    """What is read off lanes: with nested sizes a lane for every D."""
    return [read for lane in lanes for read, _ in readings(workspace.config, lane)]


def _group_rows(workspace: Workspace, lanes: Sequence[Lane], rates: Sequence[Rates] | None) -> list[Rows]:
    program = one_program(workspace, lanes)
    schedule = probe_schedule(workspace)
    with TemporaryDirectory() as folder:
        size = program.engine.layout.size
        with Snapshots(Path(folder) / "adapters", schedule.looks, len(lanes), size) as snapshots:
            result = run_probe_group(workspace, program, lanes, schedule, rates, snapshots=snapshots)
            curves = [
                [row for row in rows if row["step"] <= steps]
                for lane, rows in zip(lanes, result.rows, strict=True)
                for _, steps in readings(workspace.config, lane)
            ]
            found = splice_probes(workspace, program, lanes, result, snapshots, reads(workspace, lanes), curves)
    each = len(found) // len(lanes)
    return [found[each * k : each * (k + 1)] for k in range(len(lanes))]


def by_width(vectors: Sequence[Mapping[str, int]], wide: Callable[[dict[str, bool]], Hashable]) -> list[list[int]]:
    """Places of rank vectors, grouped so that few are padded from a narrow rank to a wide one.

    Args:
        vectors: module -> rank.
        wide: the group of a vector, given which of its modules have a rank over `NARROW`.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, ranks in enumerate(vectors):
        groups.setdefault(wide({module: rank > NARROW for module, rank in ranks.items()}), []).append(place)
    return list(groups.values())


def one_program(workspace: Workspace, lanes: Sequence[Lane]) -> Program:
    """A program that runs the lanes as one group."""
    widest = {module: max(lane.ranks[module] for lane in lanes) for module in workspace.grids}
    devices = workspace.mesh.shape["lane"]
    engine = workspace.engine(widest, devices * math.ceil(len(lanes) / devices), workspace.default_lane_block)
    return Program(Bucket(tuple(lanes), widest, cached_encoder=False), (tuple(lanes),), engine)


def records_by(
    rule: ConvergenceRule | None, workspace: Workspace, lanes: Sequence[Lane], rows: Rows
) -> list[dict[str, Any]]:
    """Records of the lanes as a rule tells their times."""
    return lane_records(lanes, rows, rule, workspace.learning_rates())


def _with_nan(row: Mapping[str, Any]) -> Row:
    """A row read from JSON, which has null where a drift was not a number."""
    drift = {module: math.nan if value is None else value for module, value in row["drift"].items()}
    return {**row, "drift": drift}
