"""The local sweep: final runs of the last candidates, halved by validation loss, rung by rung; the last is kept.

Which candidates, and what follows from the losses, is `mars_jax.selection`'s business.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mars_jax.checkpoint import Checkpoints
from mars_jax.errors import NoValidResultError
from mars_jax.finetune import final_schedule, run_finals, starts_of, write_final
from mars_jax.halving import Rung, halving_schedule, lane_steps, survivors
from mars_jax.interrupts import Interrupts
from mars_jax.jsonfiles import write_json
from mars_jax.probe.leaving import Leaving, Row
from mars_jax.probe.plan import Lane
from mars_jax.programs import Program, covering_engine
from mars_jax.rundir import RunDirectory, hash_inputs
from mars_jax.selection import Ranks
from mars_jax.workspace import Workspace


@dataclass(frozen=True)
class Halving(Leaving):
    """At the end of each rung but the last, the worse half of the lanes leaves too."""

    rungs: tuple[Rung, ...] = ()

    def running(self, rows: Sequence[Sequence[Row]]) -> list[int]:
        """Lanes that go on, from the rows of all of them, one a look."""
        step = max((lane_rows[-1]["step"] for lane_rows in rows if lane_rows), default=0)
        kept = list(range(len(rows)))
        for rung in self.rungs[:-1]:
            if step < rung.steps:
                break
            # Of what was known at the rung: a lane that diverges later must not bring back one that has left.
            losses = [best_loss(rows[k], rung.steps) for k in kept]
            kept = [kept[place] for place in survivors(losses, rung.survivors)]
        return [k for k in super().running(rows) if k in kept]


def run_sweep(
    workspace: Workspace, programs: Sequence[Program], candidates: Sequence[Ranks], directory: RunDirectory
) -> list[tuple[Ranks, float]]:
    """Successive halving over candidates; the best of them is left as the final run, see `write_final`.

    Args:
        workspace: of the run.
        programs: of the probe phase, one of which may serve.
        candidates: rank vectors, frozen modules at 0.
        directory: of the run; the curves of all candidates go to its `sweep_file`. The state in `sweep_checkpoints` is
            left until the pick is written down.

    Returns:
        (ranks, best validation loss in nats) of every lane that reached the last rung; its losses are comparable.

    Raises:
        NoValidResultError: every lane diverged.
    """
    schedule = final_schedule(workspace)
    rungs = halving_schedule(len(candidates), schedule.horizon)
    schedule = replace(
        schedule,
        looks=sorted({*schedule.looks, *(rung.steps for rung in rungs)}),
        leaving=Halving(ceiling=schedule.leaving.ceiling, rungs=rungs),
    )
    lanes = [Lane(ranks, workspace.target_num_samples(), seed=0) for ranks in candidates]
    engine = covering_engine(workspace, programs, candidates, lane_steps(rungs) // len(candidates))
    starts, initial = starts_of(workspace, engine, candidates, directory)
    state = directory.sweep_checkpoints / hash_inputs(*(lane.name for lane in lanes))[:16]
    with (
        workspace.reporter.progress("local sweep", len(lanes) * schedule.horizon, "lane-steps") as advance,
        Checkpoints(state, workspace.reporter.warn) as checkpoints,
        Interrupts() as interrupts,
    ):
        result = run_finals(
            workspace,
            engine,
            lanes,
            workspace.learning_rates(workspace.config.finetune.learning_rate),
            schedule=schedule,
            checkpoints=checkpoints,
            initial=initial,
            interrupts=interrupts,
            advance=lambda progress: advance(progress.lane_steps, progress.text),
        )
    losses = [best_loss(rows, rows[-1]["step"]) for rows in result.rows]
    ended = [k for k, rows in enumerate(result.rows) if rows[-1]["step"] == schedule.horizon]
    winners = survivors([losses[k] for k in ended], 1)
    if not winners:
        reasons = "; ".join(f"{lane.name}: {rows[-1]['reason']}" for lane, rows in zip(lanes, result.rows, strict=True))
        raise NoValidResultError(
            f"no final run of the sweep came to its end ({reasons}). Lower finetune.learning_rate "
            f"(now {workspace.learning_rates(workspace.config.finetune.learning_rate)})."
        )
    best = ended[winners[0]]
    write_final(workspace, directory, engine, result, best, lanes[best], starts[best], from_sweep=True)
    runs = [
        {
            "ranks": dict(lane.ranks),
            "looks": [(row["step"], row["validation_loss"] if row["alive"] else None) for row in rows],
        }
        for lane, rows in zip(lanes, result.rows, strict=True)
    ]
    write_json(directory.sweep_file, {"runs": runs})
    return [(lanes[k].ranks, losses[k]) for k in ended]


def best_loss(rows: Sequence[Row], step: int) -> float:
    """The lowest validation loss of a lane up to a step, nats; infinite for one that diverged."""
    seen = [row for row in rows if row["step"] <= step]
    return min(row["validation_loss"] for row in seen) if seen[-1]["alive"] else math.inf
