"""Adapters as one flat vector a lane: the optimizer, the snapshots and the checkpoints then handle one array each.

A tree of thirty leaves costs thirty small kernels at every place that touches all of it, in compile time and in run
time; the vector costs one. Nothing here trains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import jax.numpy as jnp
from jax import Array

from mars_jax.adapters.targets import Targets
from mars_jax.runtime.trees import Tree, flatten, unflatten


@dataclass(frozen=True)
class Layout:
    """Where each `a` and `b` lies in a vector of P numbers, module after module.

    Attributes:
        targets: the linears that take adapters.
        ranks: module -> columns R; a module with 0 has no place.
    """

    targets: Targets
    ranks: Mapping[str, int]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of each leaf -> its shape, in the order of the vector."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.modules:
            rank = self.ranks[module]
            for path, target in self.targets.items():
                if target.module == module:
                    layers = () if target.num_layers is None else (target.num_layers,)
                    shapes[f"{path}/a"] = (*layers, target.d_in, rank)
                    shapes[f"{path}/b"] = (*layers, rank, target.d_out)
        return shapes

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

    def ravel(self, trainable: Tree) -> Array:
        """Leaves `a` and `b` as one vector [P]."""
        flat = flatten(trainable)
        return jnp.concatenate([flat[path].reshape(-1) for path in self.shapes])

    def unravel(self, vector: Array) -> Tree:
        """Inverse of `ravel`; takes numpy arrays too."""
        leaves, start = {}, 0
        for path, shape in self.shapes.items():
            stop = start + math.prod(shape)
            leaves[path] = vector[start:stop].reshape(shape)
            start = stop
        return unflatten(leaves)

    def adapters(self, vector: Array, scales: Mapping[str, Array]) -> Tree:
        """The adapter tree of a vector [P] and the scale [] of each module."""
        return self.with_scales(self.unravel(vector), scales)

    def with_scales(self, trainable: Tree, scales: Mapping[str, Array]) -> Tree:
        """Adds the leaf `scale` [L?] to every adapter, from the scale [] of each module."""
        flat = flatten(trainable)
        for path, target in self.targets.items():
            if f"{path}/a" in flat:
                layers = () if target.num_layers is None else (target.num_layers,)
                flat[f"{path}/scale"] = jnp.broadcast_to(scales[target.module], layers)
        return unflatten(flat)

    def by_module(self, values: Mapping[str, Array]) -> Array:
        """Spreads one number [] a module over the vector: [P]."""
        sizes = {module: place.stop - place.start for module, place in self.places.items()}
        return jnp.concatenate([jnp.broadcast_to(values[module], (size,)) for module, size in sizes.items()])
