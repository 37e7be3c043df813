"""`mars compare`: the pick beside its alternatives on the user's own task, each trained to the end, in one table.

Which alternatives there are, what each costs, and the table. How a run trains is `finetune`'s business, how it is
scored `evaluate`'s. Every method chooses by validation loss; the test split is read for the table alone.
"""

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from mars_jax import lora, tpe
from mars_jax.checkpoint import Checkpoints
from mars_jax.evaluate import held_out_evaluator
from mars_jax.evaluator import Evaluator
from mars_jax.finetune import final_schedule, run_finals
from mars_jax.interrupts import Interrupts
from mars_jax.jsonfiles import append_jsonl, read_json, read_jsonl, write_json
from mars_jax.probe.engine import Engine
from mars_jax.probe.leaving import Leaving, Row
from mars_jax.probe.loop import GroupResult
from mars_jax.probe.plan import Lane
from mars_jax.probe.reading import best_of
from mars_jax.probe.splice import hybrids
from mars_jax.programs import Program, covering_engine, look_flops, step_flops
from mars_jax.rundir import RunDirectory
from mars_jax.search import probe_schedule
from mars_jax.selection import Ranks, Selection
from mars_jax.sweep import best_loss
from mars_jax.workspace import Workspace

_DRAWS = 1000
# Of the learning rate of one module, at uniform ranks.
_RATE_FACTORS = (1 / 3, 3.0)
# Beside the name of a trial that didn't run to its end.
_STOPPED = " (stopped)"


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


@dataclass(frozen=True)
class _Asking(Leaving):
    """One lane, that leaves when it is told to."""

    goes_on: tpe.GoesOn = lambda step, loss: True

    def running(self, rows: Sequence[Sequence[Row]]) -> list[int]:
        """The lane, unless an answer to one of its looks was no."""
        alive = super().running(rows)
        return [k for k in alive if all(self.goes_on(row["step"], row["validation_loss"]) for row in rows[k])]


class Alternative(NamedTuple):
    """A way to choose ranks.

    Attributes:
        name: as the table has it.
        trials: its final runs, those that were stopped left out.
        takes: the best of them by validation loss, or what a draw of one of them gives on average.
        search_flops: what it costs besides them.
        search_seconds: likewise.
    """

    name: str
    trials: tuple[Trial, ...]
    takes: Literal["best", "mean"] = "best"
    search_flops: float = 0.0
    search_seconds: float = 0.0


def compare_run(
    workspace: Workspace, programs: Sequence[Program], selection: Selection, directory: RunDirectory
) -> dict[str, Any]:
    """Trains what isn't trained yet, and writes compare.json.

    Args:
        workspace: of the run.
        programs: of the probe phase, one of which may serve.
        selection: what the search of the run picked.
        directory: of the run; trials that are in its comparison already are not run again.
    """
    methods = alternatives(workspace, selection, *search_cost(workspace, selection, directory))
    trials = list({trial.name: trial for method in methods for trial in method.trials}.values())
    _train(workspace, programs, trials, directory)
    methods += _by_tpe(workspace, programs, methods[-1].trials, directory)
    records = {record["trial"]: record for record in read_jsonl(directory.trials_file, workspace.reporter.warn)}
    (pick,) = methods[0].trials
    rows = [_row(workspace, method, records, records[pick.name]) for method in methods]
    document = {
        "num_test_samples": len(records[pick.name]["test_tokens"]),
        "unit_of_compute": "a final run with the picked ranks",
        "methods": rows,
    }
    write_json(directory.comparison_file, document)
    return document


