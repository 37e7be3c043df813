"""Strategy `hyperband`: random ranks and rates under Optuna's Hyperband (Li et al. 2018)."""

from typing import TYPE_CHECKING

from mars_jax.search.strategies.model_search import FIRST_RUNG, ModelSearch

if TYPE_CHECKING:
    import optuna


def _sampler(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(steps: int) -> "optuna.pruners.BasePruner":
    import optuna

    # The first rung of its widest bracket is half of that of the other strategies.
    first = max(1, steps // (2 * FIRST_RUNG))
    return optuna.pruners.HyperbandPruner(min_resource=first, max_resource=max(first, steps), reduction_factor=2)


HYPERBAND = ModelSearch("hyperband", _sampler, _pruner)
