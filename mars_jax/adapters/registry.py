"""Registry of adapter methods.

To add a method, write a file in this folder with a subclass of `method.AdapterMethod`, and add an object of it below;
from outside the package, call `METHODS.register(method)`. tests/adapters/test_common.py tests every registered method.

It imports no JAX: configs check names before anything heavy is loaded.
"""

from typing import TYPE_CHECKING

from mars_jax.runtime.registry import Registry

if TYPE_CHECKING:
    from mars_jax.adapters.method import AdapterMethod

METHODS: "Registry[AdapterMethod]" = Registry(
    "adapter method",
    {
        "lora": "mars_jax.adapters.lora:LORA",
        "full_rank": "mars_jax.adapters.full_rank:FULL_RANK",
    },
)
