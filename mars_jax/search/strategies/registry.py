"""The registry of strategies.

To add one: a file here with a stateless object that has the members of `base.Strategy`, and its line below; from
outside the package, `STRATEGIES.register(strategy)`. It trains through the `Trainer` that it is given and nothing else,
so the run, `mars compare` and the evidence can all use it. Every test of tests/search/strategies/test_registry.py runs
on it.
"""

from typing import TYPE_CHECKING

from mars_jax.runtime.registry import Registry

if TYPE_CHECKING:
    from mars_jax.search.strategies.base import Strategy

_HERE = "mars_jax.search.strategies"

STRATEGIES: "Registry[Strategy]" = Registry(
    "strategy (selection.method)",
    {
        "best_probes": f"{_HERE}.best_probes:BEST_PROBES",
        "laws": f"{_HERE}.laws:LAWS",
        "paper": f"{_HERE}.paper:PAPER",
        "race": f"{_HERE}.race:RACE",
        "laws+race": f"{_HERE}.laws_race:LAWS_RACE",
        "halving": f"{_HERE}.halving:HALVING",
        "random": f"{_HERE}.random:RANDOM",
        "restarts": f"{_HERE}.restarts:RESTARTS",
        "uniform": f"{_HERE}.uniform:UNIFORM",
        "separate_rates": f"{_HERE}.separate_rates:SEPARATE_RATES",
        "tpe": f"{_HERE}.tpe:TPE",
        "gp": f"{_HERE}.gp:GP",
        "hyperband": f"{_HERE}.hyperband:HYPERBAND",
    },
)
