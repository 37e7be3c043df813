"""The full-rank update: `y = x (W + D) + bias`, with every entry of D trained. What low ranks are compared with.

It has no ranks: a module of rank 1 trains, one of rank 0 is frozen.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from mars_jax.adapters.method import AdapterMethod, AnyArray, AnyLeaves, Context, Leaf, Leaves, Rank, dense
from mars_jax.adapters.targets import Target, Targets
from mars_jax.runtime.trees import Tree, unflatten


class FullRank(AdapterMethod):
    """An update of the size of the weight.

    Leaves: update [L?, in, out], trained; gate [L?], 1, or 0 where the module is frozen, so that a lane which freezes a
    module can run beside one which trains it.
    """

    name = "full_rank"
    has_ranks = False
    padding_is_exact = True

    def leaves(self, target: Target, columns: int) -> dict[str, Leaf]:
        """One array of the weight's shape, whatever the columns, and the gate."""
        if not columns:
            return {}
        layers = () if target.num_layers is None else (target.num_layers,)
        return {"update": Leaf((*layers, target.d_in, target.d_out)), "gate": Leaf(layers, trained=False)}

    def init(
        self,
        key: Array,
        targets: Targets,
        ranks: Mapping[str, Rank],
        columns: Mapping[str, int],
        kernels: Mapping[str, Array],
    ) -> Tree:
        """Zeros; there is nothing to draw."""
        flat: dict[str, Array] = {}
        for path, target in targets.items():
            for name, leaf in self.leaves(target, columns[target.module]).items():
                value = self.fixed(ranks[target.module]).get(name, jnp.float32(0.0))
                flat[f"{path}/{name}"] = jnp.broadcast_to(value, leaf.shape)
        return unflatten(flat)

    def fixed(self, rank: Rank) -> dict[str, Array]:
        """The gate []."""
        return {"gate": (jnp.asarray(rank) > 0).astype(jnp.float32)}

    def apply(self, x: Array, kernel: Array, bias: Array | None, leaves: Leaves, context: Context) -> Array:
        """One product with the updated weight, rounded to the dtype of x as that of a merged checkpoint is."""
        return dense(x, kernel.astype(jnp.float32) + leaves["gate"] * leaves["update"], bias)

    def delta(self, kernel: AnyArray | None, leaves: AnyLeaves) -> AnyArray:
        """The update, or zeros behind a closed gate."""
        return leaves["gate"][..., None, None] * leaves["update"]

    def flops(self, target: Target, rank: int, rows: float, *, trains: bool, moves: bool) -> float:
        """The gradient of the update; the products with x and with y's gradient are the frozen linear's own."""
        return 2.0 * rows * target.d_in * target.d_out * (trains and rank > 0)


FULL_RANK = FullRank()
