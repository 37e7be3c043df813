"""`mars compare`: the pick beside its alternatives on the user's own task, each trained to the end, in one table.

Each alternative is a strategy, or the pick of one. Every one chooses by validation loss; the test split is read for the
table alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mars_jax.evals.run import held_out_evaluator
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.job.programs import Program
from mars_jax.lanes.stopping import Patience
from mars_jax.runtime.jsonfiles import Document, write_json
from mars_jax.search.cost import probe_flops, search_flops
from mars_jax.search.lane_trainer import LaneTrainer
from mars_jax.search.selection import Selection
from mars_jax.search.space import job_space
from mars_jax.search.strategies.base import Budget, Space
from mars_jax.search.strategies.model_search import is_installed
from mars_jax.search.strategies.random import RANDOM
from mars_jax.search.strategies.registry import STRATEGIES
from mars_jax.search.strategies.separate_rates import SEPARATE_RATES
from mars_jax.search.strategies.tpe import TPE
from mars_jax.search.strategies.uniform import Uniform, shared_ranks
from mars_jax.search.trainer import Configuration
from mars_jax.search.trials import TrialRecord, TrialTrainer

_DRAWS = 1000


@dataclass(frozen=True)
class Alternative:
    """A way to choose ranks.

    Attributes:
        name: as the table has it.
        configurations: its final runs, those that were stopped left out.
        takes: the best of them by validation loss, or what a draw of one of them gives on average.
        search_flops: what it costs besides them.
        search_seconds: what it takes besides them.
    """

    name: str
    configurations: tuple[Configuration, ...]
    takes: Literal["best", "mean"] = "best"
    search_flops: float = 0.0
    search_seconds: float = 0.0


def compare_run(job: Job, programs: Sequence[Program], selection: Selection) -> Document:
    """Trains what isn't trained yet, and writes compare.json.

    Args:
        job: of the run; trials that are in its comparison already are not run again.
        programs: of the probe phase, one of which may serve.
        selection: what the search of the run picked.
    """
    space = job_space(job)
    evaluator, _ = held_out_evaluator(job.config, job.reporter, job.base, job.data, controls=False)
    folder = job.directory / files.COMPARISON_CHECKPOINTS
    trainer = TrialTrainer(LaneTrainer(job, programs, folder, "compare"), evaluator)
    pick = Configuration(space.configuration(selection.pick).ranks, selection.factors, selection.seed)
    searched = _search(job, selection, pick)
    # As many runs as the search cost.
    budget = Budget(max(2, round(1 + searched.search_flops / job.prices.final_run(pick.ranks))))
    alternatives = [searched, *_designed(space, budget)]
    planned = {c.name: c for alternative in alternatives for c in alternative.configurations}
    trainer.train(list(planned.values()), Patience())
    alternatives += [_searched_by(job, name, space, trainer) for name in job.config.compare.strategies]
    if is_installed():
        alternatives.append(_by_tpe(job, space, trainer, budget))
    else:
        job.reporter.notice("compare: TPE is left out, since Optuna isn't installed (pip install optuna)")
    records = trainer.records()
    rows = [_row(job, alternative, records, records[pick.name]) for alternative in alternatives]
    document = {
        "num_test_samples": len(records[pick.name].test_tokens),
        "unit_of_compute": "a final run with the picked ranks",
        "methods": rows,
    }
    write_json(job.directory / files.COMPARISON, document)
    return document


def _search(job: Job, selection: Selection, pick: Configuration) -> Alternative:
    """The run's own search."""
    flops = search_flops(job)
    if (job.directory / files.SWEEP).exists():
        # The pick's own run is counted with its trial.
        flops -= job.prices.final_run(pick.ranks)
    seconds = sum(job.directory.book.seconds(phase) for phase in ("probe", "fit", "select"))
    return Alternative("MARS", (pick,), search_flops=flops, search_seconds=seconds)


