"""Trains configurations to the end of the final schedule."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mars_jax.evals.evaluator import Evaluator
from mars_jax.evals.run import held_out_evaluator
from mars_jax.job.directory import RunDirectory
from mars_jax.job.programs import Program, covering_engine
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.losses import best_of
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.stopping import AskEach, GoesOn, best_loss
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.jsonfiles import append_jsonl, read_jsonl
from mars_jax.search.finals import final_schedule, run_finals
from mars_jax.search.selection import Ranks

# Beside the name of a trial that didn't run to its end.
STOPPED = " (stopped)"


@dataclass(frozen=True)
class Trial:
    """One final run.

    Attributes:
        ranks: module -> rank.
        factors: module -> factor on its learning rate, for those where it isn't 1.
    """

    ranks: Ranks
    factors: Mapping[str, float]

    @property
    def name(self) -> str:
        """Readable, and unique within a comparison."""
        ranks = "-".join(f"{module}{rank}" for module, rank in self.ranks.items())
        return ranks + "".join(f"-{module}x{factor:.3g}" for module, factor in self.factors.items())


def trial_of(workspace: Workspace, ranks: Ranks) -> Trial:
    """At the config's learning rates, with the ranks that modules which aren't searched have."""
    return Trial({module: ranks.get(module, some[0]) for module, some in workspace.grids.items()}, {})


def train_trials(
    workspace: Workspace,
    programs: Sequence[Program],
    trials: Sequence[Trial],
    directory: RunDirectory,
    goes_on: GoesOn | None = None,
) -> None:
    """Trains and scores trials in groups; each leaves a record. Of a single one `goes_on` may be asked at each look."""
    settings, reporter = workspace.config.finetune, workspace.reporter
    done = {record["trial"] for record in read_jsonl(directory.trials_file, reporter.warn)}
    if goes_on:
        done |= {name.removesuffix(STOPPED) for name in done}
    remaining = [trial for trial in trials if trial.name not in done]
    if not remaining:
        return
    most = workspace.config.probe.lanes_per_program
    schedule = final_schedule(workspace)
    if goes_on:
        # One program for all that may be suggested.
        widest = {module: max(ranks) for module, ranks in workspace.grids.items()}
        schedule = replace(schedule, leaving=AskEach(ceiling=schedule.leaving.ceiling, goes_on=goes_on))
    else:
        widest = {module: max(trial.ranks[module] for trial in remaining) for module in workspace.grids}
    engine = covering_engine(workspace, programs, [widest] * min(most, len(remaining)), settings.steps)
    most = min(most, engine.num_slots)
    evaluator, _ = held_out_evaluator(workspace, controls=False)
    base = workspace.learning_rates(settings.learning_rate)
    total = len(trials) * settings.steps
    with (
        reporter.progress("compare", total, "lane-steps", done=total - len(remaining) * settings.steps) as advance,
        Interrupts() as interrupts,
    ):
        for group in (remaining[i : i + most] for i in range(0, len(remaining), most)):
            lanes = [Lane(trial.ranks, workspace.target_num_samples(), seed=0) for trial in group]
            rates = [{m: rate * trial.factors.get(m, 1.0) for m, rate in base.items()} for trial in group]
            with Checkpoints(directory.comparison_checkpoints / group[0].name, reporter.warn) as checkpoints:
                result = run_finals(
                    workspace,
                    engine,
                    lanes,
                    rates,
                    schedule=schedule,
                    checkpoints=checkpoints,
                    interrupts=interrupts,
                    advance=lambda progress: advance(progress.lane_steps, progress.text),
                )
            for record in _records(workspace, engine, evaluator, group, result):
                append_jsonl(directory.trials_file, record)
            shutil.rmtree(directory.comparison_checkpoints / group[0].name)


def _records(
    workspace: Workspace, engine: Engine, evaluator: Evaluator, group: Sequence[Trial], result: GroupResult
) -> Iterator[dict[str, Any]]:
    """One record a trial; with the loss and the answer of every test sample, unless it was stopped."""
    steps = workspace.config.finetune.steps
    for trial, rows, (vector, scales) in zip(group, result.rows, best_of(result), strict=True):
        looks = [(row["step"], row["validation_loss"] if row["alive"] else None) for row in rows]
        if rows[-1]["alive"] and rows[-1]["step"] < steps:
            yield {"trial": trial.name + STOPPED, "ranks": trial.ranks, "factors": trial.factors, "looks": looks}
            continue
        # Padded, so that one compiled program scores them all.
        outcome = evaluator.evaluate({"": engine.layout.adapters(vector, scales)})[""]
        yield {
            "trial": trial.name,
            "ranks": trial.ranks,
            "factors": trial.factors,
            "looks": looks,
            "validation_loss": best_loss(rows, steps),
            "reason": rows[-1]["reason"],
            "test_losses": outcome.losses,
            "test_tokens": outcome.tokens,
            "test_correct": outcome.correct,
        }
