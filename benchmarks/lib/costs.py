"""What a piece of training costs, counted from its plan: lane-steps, tokens, FLOPs in closed form. Nothing is timed.

FLOPs are the fewest that the executed work can take (`models.flops`): lane-steps and looks at the ranks that the
program pads to, and with the empty places of its blocks. XLA's count is within 5 % of it (b3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

from mars_jax.job.directory import RunDirectory
from mars_jax.job.programs import Program, covering_engine
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane
from mars_jax.models.flops import evaluation_flops, lane_step_flops
from mars_jax.runtime.jsonfiles import read_jsonl
from mars_jax.search.probes.run import probe_schedule
from mars_jax.search.selection import Ranks


@dataclass(frozen=True)
class Cost:
    """What some lanes cost; costs can be added.

    Attributes:
        lane_steps: steps of the lanes.
        executed_lane_steps: with the steps of empty places in blocks.
        tokens: of the executed steps and looks, padding of samples counted.
        flops: of the executed steps and looks.
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
    workspace: Workspace,
    ends: Sequence[int],
    looks: Sequence[int],
    *,
    padded_ranks: Ranks,
    places: Callable[[int], int] = int,
    batch_size: int,
    look_samples: int,
    cached_encoder: bool = False,
) -> Cost:
    """Lanes that run together.

    Args:
        workspace: of the run.
        ends: step at which each lane left or ended, one of `looks`.
        looks: steps of the looks, rising from 0, at which one lane is looked at for all.
        padded_ranks: module -> columns of the program.
        places: lanes that are computed when some number of them is run.
        batch_size: samples a step, and a batch of a look.
        look_samples: validation samples of a look.
        cached_encoder: whether the program reads the vision encoder's output.
    """
    shapes = workspace.shapes
    sizes = {"tokens": shapes.max_tokens, "tiles": shapes.max_tiles, "supervised": shapes.max_supervised}
    one_batch = (workspace.model_config, workspace.targets, padded_ranks)
    options: dict[str, Any] = {"batch_size": batch_size, "cached_encoder": cached_encoder, **sizes}
    look_batches = workspace.look_batches(look_samples, batch_size)

    lane_steps = executed_steps = 0
    executed_looks = places(1)  # step 0
    for before, look in pairwise(looks):
        active = sum(end >= look for end in ends)
        lane_steps += active * (look - before)
        executed_steps += places(active) * (look - before)
        executed_looks += places(active)
    return Cost(
        lane_steps,
        executed_steps,
        tokens=batch_size * shapes.max_tokens * (executed_steps + executed_looks * look_batches),
        flops=executed_steps * lane_step_flops(*one_batch, **options).total
        + executed_looks * look_batches * evaluation_flops(*one_batch, **options).total,
    )


def probes(workspace: Workspace, programs: Sequence[Program], directory: RunDirectory) -> Cost:
    """The probe phase of a finished run, from the steps that its events tell of each lane."""
    settings, looks = workspace.config.probe, probe_schedule(workspace).looks
    total = Cost()
    for event in read_jsonl(directory.events_file, workspace.reporter.warn):
        if event["event"] == "group":
            (program,) = (p for p in programs if event["lanes"][0] in {lane.name for lane in p.bucket.lanes})
            total += group_cost(
                workspace,
                event["steps"],
                looks,
                padded_ranks=program.bucket.padded_ranks,
                places=program.engine.places,
                batch_size=settings.batch_size,
                look_samples=settings.validation_samples,
                cached_encoder=program.bucket.cached_encoder,
            )
    return total


def final_run(workspace: Workspace, programs: Sequence[Program], ranks: Ranks, steps: int | None = None) -> Cost:
    """The final run with some ranks, as the pipeline would do it."""
    settings = workspace.config.finetune
    steps = steps or settings.steps
    engine = covering_engine(workspace, programs, [ranks], steps)
    return _in_engine(workspace, engine, [steps], final_looks(workspace, steps), settings.batch_size)


def sequential_grid(workspace: Workspace, grid: Sequence[Ranks], steps: int | None = None) -> Cost:
    """A final run for each rank vector, one after the other, each at its own ranks without padding."""
    settings = workspace.config.finetune
    steps = steps or settings.steps
    looks = final_looks(workspace, steps)
    total = Cost()
    for ranks in grid:
        total += group_cost(
            workspace,
            [steps],
            looks,
            padded_ranks=ranks,
            batch_size=settings.batch_size,
            look_samples=settings.validation_samples,
        )
    return total


def engine_grid(workspace: Workspace, engine: Engine, lanes: Sequence[Lane]) -> Cost:
    """The same final runs as lanes of one engine."""
    settings = workspace.config.finetune
    looks = final_looks(workspace, settings.steps)
    return _in_engine(workspace, engine, [settings.steps] * len(lanes), looks, settings.batch_size)


def final_looks(workspace: Workspace, steps: int) -> list[int]:
    """Steps at which a final run is looked at; one of another length than the config's is looked at as often."""
    settings = workspace.config.finetune
    every = max(1, settings.look_every * steps // settings.steps)
    return sorted({*range(0, steps, every), steps})


def chunk_calls(looks: Sequence[int], chunk_steps: int) -> int:
    """Calls of the compiled chunk up to the last look, after each of which the host reads its results."""
    return 1 + sum(math.ceil((look - before) / chunk_steps) for before, look in pairwise(looks))


def grid_of(grids: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Every rank vector of a grid."""
    vectors: list[dict[str, int]] = [{}]
    for module, ranks in grids.items():
        vectors = [{**vector, module: rank} for vector in vectors for rank in ranks]
    return vectors


def _in_engine(
    workspace: Workspace, engine: Engine, ends: Sequence[int], looks: Sequence[int], batch_size: int
) -> Cost:
    return group_cost(
        workspace,
        ends,
        looks,
        padded_ranks=engine.layout.ranks,
        places=engine.places,
        batch_size=batch_size,
        look_samples=workspace.config.finetune.validation_samples,
        cached_encoder=engine.cached_encoder,
    )