def _designed(space: Space, budget: Budget) -> list[Alternative]:
    """Uniform ranks, the largest, separate learning rates, and chance at the pick's compute."""
    shared = shared_ranks(space)
    found = [Alternative(f"uniform rank {rank}", tuple(Uniform(rank).configurations(space, budget))) for rank in shared]
    largest = {module: max(space.grids[module]) for module in space.searched}
    found.append(Alternative("largest ranks", (space.configuration(largest),)))
    if shared or not space.searched:
        name = f"separate learning rates at {f'rank {shared[len(shared) // 2]}' if shared else 'the given ranks'}"
        found.append(Alternative(name, tuple(SEPARATE_RATES.configurations(space, budget))))
    drawn = tuple(RANDOM.configurations(space, budget))
    return [
        *found,
        Alternative(f"random search, {len(drawn)} runs", drawn),
        Alternative("random ranks", drawn, takes="mean"),
    ]


def _searched_by(job: Job, name: str, space: Space, trainer: TrialTrainer) -> Alternative:
    """What a strategy comes to with the final runs that it begins by default."""
    strategy = STRATEGIES[name]
    outcome = strategy.search(space, trainer, Budget())
    selection = outcome.selection
    pick = Configuration(space.configuration(selection.pick).ranks, selection.factors, selection.seed)
    if outcome.final is None:
        trainer.train([pick], Patience())
    others = [curve for curve in outcome.curves if curve.configuration.name != pick.name]
    flops = sum(c.steps / space.steps * job.prices.final_run(c.configuration.ranks) for c in others)
    flops += probe_flops(job) if strategy.probes == "losses" else 0.0
    return Alternative(name, (pick,), search_flops=flops)


def _by_tpe(job: Job, space: Space, trainer: TrialTrainer, budget: Budget) -> Alternative:
    """What Optuna's TPE comes to, for the steps that random search had."""
    curves = TPE.search(space, trainer, budget).curves
    whole_runs = tuple(curve.configuration for curve in curves if curve.steps == space.steps)
    stopped = [curve for curve in curves if curve.steps < space.steps]
    flops = sum(c.steps / space.steps * job.prices.final_run(c.configuration.ranks) for c in stopped)
    name = f"TPE and halving, {len(whole_runs)} runs and {len(stopped)} that were stopped"
    return Alternative(name, whole_runs, search_flops=flops)


def _row(job: Job, alternative: Alternative, records: Mapping[str, TrialRecord], pick: TrialRecord) -> Document:
    """An alternative's line of the table; intervals are of the test samples, paired with the pick's."""
    trained = [records[configuration.name] for configuration in alternative.configurations]
    finished = sorted(
        ((record.validation_loss, record) for record in trained if record.validation_loss is not None),
        key=lambda pair: pair[0],
    )
    taken = [record for _, record in (finished if alternative.takes == "mean" else finished[:1])]
    costs = [job.prices.final_run(configuration.ranks) for configuration in alternative.configurations]
    compute = alternative.search_flops + (np.mean(costs) if alternative.takes == "mean" else sum(costs))
    row: Document = {
        "method": alternative.name,
        "ranks": dict(taken[0].ranks) if len(taken) == 1 else None,
        "learning_rate_factors": dict(taken[0].factors) if len(taken) == 1 else None,
        "runs": 1 if alternative.takes == "mean" else len(alternative.configurations),
        "diverged": len(trained) - len(finished),
        "compute": float(compute / job.prices.final_run(pick.ranks)),
        "search_seconds": alternative.search_seconds,
    }
    if not taken:
        return row
    tokens = np.asarray(pick.test_tokens)
    losses = np.mean([record.test_losses for record in taken], axis=0)
    correct = np.mean([record.test_correct for record in taken], axis=0)
    differences = losses - np.asarray(pick.test_losses)
    low, high = paired_interval(differences, tokens, job.config.seed)
    parameters = [job.base.num_trained(record.ranks) for record in taken]
    return row | {
        "validation_loss": float(np.mean([loss for loss, _ in finished[: len(taken)]])),
        "test_loss": float(losses.sum() / tokens.sum()),
        "test_loss_minus_picks": float(differences.sum() / tokens.sum()),
        "interval": [low, high],
        "test_accuracy": float(correct.mean()) if correct.size else None,
        "parameters": round(float(np.mean(parameters))),
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
