"""An adapter method from outside the package that is as unlike LoRA as the interface allows."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from mars_jax.adapters.method import AdapterMethod, Context, Leaf, Leaves, Rank, dense
from mars_jax.adapters.targets import Target, Targets
from mars_jax.runtime.trees import Tree, flatten, unflatten

LARGEST = 0.05
"""Of a gain: what is beyond it is cut off between steps."""


class Gain(AdapterMethod):
    """`y = x (W (1 + gain)) + bias`, gain [out]; where the modality is known, for pictures only.

    Its update depends on the kernel, it counts steps in an untrained leaf of every linear, it cuts gains off between
    steps, and it has nothing that would keep a module of rank 0 where it is.
    """

    name = "gain"
    has_ranks = False
    padding_is_exact = False

    def leaves(self, target: Target, columns: int) -> dict[str, Leaf]:
        if not columns:
            return {}
        layers = () if target.num_layers is None else (target.num_layers,)
        return {"gain": Leaf((*layers, target.d_out)), "steps": Leaf(layers, trained=False)}

    def init(
        self,
        key: Array,
        targets: Targets,
        ranks: Mapping[str, Rank],
        columns: Mapping[str, int],
        kernels: Mapping[str, Array],
    ) -> Tree:
        return unflatten(
            {
                f"{path}/{name}": jnp.zeros(leaf.shape)
                for path, target in targets.items()
                for name, leaf in self.leaves(target, columns[target.module]).items()
            }
        )

    def apply(self, x: Array, kernel: Array, bias: Array | None, leaves: Leaves, context: Context) -> Array:
        change = dense(x, leaves["gain"][None, :] * kernel.astype(jnp.float32), None)
        if context.modality is not None:
            change = change * context.modality[..., None].astype(x.dtype)
        return dense(x, kernel, bias) + change

    def delta(self, kernel, leaves):
        return leaves["gain"][..., None, :] * kernel

    def between_steps(self, adapters: Tree, gradients: Tree, step: Array) -> Tree:
        flat = flatten(adapters)
        for path in flatten(gradients):
            assert path.endswith("/gain")
            flat[path] = jnp.clip(flat[path], -LARGEST, LARGEST)
            counter = path.replace("/gain", "/steps")
            # The very number of the step, so that a count which misses one would show.
            flat[counter] = jnp.where(flat[counter] == step.astype(jnp.float32) - 1.0, flat[counter] + 1.0, jnp.nan)
        return unflatten(flat)

    def flops(self, target: Target, rank: int, rows: float, *, trains: bool, moves: bool) -> float:
        return 2.0 * rows * target.d_in * target.d_out * rank * (1 + trains + (trains and moves))


GAIN = Gain()
