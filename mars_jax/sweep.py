"""The local sweep: the last candidates run at the target number of samples, halved by validation loss, rung by rung.

Which candidates, and what follows from the losses, is `mars_jax.selection`'s business.
"""

from collections.abc import Sequence

from mars_jax.probe.loop import GroupResult, Schedule, run_group, warmup_multipliers
from mars_jax.probe.plan import Lane, look_steps
from mars_jax.selection import Ranks, halving_schedule, survivors
from mars_jax.workspace import Workspace


def run_sweep(workspace: Workspace, candidates: Sequence[Ranks]) -> list[tuple[Ranks, float]]:
    """Successive halving over candidates.

    Args:
        workspace: of the run.
        candidates: rank vectors, the likeliest first.

    Returns:
        (ranks, best validation loss in nats) of every lane that reached the last rung; its losses are comparable.
    """
    config = workspace.config
    steps, batch_size = config.selection.sweep.steps, config.probe.batch_size
    rungs = halving_schedule(len(candidates), steps)
    looks = look_steps(steps, config.probe.looks_per_doubling)
    multipliers = warmup_multipliers(steps, config.optimizer.warmup_steps, "constant")
    validation = workspace.validation_batches(None, batch_size)
    alive = [Lane(ranks, workspace.target_num_samples(), seed=0) for ranks in candidates]
    results: dict[str, GroupResult] = {}
    total = sum(rung.lanes * (rung.steps - (rungs[i - 1].steps if i else 0)) for i, rung in enumerate(rungs))
    losses: list[float] = []
    with workspace.reporter.progress("local sweep", total, "lane-steps") as advance:
        for rung in rungs:
            schedule = Schedule(
                multipliers,
                sorted({*(look for look in looks if look < rung.steps), rung.steps}),
                looks_per_doubling=0,
                chunk_steps=config.probe.chunk_steps,
            )
            losses = []
            for lane in alive:
                # One lane at a time: lanes leave, and a smaller program would have to be compiled at every rung.
                results[lane.name] = run_group(
                    [lane],
                    workspace.probe_engine,
                    workspace.base,
                    lambda lane: workspace.stream(lane, batch_size),
                    validation,
                    workspace.learning_rates(),
                    schedule,
                    start=results.get(lane.name),
                    advance=advance,
                )
                losses.append(float(results[lane.name].state.best_loss[0]))
            if rung != rungs[-1]:
                alive = [alive[i] for i in survivors(losses, rung.survivors)]
    return [(lane.ranks, loss) for lane, loss in zip(alive, losses, strict=True)]
