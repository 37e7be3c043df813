"""The local sweep: the last candidates run at the target number of samples, halved by validation loss, rung by rung.

Which candidates, and what follows from the losses, is `mars_jax.selection`'s business.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mars_jax.checkpoint import Checkpoints
from mars_jax.halving import Rung, halving_schedule, survivors
from mars_jax.interrupts import Interrupts
from mars_jax.probe.leaving import Leaving, Row, ceiling_of
from mars_jax.probe.loop import Schedule, run_group, warmup_multipliers
from mars_jax.probe.plan import Lane
from mars_jax.programs import Program, covering_engine
from mars_jax.selection import Ranks
from mars_jax.workspace import Workspace


@dataclass(frozen=True)
class Halving(Leaving):
    """At the end of each rung but the last, the worse half of the lanes leaves too."""

    rungs: tuple[Rung, ...] = ()

    def running(self, rows: Sequence[Sequence[Row]]) -> list[int]:
        """Lanes that go on, from the rows of all of them, one a look."""
        alive = super().running(rows)
        step = max((lane_rows[-1]["step"] for lane_rows in rows if lane_rows), default=0)
        for rung in self.rungs[:-1]:
            if step < rung.steps:
                break
            losses = [best_loss(rows[k], rung.steps) for k in alive]
            alive = [alive[place] for place in survivors(losses, rung.survivors)]
        return sorted(alive)


def run_sweep(
    workspace: Workspace, programs: Sequence[Program], candidates: Sequence[Ranks], checkpoint_directory: Path
) -> list[tuple[Ranks, float]]:
    """Successive halving over candidates.

    Args:
        workspace: of the run.
        programs: of the probe phase, one of which may serve.
        candidates: rank vectors, the likeliest first.
        checkpoint_directory: where to save, and to go on from.

    Returns:
        (ranks, best validation loss in nats) of every lane that reached the last rung; its losses are comparable.
    """
    config = workspace.config
    steps, batch_size = config.selection.sweep.steps, config.probe.batch_size
    rungs = halving_schedule(len(candidates), steps)
    ends = [rung.steps for rung in rungs]
    # Looks at many validation samples cost more than the steps between them, and only those at the rungs decide.
    schedule = Schedule(
        warmup_multipliers(steps, config.optimizer.warmup_steps, "constant"),
        sorted({0, *ends}),
        looks_per_doubling=0,
        chunk_steps=config.probe.chunk_steps,
        leaving=Halving(ceiling=ceiling_of(workspace.model_config.text.vocab_size), rungs=rungs),
        averaging=config.probe.averaging,
    )
    lanes = [Lane(ranks, workspace.target_num_samples(), seed=0) for ranks in candidates]
    engine = covering_engine(workspace, programs, candidates, sum(ends) // len(ends))
    with (
        workspace.reporter.progress("local sweep", len(lanes) * steps, "lane-steps") as advance,
        Checkpoints(checkpoint_directory, workspace.reporter.warn) as checkpoints,
        Interrupts() as interrupts,
    ):
        result = run_group(
            lanes,
            engine,
            workspace.base_on(engine.mesh),
            workspace.stream(lanes[0], batch_size),
            workspace.validation_batches(batch_size),
            workspace.learning_rates(),
            schedule,
            look_batches=workspace.look_batches(config.finetune.validation_samples, batch_size),
            checkpoints=checkpoints,
            interrupts=interrupts,
            advance=lambda progress: advance(progress.lane_steps, progress.text),
        )
    last = [(lane.ranks, rows) for lane, rows in zip(lanes, result.rows, strict=True) if rows[-1]["step"] == steps]
    return [(ranks, best_loss(rows, steps)) for ranks, rows in last]


def best_loss(rows: Sequence[Row], step: int) -> float:
    """The lowest validation loss of a lane up to a step, nats; infinite for one that diverged."""
    seen = [row for row in rows if row["step"] <= step]
    return min(row["validation_loss"] for row in seen) if seen[-1]["alive"] else math.inf
