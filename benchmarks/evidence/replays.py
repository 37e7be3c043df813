"""Strategies replayed on a cell of the tabular benchmark: what they come to, and what that costs.

The package's own strategies train through its `RecordedTrainer`, so none is written twice. Compute is counted in final
runs: the steps of all runs that a strategy began, over the steps of one.

    python -m benchmarks.evidence.replays [STRATEGY ...]

replays strategies on every cell of the shorter length, and prints for each budget, as JSON, means over tasks of the
excess (how much the delivered run is above an average run of the task's best configuration; of a task with one seed
above its lowest) with a 95 % interval by bootstrap over tasks, and of the compute. Strategies that draw at random are
replayed several times.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.evidence.design import FACTORS, FULL_RANKS, LENGTHS, PROJECTOR_RANK, SEARCHED
from benchmarks.evidence.table import Cell, read_table
from mars_jax.config.schema import SelectionConfig
from mars_jax.errors import ConfigError
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.laws.fit import Laws
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.jsonfiles import Document, dump_json
from mars_jax.search.probes.design import rank_vectors
from mars_jax.search.recorded_trainer import RecordedTrainer
from mars_jax.search.strategies.base import Budget, Space, Strategy
from mars_jax.search.strategies.registry import STRATEGIES
from mars_jax.search.trainer import Configuration, Curve


@dataclass(frozen=True)
class Replayed:
    """What a strategy came to in a cell.

    Attributes:
        configuration: of the run that it delivered.
        loss: of that run, nats a token.
        test_loss: of the same.
        runs: compute in final runs.
    """

    configuration: Configuration
    loss: float
    test_loss: float
    runs: float


def space_of(cell: Cell, seed: int = 0) -> Space:
    """The configurations to choose from: every one of the ranks and rates that a cell has all combinations of."""
    curves = [run.curve for run in cell.runs]
    grids = {"vision": FULL_RANKS, "projector": (PROJECTOR_RANK,), "llm": FULL_RANKS}
    factors = dict.fromkeys(SEARCHED, FACTORS)
    return Space(
        grids=grids,
        num_samples=cell.num_samples,
        steps=cell.steps,
        probed=rank_vectors(grids, corners=True),
        sizes=(),
        parameters_per_rank=cell.parameters_per_rank,
        rates=cell.rates,
        fit=_no_laws,
        most_together=len(curves),
        seed=seed,
        factors=factors,
    )


def _no_laws(records: Sequence[LaneRecord]) -> Laws:
    raise ConfigError("the cells have no probes, so no strategy that reads probes can be replayed on them.")


def replayed(cell: Cell, strategy: Strategy, budget: Budget | None = None, seed: int = 0) -> Replayed:
    """Replays a strategy."""
    trainer = RecordedTrainer(with_samples(run.curve) for run in cell.runs)
    outcome = strategy.search(space_of(cell, seed), trainer, budget or Budget())
    assert outcome.final is not None
    name = outcome.final.configuration.name
    (run,) = [run for run in cell.runs if run.curve.configuration.name == name]
    steps = sum(curve.steps for curve in trainer.trained)
    return Replayed(run.curve.configuration, run.curve.loss, run.test_loss, steps / cell.steps)


def with_samples(curve: Curve) -> Curve:
    """A curve with losses of samples at all its eval points: between those that keep them, the last kept, scaled."""
    points: list[EvalPoint] = []
    kept: EvalPoint | None = None
    for point in curve.points:
        if point.sample_losses:
            kept = point
        elif kept is not None and point.alive:
            scale = point.validation_loss / kept.validation_loss
            point = replace(point, sample_losses=tuple(scale * loss for loss in kept.sample_losses))
        points.append(point)
    return replace(curve, points=tuple(points))


@dataclass(frozen=True)
class Truth:
    """What is known of a task from all its cells of one length.

    Attributes:
        losses: name of a configuration -> its mean loss over seeds, the seeds' common effects divided out.
        effects: seed -> its common effect, a factor on losses.
    """

    losses: Mapping[str, float]
    effects: Mapping[int, float]

    @property
    def best(self) -> float:
        """Mean loss of the best configuration."""
        return min(self.losses.values())

    def excess(self, seed: int, loss: float) -> float:
        """How much a run of a seed is above an average run of the best configuration, as a share."""
        return loss / self.effects[seed] / self.best - 1.0


def truth_of(cells: Sequence[Cell]) -> Truth:
    """The truth of a task from its cells, one a seed; of one seed alone it is that seed's losses."""
    by_seed = {cell.seed: {run.curve.configuration.name: run.curve.loss for run in cell.runs} for cell in cells}
    names = [
        n
        for n in next(iter(by_seed.values()))
        if all(np.isfinite(losses.get(n, np.inf)) for losses in by_seed.values())
    ]
    logs = np.log([[losses[name] for name in names] for losses in by_seed.values()])
    effects = np.median(logs - logs.mean(axis=0), axis=1)
    apart = logs - effects[:, None]
    means = apart.mean(axis=0)
    losses = dict(zip(names, np.exp(means).tolist(), strict=True))
    return Truth(losses, dict(zip(by_seed, np.exp(effects).tolist(), strict=True)))


