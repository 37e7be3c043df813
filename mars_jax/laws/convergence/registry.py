"""Registry of convergence rules.

To add a rule, write a file in this folder with a `Rule` and add its line below; from outside the package, call
`RULES.register(rule)`. tests/laws/convergence/test_registry.py tests every registered rule.
"""

from typing import TYPE_CHECKING

from mars_jax.runtime.registry import Registry

if TYPE_CHECKING:
    from mars_jax.laws.convergence.base import Rule

RULES: "Registry[Rule]" = Registry(
    "convergence rule",
    {
        "loss_fraction": "mars_jax.laws.convergence.loss_fraction:LOSS_FRACTION",
        "splice": "mars_jax.laws.convergence.splice:SPLICE",
        "drift": "mars_jax.laws.convergence.drift:DRIFT",
    },
)
