"""One training step of a lane: loss, gradients, update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from mars_jax.adapters.vector import Layout
from mars_jax.lanes.state import LaneState
from mars_jax.models.multimodal import Batch
from mars_jax.runtime.trees import Tree


def mean_loss(model: nn.Module, base: Tree, adapters: Tree, batch: Batch) -> Array:
    """Mean cross-entropy over the supervised tokens of a batch, nats, float32 []; the base gets no gradient."""
    return _mean(*summed_loss(model, base, adapters, batch))


def _mean(total: Array, count: Array) -> Array:
    return total / jnp.maximum(count, 1.0)


def summed_loss(model: nn.Module, base: Tree, adapters: Tree, batch: Batch) -> tuple[Array, Array]:
    """Summed cross-entropy over the supervised tokens of a batch, nats, float32 [], and their number."""
    return model.apply({"params": base, "lora": adapters}, batch, method="loss")  # type: ignore[return-value]


def make_step(
    model: nn.Module, layout: Layout, transform: optax.GradientTransformation
) -> Callable[[LaneState, Tree, Batch, Array, Array], tuple[LaneState, Array]]:
    """One step of one lane: (state, base, batch [B, ...], multiplier [], newest_share []) -> (state, loss []).

    The batch may be a packed one.
    """

    def step(
        state: LaneState, base: Tree, batch: Batch, multiplier: Array, newest_share: Array
    ) -> tuple[LaneState, Array]:
        def summed(leaves: Tree, rows: Batch) -> tuple[Array, Array]:
            # Derived by leaf: the derivative of slicing a vector would be as many vectors, added up.
            return summed_loss(model, base, layout.with_scales(leaves, state.scales), rows)

        value, gradients = loss_and_gradients(summed, layout.unravel(state.trainable), batch)
        updates, optimizer = transform.update(layout.ravel(gradients), state.optimizer, state.trainable)
        rates = multiplier * layout.by_module(state.learning_rates)
        trainable = state.trainable - rates * updates
        average = (1.0 - newest_share) * state.average + newest_share * trainable
        stepped = state._replace(trainable=trainable, average=average, optimizer=optimizer)
        alive = state.alive & jnp.isfinite(value)
        kept = jax.tree.map(partial(jnp.where, alive), stepped, state)
        return kept._replace(alive=alive), value

    return step


def loss_and_gradients(
    summed: Callable[[Tree, Batch], tuple[Array, Array]], leaves: Tree, batch: Any
) -> tuple[Array, Tree]:
    """Mean loss over the supervised tokens of a batch, and its gradients.

    Of a packed batch only blocks that hold samples are computed, one after the other. How many those are is data, so
    one program serves every batch.

    Args:
        summed: (leaves, batch) -> (summed loss [], tokens []).
        leaves: what the loss is derived by.
        batch: arrays [B, ...], or a packed batch: see `data.packing.Packing.pack`.

    Returns:
        The loss, nats, float32 [], and the tree of gradients.
    """

    if "blocks" not in batch:
        return jax.value_and_grad(lambda leaves: _mean(*summed(leaves, batch)))(leaves)
    tiles = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in batch["tiles"].items()}
    derived = jax.value_and_grad(lambda leaves, rows: summed(leaves, rows)[0])
    sums, count = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, leaves)), jnp.zeros(())
    for number, rows in enumerate((batch["wide"], batch["narrow"])):

        def add(i: Array, sums: tuple[Array, Tree], rows: Any = rows) -> tuple[Array, Tree]:
            block = {name: leaf[i] for name, leaf in rows.items()}
            taken = block.pop("tile_index")
            return jax.tree.map(jnp.add, sums, derived(leaves, block | {name: x[taken] for name, x in tiles.items()}))

        sums = jax.lax.fori_loop(0, batch["blocks"][number], add, sums)
        count += rows["target_weights"].sum()
    return jax.tree.map(lambda leaf: _mean(leaf, count), sums)
