"""`mars compare`: the pick beside its alternatives on the user's own task, each trained to the end, in one table.

Which alternatives there are, what each costs, and the table. How a run trains is `finetune`'s business, how it is
scored `evaluate`'s. Every method chooses by validation loss; the test split is read for the table alone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from mars_jax.adapters.targets import parameters_per_rank
from mars_jax.job.directory import RunDirectory
from mars_jax.job.programs import Program
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.stopping import GoesOn, Look, until_stopped
from mars_jax.runtime.jsonfiles import read_jsonl, write_json
from mars_jax.search.cost import final_flops, search_cost
from mars_jax.search.selection import Ranks, Selection
from mars_jax.search.strategies import tpe
from mars_jax.search.trainer import STOPPED, Trial, train_trials, trial_of

_DRAWS = 1000
# Of the learning rate of one module, at uniform ranks.
_RATE_FACTORS = (1 / 3, 3.0)


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
    train_trials(workspace, programs, trials, directory)
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
    trial = partial(trial_of, workspace)
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


def _by_tpe(
    workspace: Workspace, programs: Sequence[Program], drawn: Sequence[Trial], directory: RunDirectory
) -> list[Alternative]:
    """Trains what Optuna's TPE suggests, for the steps that random search had; none without Optuna."""
    if not tpe.is_installed():
        workspace.reporter.notice("compare: TPE is left out, since Optuna isn't installed (pip install optuna)")
        return []
    steps = workspace.config.finetune.steps

    def train(ranks: Ranks, goes_on: GoesOn) -> list[Look]:
        trial = trial_of(workspace, ranks)
        train_trials(workspace, programs, [trial], directory, goes_on)
        records = {record["trial"]: record for record in read_jsonl(directory.trials_file, workspace.reporter.warn)}
        record = records[trial.name if trial.name in records else trial.name + STOPPED]
        looks = [(step, math.inf if loss is None else loss) for step, loss in record["looks"]]
        # It may have been trained further, for another method.
        return until_stopped(looks, goes_on)

    grids = {module: sorted(ranks) for module, ranks in workspace.grids.items() if len(ranks) > 1}
    found = tpe.search(grids, steps, len(drawn) * steps, workspace.config.seed, train)
    whole = tuple(trial_of(workspace, run.ranks) for run in found if run.steps == steps)
    stopped = [run for run in found if run.steps < steps]
    flops = sum(run.steps / steps * final_flops(workspace, trial_of(workspace, run.ranks).ranks) for run in stopped)
    name = f"TPE and halving, {len(whole)} runs and {len(stopped)} that were stopped"
    return [Alternative(name, whole, search_flops=flops)]


def _row(
    workspace: Workspace, method: Alternative, records: Mapping[str, Mapping[str, Any]], pick: Mapping[str, Any]
) -> dict[str, Any]:
    """A method's line of the table; intervals are of the test samples, paired with the pick's."""
    per_rank = parameters_per_rank(workspace.targets)
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
