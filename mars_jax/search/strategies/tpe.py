"""Strategy `tpe`: Optuna's tree-structured Parzen estimator with successive halving over ranks and rates.

Optuna is an optional dependency: the other strategies need none of it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mars_jax.errors import ConfigError
from mars_jax.lanes.eval_points import EvalPoint, Points
from mars_jax.lanes.stopping import AskEach
from mars_jax.search.strategies.base import DEFAULT_RUNS, Budget, Outcome, Space
from mars_jax.search.strategies.lowest import lowest_of
from mars_jax.search.trainer import Curve, Trainer

if TYPE_CHECKING:
    import optuna

_RANDOM_FIRST = 4  # before there is something to model
_ASKS_PER_RUN = 20  # it suggests again what it knows to be good
_FIRST_RUNG = 4  # a quarter of the steps, then half of them: the worse half of those that came so far stops there


def is_installed() -> bool:
    """Whether Optuna is there."""
    return find_spec("optuna") is not None


class Tpe:
    """Tree-structured Parzen estimator over ranks and rates, with asynchronous successive halving."""

    name = "tpe"
    needs_probes = False
    takes_budget = True
    needs_convergence = False

    def search(self, space: Space, trainer: Trainer, budget: Budget) -> Outcome:
        """Trains what TPE suggests, one after the other, each with the losses of those before in view.

        Successive halving is asynchronous (Li et al. 2020), as Optuna has it: a run stops at a rung if its loss there
        isn't in the lower half of those that came to it before. No run starts once those before had the steps of the
        budget in all; it may keep to those that it knows and leave some of it. The same losses lead to the same runs.

        Raises:
            ConfigError: Optuna is not installed.
            NoValidResultError: no run came to its end.
        """
        curves = self._curves(space, trainer, (budget.runs or DEFAULT_RUNS) * space.steps)
        whole = sum(curve.steps == space.steps for curve in curves)
        among = f"Of {len(curves)} final runs that TPE suggested, {whole} of which were not stopped"
        return lowest_of(self.name, among, curves, space)

    def _curves(self, space: Space, trainer: Trainer, steps: int) -> list[Curve]:
        """The runs, first asked first."""
        if not is_installed():
            raise ConfigError("the strategy tpe needs Optuna. Run `pip install 'mars_jax[compare]'`.")
        import optuna

        grids = {module: sorted(space.grids[module]) for module in space.searched}
        every = {configuration.name for configuration in space.every()}
        runs: dict[str, Curve] = {}
        sampler = optuna.samplers.TPESampler(seed=space.seed, n_startup_trials=_RANDOM_FIRST)
        rung = max(1, space.steps // _FIRST_RUNG)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rung, reduction_factor=2)
        with _quiet():
            study = optuna.create_study(sampler=sampler, pruner=pruner)
            for _ in range(math.ceil(_ASKS_PER_RUN * steps / space.steps)):
                spent = sum(run.steps for run in runs.values())
                if spent >= steps or len(runs) == len(every):
                    break
                trial = study.ask()
                ranks = {module: int(trial.suggest_categorical(module, grid)) for module, grid in grids.items()}
                factors = {
                    module: float(trial.suggest_categorical(f"rate of {module}", grid))
                    for module, grid in space.factors.items()
                }
                configuration, goes_on = space.configuration(ranks, factors), _Pruned(trial, space.steps)
                name = configuration.name
                if name not in every:  # trains nothing
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
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


TPE = Tpe()


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
