"""Strategy `tpe`: Optuna's tree-structured Parzen estimator with successive halving over ranks and rates."""

from typing import TYPE_CHECKING

from mars_jax.search.strategies.model_search import ModelSearch, halving_pruner

if TYPE_CHECKING:
    import optuna

_RANDOM_FIRST = 4  # before there is something to model


def _sampler(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_FIRST)


TPE = ModelSearch("tpe", _sampler, halving_pruner)
