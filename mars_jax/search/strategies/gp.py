"""Strategy `gp`: Optuna's Gaussian process with expected improvement and successive halving over ranks and rates."""

import warnings
from typing import TYPE_CHECKING

from mars_jax.search.strategies.model_search import ModelSearch, halving_pruner

if TYPE_CHECKING:
    import optuna

_RANDOM_FIRST = 4  # before there is something to model


def _sampler(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_RANDOM_FIRST)


GP = ModelSearch("gp", _sampler, halving_pruner, needs=("optuna", "torch"), extra="compare,torch")
