"""The local sweep: final runs of the last candidates, halved by validation loss, rung by rung; the last is kept.

Which candidates, and what follows from the losses, is `mars_jax.search.selection`'s business.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.job.directory import RunDirectory, hash_inputs
from mars_jax.job.programs import Program, covering_engine
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.halving import halving_schedule, lane_steps, survivors
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.stopping import Halving, best_loss
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.jsonfiles import write_json
from mars_jax.search.finals import final_schedule, run_finals, starts_of, write_final
from mars_jax.search.selection import Ranks, Selection
from mars_jax.search.strategies.laws import ranks_text


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


def candidates_for_sweep(selection: Selection, most: int) -> tuple[Ranks, ...]:
    """Rank vectors worth a final run: those of the `most` probes with the lowest losses, the best first.

    Balanced or not, and without the laws: on tasks where the best ranks are known (docs/evidence.md) the probes' own
    losses found better ones than what the laws predict from them.
    """
    probed = [(c.probed_loss, c.ranks) for c in selection.candidates if c.probed_loss is not None]
    return tuple(ranks for _, ranks in sorted(probed, key=lambda one: one[0])[:most])


def decide_by_sweep(selection: Selection, results: Sequence[tuple[Ranks, float]]) -> Selection:
    """The selection after a local sweep: the candidate whose final run has the smallest validation loss.

    Args:
      selection: what the laws said.
      results: (ranks, validation loss in nats) of each final run that came to its end.

    Returns:
      The selection with method `local_sweep`; `p_best` stays what the laws gave the new pick.

    Raises:
      ConfigError: a result is not of a candidate.
      NoValidResultError: no candidate has only finite losses.
    """
    losses: dict[int, float] = {}
    for ranks, loss in results:
        found = [i for i, candidate in enumerate(selection.candidates) if candidate.ranks == ranks]
        if not found:
            raise ConfigError(f"the sweep has a result for {ranks_text(ranks)}, which is not in the rank grid.")
        losses[found[0]] = loss
    ordered = sorted((i for i in losses if math.isfinite(losses[i])), key=lambda i: losses[i])
    if not ordered:
        raise NoValidResultError(
            f"the local sweep gave {len(results)} results, and no loss is finite. Lower the learning rate."
        )
    pick = selection.candidates[ordered[0]]
    ends = "; ".join(f"{ranks_text(selection.candidates[i].ranks)}: {losses[i]:.4f}" for i in ordered)
    agrees = (
        "which the laws had picked as well"
        if pick.ranks == selection.pick
        else f"where the laws had picked {ranks_text(selection.pick)}"
    )
    explanation = (
        f"Of the final runs that the best probes were given, those that came to their end have these validation losses "
        f"in nats: {ends}. The pick is {ranks_text(pick.ranks)}, {agrees}."
    )
    return dataclasses.replace(
        selection, pick=pick.ranks, p_best=pick.p_best, method="local_sweep", explanation=explanation
    )
