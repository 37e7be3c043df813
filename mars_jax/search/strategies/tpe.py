"""Optuna's tree-structured Parzen estimator with successive halving over a rank grid, an alternative in `mars compare`.

An optional dependency: the search of this library needs none of it. What trains is the caller's business.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import optuna
from mars_jax.lanes.stopping import GoesOn, Look, until_stopped

Ranks = dict[str, int]

_RANDOM_FIRST = 4  # before there is something to model
_ASKS_PER_RUN = 20  # it suggests again what it knows to be good
_FIRST_RUNG = 4  # a quarter of the steps, then half of them: the worse half of those that came so far stops there


class Run(NamedTuple):
    """A rank vector that was trained, to the end or to where it was stopped."""

    ranks: Ranks
    looks: Sequence[Look]

    @property
    def steps(self) -> int:
        """Steps that it had."""
        return self.looks[-1][0]


def is_installed() -> bool:
    """Whether Optuna is there."""
    return find_spec("optuna") is not None


def search(
    grids: Mapping[str, Sequence[int]],
    steps: int,
    budget: float,
    seed: int,
    train: Callable[[Ranks, GoesOn], Sequence[Look]],
) -> list[Run]:
    """Runs what TPE suggests, one after the other, each with the losses of those before in view.

    Successive halving is asynchronous (Li et al. 2020), as Optuna has it: a run stops at a rung if its loss there isn't
    in the lower half of those that came to it before.

    Args:
        grids: module -> ranks to choose from.
        steps: of a run that isn't stopped.
        budget: no run starts once those before had as many steps in all.
        seed: of the sampler: the same losses lead to the same runs.
        train: trains a rank vector, asks at each look whether to go on, and gives its looks. Not asked twice of the
            same vector.

    Returns:
        The runs, first asked first; it may keep to those that it knows and leave some of the budget.
    """
    import optuna

    runs: dict[tuple[int, ...], Run] = {}
    pairs = math.prod(len(ranks) for ranks in grids.values())
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_FIRST)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // _FIRST_RUNG), reduction_factor=2)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        for _ in range(math.ceil(_ASKS_PER_RUN * budget / steps)):
            if sum(run.steps for run in runs.values()) >= budget or len(runs) == pairs:
                break
            trial = study.ask()
            ranks = {module: int(trial.suggest_categorical(module, list(some))) for module, some in grids.items()}
            key, goes_on = tuple(ranks.values()), _Halving(trial, steps)
            if key not in runs:
                runs[key] = Run(ranks, train(ranks, goes_on))
            looks = until_stopped(runs[key].looks, goes_on)
            if not math.isfinite(looks[-1][1]):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            elif looks[-1][0] < steps:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, min(loss for _, loss in looks))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return list(runs.values())


class _Halving:
    """Whether a trial goes on after a look. May be told of a look again: Optuna is asked once, so the answer stands."""

    def __init__(self, trial: "optuna.Trial", steps: int) -> None:
        self._trial, self._steps = trial, steps
        self._stopped, self._told = False, 0

    def __call__(self, step: int, loss: float) -> bool:
        if not self._stopped and self._told < step < self._steps and math.isfinite(loss):
            self._told = step
            self._trial.report(loss, step)
            self._stopped = self._trial.should_prune()
        return not (self._stopped and step >= self._told)