def alternatives(
    workspace: Workspace, selection: Selection, search_flops: float, search_seconds: float
) -> list[Alternative]:
    """The pick first, then uniform ranks, the largest, separate learning rates, and chance at the pick's compute."""
    grids = workspace.grids
    searched = [module for module, ranks in grids.items() if len(ranks) > 1]
    trial = partial(_trial, workspace)
    pick = trial(selection.pick)
    shared = sorted(set.intersection(*(set(grids[module]) for module in searched)))
    uniform = [trial(dict.fromkeys(searched, rank)) for rank in shared]
    found = [Alternative("MARS", (pick,), search_flops=search_flops, search_seconds=search_seconds)]
    found += [Alternative(f"uniform rank {rank}", (one,)) for rank, one in zip(shared, uniform, strict=True)]
    found.append(Alternative("largest ranks", (trial({module: max(grids[module]) for module in searched}),)))
    if shared:
        middle = uniform[len(uniform) // 2]
        rated = [Trial(middle.ranks, {module: factor}) for module in searched for factor in _RATE_FACTORS]
        name = f"separate learning rates at rank {shared[len(shared) // 2]}"
        found.append(Alternative(name, (middle, *rated)))
    vectors = [dict(zip(searched, ranks, strict=True)) for ranks in itertools.product(*(grids[m] for m in searched))]
    number = round(1 + search_flops / final_flops(workspace, pick.ranks))
    rng = np.random.default_rng(workspace.config.seed)
    drawn = [trial(vectors[i]) for i in rng.permutation(len(vectors))[: max(2, number)]]
    found.append(Alternative(f"random search, {len(drawn)} runs", tuple(drawn)))
    return [*found, Alternative("random ranks", tuple(drawn), takes="mean")]


def _trial(workspace: Workspace, ranks: Ranks) -> Trial:
    """At the config's learning rates, with the ranks that modules which aren't searched have."""
    return Trial({module: ranks.get(module, some[0]) for module, some in workspace.grids.items()}, {})


def _by_tpe(
    workspace: Workspace, programs: Sequence[Program], drawn: Sequence[Trial], directory: RunDirectory
) -> list[Alternative]:
    """Trains what Optuna's TPE suggests, for the steps that random search had; none without Optuna."""
    if not tpe.is_installed():
        workspace.reporter.notice("compare: TPE is left out, since Optuna isn't installed (pip install optuna)")
        return []
    steps = workspace.config.finetune.steps

    def train(ranks: Ranks, goes_on: tpe.GoesOn) -> list[tpe.Look]:
        trial = _trial(workspace, ranks)
        _train(workspace, programs, [trial], directory, goes_on)
        records = {record["trial"]: record for record in read_jsonl(directory.trials_file, workspace.reporter.warn)}
        record = records[trial.name if trial.name in records else trial.name + _STOPPED]
        looks = [(step, math.inf if loss is None else loss) for step, loss in record["looks"]]
        # It may have been trained further, for another method.
        return tpe.until_stopped(looks, goes_on)

    grids = {module: sorted(ranks) for module, ranks in workspace.grids.items() if len(ranks) > 1}
    found = tpe.search(grids, steps, len(drawn) * steps, workspace.config.seed, train)
    whole = tuple(_trial(workspace, run.ranks) for run in found if run.steps == steps)
    stopped = [run for run in found if run.steps < steps]
    flops = sum(run.steps / steps * final_flops(workspace, _trial(workspace, run.ranks).ranks) for run in stopped)
    name = f"TPE and halving, {len(whole)} runs and {len(stopped)} that were stopped"
    return [Alternative(name, whole, search_flops=flops)]


def search_cost(workspace: Workspace, selection: Selection, directory: RunDirectory) -> tuple[float, float]:
    """FLOPs of probes and sweep at their own ranks, with looks and hybrids, less the final run that the sweep leaves;
    and seconds of the phases up to the pick, that run's among them."""
    config, warn = workspace.config, workspace.reporter.warn
    records = {record["lane"]: record for record in read_jsonl(directory.lanes_file, warn)}
    looks, samples = probe_schedule(workspace).looks, config.probe.validation_samples
    flops = 0.0
    for event in read_jsonl(directory.events_file, warn):
        if event["event"] == "group":
            for name, steps in zip(event["lanes"], event["steps"], strict=True):
                ranks = records[name]["ranks"]
                flops += steps * step_flops(workspace, ranks)
                flops += sum(0 < look <= steps for look in looks) * look_flops(workspace, ranks, samples)
    for row in read_jsonl(directory.curves_file, warn):
        if row.get("remaining"):
            flops += len(hybrids(list(row["remaining"]))) * look_flops(
                workspace, records[row["lane"]]["ranks"], samples
            )
    if selection.method == "local_sweep":
        # The pick's own run is counted with its trial.
        flops -= final_flops(workspace, _whole(workspace, selection.pick))
        for run in read_json(directory.sweep_file)["runs"]:
            flops += run["looks"][-1][0] / config.finetune.steps * final_flops(workspace, run["ranks"])
    phases = directory.state()["phases"]
    return flops, sum(phases[name]["seconds"] for name in ("probe", "fit", "select") if name in phases)


def final_flops(workspace: Workspace, ranks: Ranks) -> float:
    """FLOPs of a final run with its looks."""
    settings, probe = workspace.config.finetune, workspace.config.probe
    steps = settings.steps * step_flops(workspace, ranks) * settings.batch_size / probe.batch_size
    return steps + (len(final_schedule(workspace).looks) - 1) * look_flops(
        workspace, ranks, settings.validation_samples
    )


def _whole(workspace: Workspace, ranks: Ranks) -> dict[str, int]:
    return dict.fromkeys(workspace.grids, 0) | dict(ranks)


def _train(
    workspace: Workspace,
    programs: Sequence[Program],
    trials: Sequence[Trial],
    directory: RunDirectory,
    goes_on: tpe.GoesOn | None = None,
) -> None:
    """Trains and scores trials in groups; each leaves a record. Of a single one `goes_on` may be asked at each look."""
    settings, reporter = workspace.config.finetune, workspace.reporter
    done = {record["trial"] for record in read_jsonl(directory.trials_file, reporter.warn)}
    if goes_on:
        done |= {name.removesuffix(_STOPPED) for name in done}
    remaining = [trial for trial in trials if trial.name not in done]
    if not remaining:
        return
    most = workspace.config.probe.lanes_per_program
    schedule = final_schedule(workspace)
    if goes_on:
        # One program for all that may be suggested.
        widest = {module: max(ranks) for module, ranks in workspace.grids.items()}
        schedule = replace(schedule, leaving=_Asking(ceiling=schedule.leaving.ceiling, goes_on=goes_on))
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
            yield {"trial": trial.name + _STOPPED, "ranks": trial.ranks, "factors": trial.factors, "looks": looks}
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


def _row(
    workspace: Workspace, method: Alternative, records: Mapping[str, Mapping[str, Any]], pick: Mapping[str, Any]
) -> dict[str, Any]:
    """A method's line of the table; intervals are of the test samples, paired with the pick's."""
    per_rank = lora.parameters_per_rank(workspace.targets)
    trained = [records[trial.name] for trial in method.trials]
    finished = [record for record in trained if record["validation_loss"] is not None]
    finished.sort(key=lambda record: record["validation_loss"])
    taken = finished if method.takes == "mean" else finished[:1]
    costs = [final_flops(workspace, trial.ranks) for trial in method.trials]
    compute = method.search_flops + (np.mean(costs) if method.takes == "mean" else sum(costs))
    row: dict[str, Any] = {
        "method": method.name,
        "ranks": dict(taken[0]["ranks"]) if len(taken) == 1 else None,
        "learning_rate_factors": dict(taken[0]["factors"]) if len(taken) == 1 else None,
        "runs": 1 if method.takes == "mean" else len(method.trials),
        "diverged": len(trained) - len(finished),
        "compute": float(compute / final_flops(workspace, pick["ranks"])),
        "search_seconds": method.search_seconds,
    }
    if not taken:
        return row
    tokens = np.asarray(pick["test_tokens"])
    losses = np.mean([record["test_losses"] for record in taken], axis=0)
    correct = np.mean([record["test_correct"] for record in taken], axis=0)
    low, high = paired_interval(losses - np.asarray(pick["test_losses"]), tokens, workspace.config.seed)
    return row | {
        "validation_loss": float(np.mean([record["validation_loss"] for record in taken])),
        "test_loss": float(losses.sum() / tokens.sum()),
        "test_loss_minus_picks": float((losses - np.asarray(pick["test_losses"])).sum() / tokens.sum()),
        "interval": [low, high],
        "test_accuracy": float(correct.mean()) if correct.size else None,
        "parameters": round(
            float(np.mean([sum(per_rank[m] * r for m, r in record["ranks"].items()) for record in taken]))
        ),
    }


def paired_interval(differences: np.ndarray, tokens: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean difference a token.

    Args:
        differences: [N] of the summed losses of each sample, nats.
        tokens: [N] supervised tokens of each sample.
        seed: of the resamples of samples.
    """
    drawn = np.random.default_rng(seed).integers(0, len(tokens), (_DRAWS, len(tokens)))
    means = differences[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
