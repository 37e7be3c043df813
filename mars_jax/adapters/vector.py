"""Adapters as one flat vector a lane: the optimizer, the snapshots and the checkpoints then handle one array each.

A tree of thirty leaves costs thirty small kernels at every place that touches all of it, in compile time and in run
time; the vector costs one. Nothing here trains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mars_jax.adapters.method import AdapterMethod, AnyArray, Leaf, Rank
from mars_jax.adapters.targets import Targets
from mars_jax.adapters.tree import pad
from mars_jax.runtime.trees import Tree, flatten, unflatten


class Fixed(NamedTuple):
    """Leaves that the optimizer doesn't train.

    Attributes:
        of_modules: module -> name -> number [] that all linears of the module share, such as LoRA's scale.
        of_linears: path of a leaf -> array; empty for most methods.
    """

    of_modules: dict[str, dict[str, Array]]
    of_linears: dict[str, Array]


@dataclass(frozen=True)
class VectorLayout:
    """Where each trained leaf lies in a vector of P numbers, module after module.

    Attributes:
        method: the adapter method.
        targets: the linears that take adapters.
        ranks: module -> columns R; a module with 0 has no place.
    """

    method: AdapterMethod
    targets: Targets
    ranks: Mapping[str, int]

    @cached_property
    def _leaves(self) -> dict[str, dict[str, Leaf]]:
        """Path of each linear that has leaves -> these, in the order of the vector."""
        return {
            path: self.method.leaves(target, self.ranks[module])
            for module in self.modules
            for path, target in self.targets.items()
            if target.module == module
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of each trained leaf -> its shape, in the order of the vector."""
        return {
            f"{path}/{name}": leaf.shape
            for path, leaves in self._leaves.items()
            for name, leaf in leaves.items()
            if leaf.trained
        }

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that have a place, in the order of the vector."""
        return tuple(module for module, rank in self.ranks.items() if rank)

    @property
    def size(self) -> int:
        """P."""
        return sum(map(math.prod, self.shapes.values()))

    @cached_property
    def places(self) -> dict[str, slice]:
        """Module -> its part of the vector."""
        sizes = dict.fromkeys(self.modules, 0)
        for path, shape in self.shapes.items():
            sizes[self.targets[path.rpartition("/")[0]].module] += math.prod(shape)
        ends = list(accumulate(sizes.values(), initial=0))
        return {module: slice(*ends[i : i + 2]) for i, module in enumerate(sizes)}

    def ravel(self, adapters: Tree) -> Array:
        """The trained leaves as one vector [P]."""
        flat = flatten(adapters)
        return jnp.concatenate([flat[path].reshape(-1) for path in self.shapes])

    def unravel(self, vector: AnyArray) -> Tree:
        """Inverse of `ravel`."""
        leaves, start = {}, 0
        for path, shape in self.shapes.items():
            stop = start + math.prod(shape)
            leaves[path] = vector[start:stop].reshape(shape)
            start = stop
        return unflatten(leaves)

    def padded_vector(self, adapters: Tree) -> np.ndarray:
        """Adapters of ranks up to those here as a vector [P] on the host, the rest zeros."""
        flat = flatten(pad(adapters, self.targets, self.ranks, self.method))
        return np.concatenate([flat[path].ravel() for path in self.shapes])

    def fixed(self, adapters: Tree, ranks: Mapping[str, Rank]) -> Fixed:
        """The untrained leaves of fresh adapters of some ranks."""
        of_modules = {module: self.method.fixed(ranks[module]) for module in self.modules}
        flat = flatten(adapters)
        return Fixed(
            of_modules,
            {
                f"{path}/{name}": flat[f"{path}/{name}"]
                for path, leaves in self._leaves.items()
                for name, leaf in leaves.items()
                if not leaf.trained and name not in of_modules[self.targets[path].module]
            },
        )

    def fixed_after(self, adapters: Tree, fixed: Fixed) -> Fixed:
        """The untrained leaves of adapters that `between_steps` has changed; numbers of modules stay as they are."""
        flat = flatten(adapters)
        return fixed._replace(of_linears={path: flat[path] for path in fixed.of_linears})

    def adapters(self, vector: AnyArray, fixed: Fixed) -> Tree:
        """The adapter tree of a vector [P] and the untrained leaves."""
        return self.with_fixed(self.unravel(vector), fixed)

    def with_fixed(self, trained: Tree, fixed: Fixed) -> Tree:
        """Adds the untrained leaves to every adapter, those of a module as arrays [L?]."""
        flat: dict[str, Any] = flatten(trained)
        for path, leaves in self._leaves.items():
            of_module = fixed.of_modules[self.targets[path].module]
            for name, leaf in leaves.items():
                if name in of_module:
                    flat[f"{path}/{name}"] = jnp.broadcast_to(of_module[name], leaf.shape)
        return unflatten(flat | fixed.of_linears)

    def by_module(self, values: Mapping[str, Array]) -> Array:
        """Spreads one number [] a module over the vector: [P]."""
        sizes = {module: place.stop - place.start for module, place in self.places.items()}
        return jnp.concatenate([jnp.broadcast_to(values[module], (size,)) for module, size in sizes.items()])
