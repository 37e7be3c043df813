"""A cell's final runs as an oracle, what they cost, and strategies replayed on them.

Compute is counted in FLOPs (closed form, own ranks, no padding) and given in final runs, one being the mean of the
grid's. It follows from what a strategy asked of its trainer.
"""

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.evidence.runs import SEARCHED, Cell, Probes, Run
from benchmarks.lib.trials import RULES
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.stopping import Patience
from mars_jax.laws.records import LaneRecord
from mars_jax.search.probes.swaps import swapped
from mars_jax.search.recorded_trainer import RecordedTrainer
from mars_jax.search.strategies.base import Budget, Space, Strategy
from mars_jax.search.strategies.halving import halved
from mars_jax.search.strategies.lowest import winner
from mars_jax.search.trainer import Configuration, Curve


class Grid:
    """The final runs of a cell: the oracle, and regrets against it."""

    def __init__(self, runs: Sequence[Run], rated: Sequence[tuple[Mapping[str, float], Run]] = ()) -> None:
        """Of every rank vector, and of some with factors on the learning rates of modules."""
        self.runs = {key(run.ranks): run for run in runs}
        self.best = min(run.loss for run in runs)
        self.best_test = min(run.test_loss for run in runs)
        recorded = [(run.recorded(factors), run) for factors, run in [*((dict[str, float](), r) for r in runs), *rated]]
        self.curves = [curve for curve, _ in recorded]
        self._by_name = {curve.configuration.name: run for curve, run in recorded}

    def run_of(self, configuration: Configuration) -> Run:
        """The run of a configuration."""
        return self._by_name[configuration.name]

    def regret(self, run: Run) -> dict[str, float]:
        """Relative to the best of the grid: of the validation loss, and of the test loss."""
        return {
            "regret": run.loss / self.best - 1.0,
            "test_regret": run.test_loss / self.best_test - 1.0,
        }


def joint(lane: Lane) -> bool:
    """Whether a lane adapts all modules."""
    return len(lane.adapted) == len(lane.ranks)


def key(ranks: Ranks) -> tuple[int, ...]:
    """Of the searched modules."""
    return tuple(ranks[module] for module in SEARCHED)


def needed(probes: Probes, rule: str) -> list[Lane]:
    """The probes that a rule needs; a name that is no rule's stands for the losses alone."""
    single = rule in RULES and RULES[rule].rule.needs_single_module
    return [lane for lane in probes.lanes if single or joint(lane)]


class Method(NamedTuple):
    """A way to choose: its name, its regrets, its compute in final runs (its own final run counted), what it picked."""

    name: str
    regret: float
    test_regret: float
    compute: float
    ranks: dict[str, int] | None = None
    p_best: float | None = None


class Prices:
    """FLOPs in units of a final run, the mean over the grid."""

    def __init__(self, cell: Cell) -> None:
        """Of a cell."""
        self._job = cell.job
        self._final = 1.0
        self._final = statistics.mean(self.final(run.ranks) for run in cell.grid)

    def final(self, ranks: Ranks, share: float = 1.0) -> float:
        """A share of a final run."""
        settings = self._job.config.finetune
        points = settings.steps / settings.look_every
        return share * self._price(ranks, settings.steps, points, settings.validation_samples)

    def of_rule(self, probes: Probes, rule: str) -> float:
        """The probes that a rule needs, with their eval points and module swaps."""
        return self.probes(probes, rule, {lane.name for lane in needed(probes, rule)})

    def probes(self, probes: Probes, rule: str, names: Container[str]) -> float:
        """Some of the probes by name, with their eval points, and the module swaps if the rule needs them."""
        settings = probes.job.config.probe
        swaps = rule in RULES and RULES[rule].rule.needs_swaps
        largest, total = max(lane.num_samples for lane in probes.lanes), 0.0
        for lane, curve in zip(probes.lanes, probes.curves, strict=True):
            if lane.name not in names:
                continue
            extra = len(swapped(SEARCHED)) * sum(any(point.remaining.values()) for point in curve)
            # Nested smaller D are read off the same pass, but what remains is read anew.
            ran = settings.sampling == "separate" or lane.num_samples == largest
            steps, points = (curve[-1].step, len(curve) - 1) if ran else (0, 0)
            points += extra if swaps else 0
            total += self._price(lane.ranks, steps, points, settings.validation_samples)
        return total

    def _price(self, ranks: Ranks, steps: float, points: float, samples: int) -> float:
        prices, cached = self._job.prices, not ranks["vision"]
        flops = steps * prices.step(ranks, cached_encoder=cached)
        flops += points * prices.eval_point(ranks, samples, cached_encoder=cached)
        return flops / self._final


@dataclass(frozen=True)
class Replay:
    """What strategies are replayed on.

    Attributes:
        grid: final runs.
        space: what can be chosen.
        prices: of runs and probes.
        probes: those that strategies may ask for; None: none.
        rule: that times the probes' modules.
        records: of the probes by that rule.
    """

    grid: Grid
    space: Space
    prices: Prices
    probes: Probes | None = None
    rule: str = ""
    records: tuple[LaneRecord, ...] = ()

    @property
    def recorded_probes(self) -> Probes:
        """The probes, where there are some."""
        assert self.probes is not None, "this replay has no probes"
        return self.probes

    def method(self, name: str, strategy: Strategy, budget: Budget | None = None) -> Method:
        """A strategy of the package; what it only picks is trained."""
        trainer = RecordedTrainer(self.grid.curves, self.records)
        outcome = strategy.search(self.space, trainer, budget or Budget())
        final, p_best = outcome.final, None
        if final is None:
            (final,) = trainer.train([self.space.configuration(outcome.selection.pick)], Patience())
            p_best = outcome.selection.p_best
        return self._method(name, final, trainer)._replace(p_best=p_best)

    def swept(self, name: str, vectors: Sequence[Ranks]) -> Method:
        """Successive halving over candidates that were read off the probes, on the final runs' own curves."""
        trainer = RecordedTrainer(self.grid.curves, self.records)
        trainer.probe(self.space.probed, self.space.sizes)
        curves = halved([self.space.configuration(ranks) for ranks in vectors], self.space, trainer)
        return self._method(name, winner(curves, self.space), trainer)

    def _method(self, name: str, final: Curve, trainer: RecordedTrainer) -> Method:
        run = self.grid.run_of(final.configuration)
        compute = math.fsum(
            self.prices.final(curve.configuration.ranks, curve.steps / self.space.steps) for curve in trainer.trained
        )
        if trainer.probed:
            names = {record.lane for record in trainer.probed}
            compute += self.prices.probes(self.recorded_probes, self.rule, names)
        return Method(name, **self.grid.regret(run), compute=compute, ranks=dict(run.ranks))
