"""What training costs, counted from its plan: lane-steps, tokens, FLOPs in closed form. Nothing is timed.

FLOPs are the fewest that the executed work can take (`models.flops`): lane-steps and eval points at the ranks that the
program pads to, and with the empty places of its blocks. How close XLA's own count is: see `xla_flops`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

from mars_jax.config.load import Config
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.job.job import Job
from mars_jax.job.programs import Program, covering_engine
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.models.flops import BatchShape, evaluation_flops, lane_step_flops
from mars_jax.runtime.jsonfiles import read_jsonl
from mars_jax.search.probes.run import probe_schedule


@dataclass(frozen=True)
class Cost:
    """What some lanes cost; costs can be added.

    Attributes:
        lane_steps: steps of the lanes.
        executed_lane_steps: with the steps of empty places in blocks.
        tokens: of the executed steps and eval points, padding of samples counted.
        flops: of the executed steps and eval points.
    """

    lane_steps: int = 0
    executed_lane_steps: int = 0
    tokens: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Both."""
        return Cost(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def utilisation(self) -> float:
        """Lane-steps / executed lane-steps."""
        return self.lane_steps / self.executed_lane_steps


def group_cost(
    job: Job,
    ends: Sequence[int],
    eval_steps: Sequence[int],
    *,
    padded_ranks: Ranks,
    places: Callable[[int], int] = int,
    batch_size: int,
    eval_samples: int,
    cached_encoder: bool = False,
) -> Cost:
    """Lanes that run together.

    Args:
        job: of the run.
        ends: step at which each lane stopped or ended, one of `eval_steps`.
        eval_steps: steps of the eval points, rising from 0, at which one lane is evaluated for all.
        padded_ranks: module -> columns of the program.
        places: lanes that are computed when some number of them is run.
        batch_size: samples a step, and a batch of an eval point.
        eval_samples: validation samples of an eval point.
        cached_encoder: whether the program reads the vision encoder's output.
    """
    base, shapes = job.base, job.data.shapes
    shape = BatchShape(batch_size, shapes.max_tokens, shapes.max_tiles, shapes.max_supervised)
    step, batch = (
        flops_of(
            base.model_config, base.targets, padded_ranks, shape, method=base.method, cached_encoder=cached_encoder
        ).total
        for flops_of in (lane_step_flops, evaluation_flops)
    )
    eval_batches = job.data.num_eval_batches(eval_samples, batch_size)

    lane_steps = executed_steps = 0
    executed_points = places(1)  # step 0
    for before, point in pairwise(eval_steps):
        active = sum(end >= point for end in ends)
        lane_steps += active * (point - before)
        executed_steps += places(active) * (point - before)
        executed_points += places(active)
    return Cost(
        lane_steps,
        executed_steps,
        tokens=batch_size * shapes.max_tokens * (executed_steps + executed_points * eval_batches),
        flops=executed_steps * step + executed_points * eval_batches * batch,
    )


def probes(job: Job, programs: Sequence[Program], directory: RunDirectory) -> Cost:
    """The probe phase of a finished run, from the steps of each lane in its events."""
    settings = job.config.probe
    eval_steps = probe_schedule(job.config, job.base.model_config.text.vocab_size).eval_steps
    total = Cost()
    for event in read_jsonl(directory / files.EVENTS, job.reporter.warn):
        if event["event"] == "group":
            (program,) = (p for p in programs if event["lanes"][0] in {lane.name for lane in p.bucket.lanes})
            total += group_cost(
                job,
                event["steps"],
                eval_steps,
                padded_ranks=program.bucket.padded_ranks,
                places=program.engine.places,
                batch_size=settings.batch_size,
                eval_samples=settings.validation_samples,
                cached_encoder=program.bucket.cached_encoder,
            )
    return total


def final_run(job: Job, programs: Sequence[Program], ranks: Ranks, steps: int | None = None) -> Cost:
    """The final run with some ranks, as the pipeline would do it."""
    steps = steps or job.config.finetune.steps
    engine = covering_engine(job, programs, [ranks], steps)
    return _in_engine(job, engine, [steps], final_eval_steps(job.config, steps))


def sequential_grid(job: Job, grid: Sequence[Ranks], steps: int | None = None) -> Cost:
    """A final run for each rank vector, one after the other, each at its own ranks without padding."""
    settings = job.config.finetune
    steps = steps or settings.steps
    eval_steps = final_eval_steps(job.config, steps)
    total = Cost()
    for ranks in grid:
        total += group_cost(
            job,
            [steps],
            eval_steps,
            padded_ranks=ranks,
            batch_size=settings.batch_size,
            eval_samples=settings.validation_samples,
        )
    return total


def engine_grid(job: Job, engine: Engine, lanes: Sequence[Lane]) -> Cost:
    """The same final runs as lanes of one engine."""
    steps = job.config.finetune.steps
    return _in_engine(job, engine, [steps] * len(lanes), final_eval_steps(job.config, steps))


def final_eval_steps(config: Config, steps: int) -> list[int]:
    """Eval points of a final run; one of another length than the config's has as many."""
    settings = config.finetune
    every = max(1, settings.look_every * steps // settings.steps)
    return sorted({*range(0, steps, every), steps})


def chunk_calls(eval_steps: Sequence[int], chunk_steps: int) -> int:
    """Calls of the compiled chunk up to the last eval point, after each of which the host reads its results."""
    return 1 + sum(math.ceil((point - before) / chunk_steps) for before, point in pairwise(eval_steps))


def grid_of(grids: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Every rank vector of a grid."""
    vectors: list[dict[str, int]] = [{}]
    for module, ranks in grids.items():
        vectors = [{**vector, module: rank} for vector in vectors for rank in ranks]
    return vectors


def _in_engine(job: Job, engine: Engine, ends: Sequence[int], eval_steps: Sequence[int]) -> Cost:
    settings = job.config.finetune
    return group_cost(
        job,
        ends,
        eval_steps,
        padded_ranks=dict(engine.layout.ranks),
        places=engine.places,
        batch_size=settings.batch_size,
        eval_samples=settings.validation_samples,
        cached_encoder=engine.cached_encoder,
    )
