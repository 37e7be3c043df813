"""One training step of a lane: loss, gradients, update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod
from mars_jax.adapters.vector import VectorLayout
from mars_jax.lanes.state import LaneState
from mars_jax.models.multimodal import Batch
from mars_jax.runtime.trees import Tree


def mean_loss(model: nn.Module, base: Tree, adapters: Tree, batch: Batch, method: AdapterMethod = LORA) -> Array:
    """Mean cross-entropy over the supervised tokens of a batch, nats, float32 []; the base gets no gradient."""
    return _mean(*summed_loss(model, base, adapters, batch, method))


def _mean(total: Array, count: Array) -> Array:
    return total / jnp.maximum(count, 1.0)


def summed_loss(
    model: nn.Module, base: Tree, adapters: Tree, batch: Batch, method: AdapterMethod = LORA
) -> tuple[Array, Array]:
    """Summed cross-entropy over the supervised tokens of a batch, nats, float32 [], and their number."""
    losses, counts = row_losses(model, base, adapters, batch, method)
    return losses.sum(), counts.sum()


def row_losses(
    model: nn.Module, base: Tree, adapters: Tree, batch: Batch, method: AdapterMethod = LORA
) -> tuple[Array, Array]:
    """Summed cross-entropy over the supervised tokens of each row, nats, float32 [B], and their numbers [B]."""
    return model.apply({"params": base, method.name: adapters}, batch, method="loss")  # type: ignore[return-value]


class StepInputs(NamedTuple):
    """What the lanes of a group share in a step."""

    batch: Batch  # [B, ...], or a packed one
    multiplier: Array  # float32 [], factor on the learning rates
    newest_share: Array  # float32 []: see `Work.newest_share`
    number: Array  # int32 [], of the step; the first is 1


def make_step(
    model: nn.Module, layout: VectorLayout, transform: optax.GradientTransformation
) -> Callable[[LaneState, Tree, StepInputs], tuple[LaneState, Array]]:
    """One step of one lane: (state, base, inputs) -> (state, loss [])."""
    method = layout.method

    def step(state: LaneState, base: Tree, inputs: StepInputs) -> tuple[LaneState, Array]:
        def summed(leaves: Tree, rows: Batch) -> tuple[Array, Array]:
            # Derived by leaf: the derivative of slicing a vector would be as many vectors, added up.
            return summed_loss(model, base, layout.with_fixed(leaves, state.fixed), rows, method)

        value, gradients = loss_and_gradients(summed, layout.unravel(state.trainable), inputs.batch)
        updates, optimizer = transform.update(layout.ravel(gradients), state.optimizer, state.trainable)
        rates = inputs.multiplier * layout.by_module(state.learning_rates)
        trainable, fixed = state.trainable - rates * updates, state.fixed
        adapters = layout.adapters(trainable, fixed)
        changed = method.between_steps(adapters, gradients, inputs.number)
        if changed is not adapters:
            trainable, fixed = layout.ravel(changed), layout.fixed_after(changed, fixed)
        average = (1.0 - inputs.newest_share) * state.average + inputs.newest_share * trainable
        stepped = state._replace(trainable=trainable, average=average, fixed=fixed, optimizer=optimizer)
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
