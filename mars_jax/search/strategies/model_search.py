"""Search by a sampler of Optuna, which suggests one configuration after the other; runs that fall behind are pruned.

Ranks and rates are ordered levels of their grids, so a sampler that models the loss sees neighbours as neighbours.
Optuna is an optional dependency: strategies without it need none of it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from mars_jax.errors import ConfigError
from mars_jax.lanes.eval_points import EvalPoint, Points
from mars_jax.lanes.stopping import AskEach
from mars_jax.search.strategies.base import DEFAULT_RUNS, Budget, Outcome, Probes, Space
from mars_jax.search.strategies.lowest import lowest_of
from mars_jax.search.strategies.octaves import nearest
from mars_jax.search.trainer import Configuration, Curve, Trainer

if TYPE_CHECKING:
    import optuna

_ASKS_PER_RUN = 20  # a sampler suggests again what it knows to be good
FIRST_RUNG = 4
"""A quarter of the steps, then half of them, are where runs are pruned."""


def is_installed() -> bool:
    """Whether Optuna is there."""
    return find_spec("optuna") is not None


@dataclass(frozen=True)
class ModelSearch:
    """Strategy that trains what a sampler suggests.

    Attributes:
        name: in configs.
        sampler: makes the sampler from a seed.
        pruner: makes the pruner from the steps of a run.
        needs: packages that it takes.
        extra: extras of this package that install them.
    """

    name: str
    sampler: "Callable[[int], optuna.samplers.BaseSampler]"
    pruner: "Callable[[int], optuna.pruners.BasePruner]"
    needs: tuple[str, ...] = ("optuna",)
    extra: str = "compare"

    probes: ClassVar[Probes] = "none"
    takes_budget = True
    needs_convergence = False

    def begins(self, space: Space, budget: Budget) -> int:
        """See `Strategy`."""
        return FIRST_RUNG * (budget.runs or DEFAULT_RUNS)  # each has a quarter of its steps or more

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """Trains what the sampler suggests, one after the other, each with the losses of those before in view.

        No run starts once those before had the steps of the budget in all; it may keep to those that it knows and leave
        some of it. The same losses lead to the same runs.

        Raises:
            ConfigError: a package is not installed.
            NoValidResultError: no run came to its end.
        """
        missing = [package for package in self.needs if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"selection.method: {self.name} needs {' and '.join(missing)}. Run `pip install "
                f"'mars_jax[{self.extra}]'`."
            )
        curves = self._curves(space, trainer, (budget.runs or DEFAULT_RUNS) * space.steps)
        whole = sum(curve.steps == space.steps for curve in curves)
        among = f"Of {len(curves)} final runs that {self.name} suggested, {whole} of which were not stopped"
        return lowest_of(self.name, among, curves, space)

    def _curves(self, space: Space, trainer: Trainer, steps: int) -> list[Curve]:
        """The runs, first asked first."""
        import optuna

        every = space.every()
        runs: dict[str, Curve] = {}
        with _quiet():
            study = optuna.create_study(sampler=self.sampler(space.seed), pruner=self.pruner(space.steps))
            for _ in range(math.ceil(_ASKS_PER_RUN * steps / space.steps)):
                spent = sum(run.steps for run in runs.values())
                if spent >= steps or len(runs) == len(every):
                    break
                trial = study.ask()
                configuration, goes_on = _suggested(trial, space), _Pruned(trial, space.steps)
                if not any(configuration.ranks.values()):  # trains nothing
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                configuration = nearest(space, every, configuration)
                name = configuration.name
                if name not in runs:
                    (runs[name],) = trainer.train([configuration], AskEach(goes_on))
                last, losses = _until_stopped(runs[name].points, goes_on)
                if not math.isfinite(last.validation_loss) or not last.alive:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                elif last.step < space.steps:
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                else:
                    study.tell(trial, min(losses))
        return list(runs.values())


def halving_pruner(steps: int) -> "optuna.pruners.BasePruner":
    """Asynchronous successive halving (Li et al. 2020).

    A run stops at a rung if its loss there isn't in the lower half of those that came to it before.
    """
    import optuna

    return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // FIRST_RUNG), reduction_factor=2)


def _suggested(trial: "optuna.Trial", space: Space) -> Configuration:
    """What a trial suggests: a level of each grid."""
    grids = {module: sorted(space.grids[module]) for module in space.searched}
    ranks = {module: grid[trial.suggest_int(module, 0, len(grid) - 1)] for module, grid in grids.items()}
    rates = {module: sorted(grid) for module, grid in space.factors.items()}
    factors = {module: grid[trial.suggest_int(f"rate of {module}", 0, len(grid) - 1)] for module, grid in rates.items()}
    return space.configuration(ranks, factors)


@contextmanager
def _quiet() -> Iterator[None]:
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _until_stopped(points: Points, goes_on: "_Pruned") -> tuple[EvalPoint, list[float]]:
    """The last eval point before which a run went on, and the losses up to it."""
    losses: list[float] = []
    for point in points:
        losses.append(point.validation_loss if point.alive else math.inf)
        if not goes_on(point.step, losses[-1]):
            break
    return point, losses


class _Pruned:
    """Whether a trial goes on after an eval point. Optuna is asked once of each, so the answer stands."""

    def __init__(self, trial: "optuna.Trial", steps: int) -> None:
        self._trial, self._steps = trial, steps
        self._stopped, self._reported = False, 0

    def __call__(self, step: int, loss: float) -> bool:
        if not self._stopped and self._reported < step < self._steps and math.isfinite(loss):
            self._reported = step
            self._trial.report(loss, step)
            self._stopped = self._trial.should_prune()
        return not (self._stopped and step >= self._reported)