def truths_of(cells: Sequence[Cell]) -> dict[str, Truth]:
    """The truth of each task that some cells are of."""
    by_task: dict[str, list[Cell]] = {}
    for cell in cells:
        by_task.setdefault(cell.task, []).append(cell)
    return {task: truth_of(some) for task, some in by_task.items()}


DEFAULT = SelectionConfig().method
PEERS = ("tpe", "gp", "hyperband")
BUDGETS: Mapping[str, Sequence[int | None]] = {
    DEFAULT: (None,),
    "race": (4, 6, 8),
    "halving": (4, 8),
    "random": (2, 4, 8),
    "restarts": (2, 4),
    **dict.fromkeys(PEERS, (2, 4, 8)),
}
"""Strategies, and the final runs that they begin; None: as many as they would."""

REPEATS = 4
"""Replays of a strategy that draws at random, in a cell."""

BOOTSTRAPS = 10_000
DRAWN = ("random", *PEERS)


def excesses(name: str, begun: int | None, cells: Sequence[Cell], truths: Mapping[str, Truth]) -> list[Document]:
    """Excess, test loss and compute of each replay of a strategy, with the task."""
    found = []
    for cell in cells:
        for seed in range(REPEATS if name in DRAWN else 1):
            run = replayed(cell, STRATEGIES[name], Budget(begun), seed)
            excess = truths[cell.task].excess(cell.seed, run.loss)
            found.append({"task": cell.task, "cell": cell.name, "excess": excess, "runs": run.runs})
    return found


def replayed_row(name: str, begun: int | None, cells: Sequence[Cell], truths: Mapping[str, Truth]) -> Document:
    """What a strategy comes to on average, for a number of final runs that it may begin."""
    found = excesses(name, begun, cells, truths)
    return {
        "strategy": name,
        "begun": begun,
        "runs": statistics.mean(one["runs"] for one in found),
        "excess": mean_of_tasks(found),
        "interval": interval_of_tasks(found, mean_of_tasks),
        "worst cell": max(one["excess"] for one in found),
    }


def mean_of_tasks(found: Sequence[Document], key: str = "excess") -> float:
    """Mean over tasks of a task's mean."""
    tasks: dict[str, list[float]] = {}
    for one in found:
        tasks.setdefault(one["task"], []).append(one[key])
    return statistics.mean(map(statistics.mean, tasks.values()))


def interval_of_tasks(found: Sequence[Document], of: Callable[[Sequence[Document]], float]) -> list[float]:
    """95 % interval of a mean over tasks, by bootstrap over tasks."""
    tasks = sorted({one["task"] for one in found})
    means = np.array([of([one for one in found if one["task"] == task]) for task in tasks])
    drawn = np.random.default_rng(0).integers(len(tasks), size=(BOOTSTRAPS, len(tasks)))
    low, high = np.percentile(means[drawn].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def main() -> None:
    """Prints the rows."""
    known = [name for name in STRATEGIES.names if STRATEGIES[name].probes != "losses"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_text = f"of {', '.join(known)}; all by default"
    parser.add_argument("strategies", nargs="*", choices=known, metavar="STRATEGY", help=help_text)
    names = parser.parse_args().strategies or known
    cells = [cell for cell in read_table() if cell.steps == LENGTHS[0]]
    truths = truths_of(cells)
    rows = [replayed_row(name, begun, cells, truths) for name in names for begun in BUDGETS.get(name, (None,))]
    print(dump_json(rows, indent=1))


if __name__ == "__main__":
    main()
