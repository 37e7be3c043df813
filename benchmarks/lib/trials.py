"""Lanes of the demo's model on a task, run once and kept in files: shared by the experiments on rules and ranks.

Nothing is judged here. A file that is there is read in place of running its lanes again, so an experiment that was
stopped goes on when it is started again.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.lib.child import ROOT, Warnings, demo_config
from mars_jax.config.load import Config
from mars_jax.job.job import Job, make_job
from mars_jax.lanes.engine import Engine, EngineShape
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.inputs import Hooks, Rates
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.snapshots import Snapshots
from mars_jax.laws.convergence import registry
from mars_jax.laws.convergence.base import ConvergenceRule
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.jsonfiles import read_json, write_json
from mars_jax.search.probes.design import prefixes, run_of
from mars_jax.search.probes.records import lane_records
from mars_jax.search.probes.run import probe_schedule, with_module_swaps

Curves = list[list[EvalPoint]]
"""Eval points of lanes."""

NARROW = 8  # ranks up to this are run apart from wider ones

RULES: dict[str, ConvergenceRule] = {
    name: ConvergenceRule(name, registry.RULES[name].epsilon) for name in registry.RULES.names
}


def make_data(folder: Path, shift: Sequence[str]) -> Path:
    """Data of a task, by scripts/make_demo_data.py with some arguments."""
    if not (folder / "test.json").exists():
        script = str(ROOT / "scripts" / "make_demo_data.py")
        subprocess.run([sys.executable, script, "--out", str(folder), *shift], check=True, stdout=sys.stderr)
    return folder


def task_job(data: Path, *overrides: str) -> Job:
    """The demo's job on other data and with some settings changed; lanes never stop early."""
    files = [f"data.{name}={data / name}.json" for name in ("train", "validation", "test")]
    return make_job(demo_config(data / "run", [*files, "probe.patience=null", *overrides]), Warnings())


def probe_curves(file: Path, job: Job, lanes: Sequence[Lane], rates: Sequence[Rates] | None = None) -> Curves:
    """Eval points of all that is read off probes of the same data, with module swaps at every one.

    Args:
        file: of the eval points.
        job: of the task.
        lanes: to run together, of which `read_lanes` are read.
        rates: learning rates of each; None: the config's.
    """
    if file.exists():
        return [[EvalPoint.from_json(point) for point in points] for points in read_json(file)]
    found: dict[int, Curves] = {}
    for places in by_width([lane.ranks for lane in lanes], wide=lambda over: any(over.values())):
        some = [lanes[place] for place in places]
        their_rates = None if rates is None else [rates[place] for place in places]
        found |= zip(places, _group_curves(job, some, their_rates), strict=True)
    curves = [points for place in range(len(lanes)) for points in found[place]]
    write_json(file, [[point.to_json() for point in points] for points in curves])
    return curves


def read_lanes(config: Config, lanes: Sequence[Lane]) -> list[Lane]:
    """What is read off lanes: with nested sizes a lane for every D."""
    return [prefix for lane in lanes for prefix, _ in prefixes(config, lane)]


def _group_curves(job: Job, lanes: Sequence[Lane], rates: Sequence[Rates] | None) -> list[Curves]:
    engine = one_engine(job, lanes)
    schedule = probe_schedule(job.config, job.base.model_config.text.vocab_size)
    with TemporaryDirectory() as folder:
        file = Snapshots(Path(folder) / "adapters", schedule.eval_steps, len(lanes), engine.layout.size)
        with file as snapshots:
            inputs = job.inputs.probes(lanes[0], engine, rates)
            result = run_group(lanes, engine, inputs, schedule, Hooks(snapshots=snapshots))
            found = with_module_swaps(job, engine, lanes, result, snapshots)
    each = len(found) // len(lanes)
    return [found[each * k : each * (k + 1)] for k in range(len(lanes))]


def by_width(vectors: Sequence[Ranks], wide: Callable[[dict[str, bool]], Hashable]) -> list[list[int]]:
    """Places of rank vectors, grouped so that few are padded from a narrow rank to a wide one.

    Args:
        vectors: module -> rank.
        wide: the group of a vector, given which of its modules have a rank over `NARROW`.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, ranks in enumerate(vectors):
        groups.setdefault(wide({module: rank > NARROW for module, rank in ranks.items()}), []).append(place)
    return list(groups.values())


def one_engine(job: Job, lanes: Sequence[Lane]) -> Engine:
    """An engine that runs the lanes as one group."""
    widest = {module: max(lane.ranks[module] for lane in lanes) for module in job.config.lora.grids}
    devices = job.base.mesh.shape["lane"]
    slots = devices * math.ceil(len(lanes) / devices)
    return job.engines.engine(EngineShape(widest, slots, job.engines.default_lane_block))


def records_by(rule: ConvergenceRule | None, config: Config, lanes: Sequence[Lane], curves: Curves) -> list[LaneRecord]:
    """Records of the lanes with the times that a rule finds."""
    return lane_records(lanes, curves, rule, config.learning_rates(), [run_of(config, lane) for lane in lanes])
