"""Trains the lanes of the tabular benchmark that are not recorded yet; a stopped run goes on where it was.

    python -m benchmarks.evidence.record [--tasks NAME ...] [--seeds N] [--long] [--work FOLDER]

A cell is a task and a seed: all configurations of benchmarks/evidence/design.py, trained as `mars finetune` trains
them, as lanes of a few programs. It leaves one file in benchmarks/evidence/table. With --long the configurations of the
longer runs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from benchmarks.evidence.design import (
    BATCH,
    LENGTHS,
    RUNGS,
    SEEDS,
    configurations,
    eval_steps,
    long_configurations,
)
from benchmarks.evidence.table import TABLE, VALIDATION, Cell, RecordedRun, cell_name, write_cell
from benchmarks.evidence.tasks import LONG_TASKS, TASKS, Task
from benchmarks.lib.trials import by_width, make_data, one_engine, task_job
from mars_jax.data.batches import Batch, eval_batches
from mars_jax.data.examples import ExampleSource
from mars_jax.data.shapes import plan_shapes
from mars_jax.job.job import Job
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.losses import best_of, losses_of
from mars_jax.lanes.result import GroupResult
from mars_jax.runtime import compile_cache
from mars_jax.runtime.environment import cpu_device_for_each_core
from mars_jax.search.finals import final_schedule, rates_of
from mars_jax.search.trainer import Configuration, Curve

TEST = 512


def main() -> None:
    """Records cell after cell, every task for one seed before the next seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), help="those to record; all by default")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--long", action="store_true", help="the longer runs of some tasks")
    parser.add_argument("--work", type=Path, help="folder that keeps the tasks' data")
    options = parser.parse_args()
    for devices in cpu_device_for_each_core().values():  # none where the user has set their number
        jax.config.update("jax_num_cpu_devices", int(devices))
    compile_cache.enable()
    steps = LENGTHS[1] if options.long else LENGTHS[0]
    wanted = long_configurations() if options.long else configurations()
    names = options.tasks or (LONG_TASKS if options.long else list(TASKS))
    with TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for name in names:
                if (TABLE / f"{cell_name(name, seed, steps)}.parquet").exists():
                    continue
                began = time.monotonic()
                job = cell_job(TASKS[name], seed, steps, options.work or Path(folder))
                cell = Cell(
                    name,
                    seed,
                    steps,
                    job.data.target_num_samples(),
                    job.config.learning_rates(job.config.finetune.learning_rate),
                    job.base.parameters_per_rank,
                    trained(job, wanted),
                )
                write_cell(cell, [round(part * steps) for part in RUNGS])
                seconds = time.monotonic() - began
                print(f"{cell.name}: {len(cell.runs)} lanes, {seconds:.0f} s", file=sys.stderr, flush=True)


def cell_job(task: Task, seed: int, steps: int, folder: Path) -> Job:
    """The job whose final runs a cell holds."""
    train = steps * BATCH
    data = make_data(folder / f"{task.name}-{train}", [*task.shift, f"--train={train}", f"--test={TEST}"])
    return task_job(
        data,
        f"seed={seed}",
        f"finetune.steps={steps}",
        f"finetune.look_every={steps // 8}",
        f"finetune.batch_size={BATCH}",
        f"finetune.validation_samples={VALIDATION}",
        f"evaluate.max_samples={TEST}",
        "convergence.rule=null",
        "selection.method=halving",
    )


def test_batches(job: Job, batch_size: int) -> Batch:
    """Test samples [V, B, ...] in the shapes of training batches; longer ones are left out."""
    data = job.data
    kept = plan_shapes(data.test_records, data.preprocessor, data.shapes.max_tokens).kept
    source = ExampleSource(kept, data.preprocessor, data.shapes, cache_bytes=0)
    batches = [batch for batch, _ in eval_batches(source, batch_size)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def trained(job: Job, wanted: Sequence[Configuration]) -> list[RecordedRun]:
    """Final runs of configurations, in their order."""
    groups = by_width([one.ranks for one in wanted], wide=lambda over: tuple(over.values()))
    found: dict[int, RecordedRun] = {}
    for places in groups:
        found |= zip(places, _group(job, [wanted[place] for place in places]), strict=True)
    return [found[place] for place in range(len(wanted))]


def _group(job: Job, wanted: Sequence[Configuration]) -> list[RecordedRun]:
    engine, inputs, result = run_together(job, wanted)
    tested = losses_of(
        best_of(result),
        engine,
        result.state,
        replace(inputs, validation=test_batches(job, job.config.finetune.batch_size), eval_batches=None),
        chunk_steps=job.config.probe.chunk_steps,
    )
    return [
        RecordedRun(Curve(one, tuple(points)), loss)
        for one, points, loss in zip(wanted, result.points, tested, strict=True)
    ]


def run_together(job: Job, wanted: Sequence[Configuration], order: int = 0) -> tuple[Engine, LaneInputs, GroupResult]:
    """Final runs of configurations as lanes of one program, which read the data in one order."""
    lanes = [Lane(one.ranks, job.data.target_num_samples(), one.seed) for one in wanted]
    engine = one_engine(job, lanes)
    schedule = final_schedule(job.config, job.base.model_config.text.vocab_size)
    schedule = replace(schedule, eval_steps=eval_steps(schedule.horizon), keeps_sample_losses=True)
    inputs = job.inputs.final_runs(replace(lanes[0], seed=order), engine, [rates_of(job.config, one) for one in wanted])
    return engine, inputs, run_group(lanes, engine, inputs, schedule)


if __name__ == "__main__":
    main()
