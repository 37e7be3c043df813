"""Optuna's tree-structured Parzen estimator over a rank grid, one of the alternatives of `mars compare`.

An optional dependency: the search of this library needs none of it. What trains is the caller's business.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

Ranks = dict[str, int]

_RANDOM_FIRST = 4  # before there is something to model
_ASKS_PER_RUN = 20  # it suggests again what it knows to be good


def is_installed() -> bool:
    """Whether Optuna is there."""
    return find_spec("optuna") is not None


def suggested(
    grids: Mapping[str, Sequence[int]], number: int, seed: int, loss_of: Callable[[Ranks], float | None]
) -> list[Ranks]:
    """The rank vectors that TPE runs, one after the other, each with the losses of those before in view.

    Args:
        grids: module -> ranks to choose from.
        number: different rank vectors to run, at most those of the grid.
        seed: of the sampler: the same losses lead to the same vectors.
        loss_of: trains a rank vector to the end and gives its validation loss, nats; None if it diverged. Not asked
            twice of the same.

    Returns:
        The vectors, first asked first; fewer than `number` where it keeps to those that it knows.
    """
    import optuna

    losses: dict[tuple[int, ...], float | None] = {}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_FIRST)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(sampler=sampler)
        for _ in range(_ASKS_PER_RUN * number):
            if len(losses) == number:
                break
            trial = study.ask()
            ranks = {module: int(trial.suggest_categorical(module, list(some))) for module, some in grids.items()}
            key = tuple(ranks.values())
            if key not in losses:
                losses[key] = loss_of(ranks)
            if losses[key] is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, losses[key])
    finally:
        optuna.logging.set_verbosity(verbosity)
    return [dict(zip(grids, key, strict=True)) for key in losses]
