"""The compiled part of training: many lanes in one program. No host loop, no files, no schedule of its own.

A lane's ranks, seed, learning rates and schedule are data, never attributes: one compiled program serves them all.
The final fine-tune and the local sweep are lanes too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from mars_jax import lora
from mars_jax.models.llava_onevision import Batch

Tree = Any


class LaneState(NamedTuple):
    """What a lane carries from step to step; every leaf gains a leading K when lanes run together."""

    trainable: Tree  # a and b of every adapter, padded to the shared ranks
    scales: Tree
    optimizer: optax.OptState
    snapshots: Tree  # `trainable` at the last n looks, leading axis n, oldest first
    best: Tree  # `trainable` at the look with the lowest validation loss
    best_loss: Array  # float32 []
    best_step: Array  # int32 []
    alive: Array  # bool []; False once the loss was not finite: the lane is frozen from then on
    learning_rates: Tree  # module -> float32 []


class Look(NamedTuple):
    """What one look at a lane shows."""

    validation_loss: Array  # float32 [], nats per supervised token
    update_norm: dict[str, Array]  # ||scale A B||_F by module
    drift: dict[str, Array]  # relative change of scale A B since the look n places before
    alive: Array


@dataclass(frozen=True)
class Engine:
    """Compiled functions over K lanes.

    Attributes:
        init: (seeds [K], ranks {module: [K]}, learning_rates {module: [K]}) -> LaneState.
        train: (state, base, batches [C, S, B, ...], stream [K], multipliers [C], num_steps []) ->
            (state, losses [K, C]); runs `num_steps` of C steps, lane k reading data stream `stream[k]`. Donates state.
        look: (state, base, batches [V, B, ...], step [], half []) -> (state, Look); `half` tells whether the oldest
            snapshot is the one of step / 2. Donates state.
    """

    init: Callable[..., LaneState]
    train: Callable[..., tuple[LaneState, Array]]
    look: Callable[..., tuple[LaneState, Look]]


def token_losses(logits: Array, batch: Batch) -> tuple[Array, Array]:
    """Summed cross-entropy [] in nats (float32), and the number of supervised tokens []."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["target_weights"]).sum(), batch["target_weights"].sum()


def mean_loss(model: nn.Module, base: Tree, adapters: Tree, batch: Batch) -> Array:
    """Mean cross-entropy over the supervised tokens of a batch, nats, float32 []."""
    total, count = token_losses(model.apply({"params": base, "lora": adapters}, batch), batch)  # type: ignore[arg-type]
    return total / jnp.maximum(count, 1.0)


def make_engine(
    model: nn.Module,
    targets: lora.Targets,
    *,
    padded_ranks: Mapping[str, int],
    alpha: lora.AlphaRule,
    transform: optax.GradientTransformation,
    num_snapshots: int,
) -> Engine:
    """Builds the compiled functions of lanes that share padded ranks and shapes (a bucket).

    Args:
        model: a Linen module whose `apply` returns logits at the supervised positions.
        targets: the linears that take adapters.
        padded_ranks: module -> columns R of every lane.
        alpha: the alpha rule.
        transform: gradients -> unscaled updates, without a learning rate. It must act on each entry alone or through
            norms (AdamW, SGD, Lion): padding is exact for those only.
        num_snapshots: n, looks per doubling of the step.
    """

    def init(seed: Array, ranks: dict[str, Array], learning_rates: dict[str, Array]) -> LaneState:
        adapters = lora.init_adapters(jax.random.key(seed), targets, ranks, alpha, padded_ranks)
        trainable, scales = lora.split_trainable(adapters)
        return LaneState(
            trainable=trainable,
            scales=scales,
            optimizer=transform.init(trainable),
            snapshots=jax.tree.map(lambda leaf: jnp.zeros((num_snapshots, *leaf.shape), leaf.dtype), trainable),
            best=trainable,
            best_loss=jnp.asarray(jnp.inf, jnp.float32),
            best_step=jnp.asarray(0, jnp.int32),
            alive=jnp.asarray(True),
            learning_rates=learning_rates,
        )

    def step(state: LaneState, base: Tree, batch: Batch, multiplier: Array) -> tuple[LaneState, Array]:
        def loss(trainable: Tree) -> Array:
            return mean_loss(model, base, lora.join_trainable(trainable, state.scales), batch)

        value, gradients = jax.value_and_grad(loss)(state.trainable)
        updates, optimizer = transform.update(gradients, state.optimizer, state.trainable)
        rates = rate_tree(state.trainable, targets, state.learning_rates)
        trainable = jax.tree.map(lambda p, u, rate: p - multiplier * rate * u, state.trainable, updates, rates)
        alive = state.alive & jnp.isfinite(value)
        stepped = state._replace(trainable=trainable, optimizer=optimizer)
        kept = jax.tree.map(partial(jnp.where, alive), stepped, state)
        return kept._replace(alive=alive), value

    def train(
        state: LaneState, base: Tree, batches: Batch, stream: Array, multipliers: Array, num_steps: Array
    ) -> tuple[LaneState, Array]:
        lanes = jax.vmap(step, in_axes=(0, None, 0, None))

        def body(i: Array, carry: tuple[LaneState, Array]) -> tuple[LaneState, Array]:
            state, losses = carry
            batch = jax.tree.map(lambda leaf: leaf[i][stream], batches)
            state, value = lanes(state, base, batch, multipliers[i])
            return state, losses.at[:, i].set(value)

        losses = jnp.full((stream.shape[0], multipliers.shape[0]), jnp.nan, jnp.float32)
        return jax.lax.fori_loop(0, num_steps, body, (state, losses))

    def look(state: LaneState, base: Tree, batches: Batch, step: Array, half: Array) -> tuple[LaneState, Look]:
        adapters = lora.join_trainable(state.trainable, state.scales)

        def one(batch: Batch) -> tuple[Array, Array]:
            return token_losses(model.apply({"params": base, "lora": adapters}, batch), batch)  # type: ignore[arg-type]

        totals, counts = jax.lax.map(one, batches)
        loss = totals.sum() / counts.sum()
        oldest = lora.join_trainable(jax.tree.map(lambda leaf: leaf[0], state.snapshots), state.scales)
        drift = lora.relative_change(adapters, oldest, targets)
        alive = state.alive & jnp.isfinite(loss)
        better = alive & (loss < state.best_loss)
        state = state._replace(
            snapshots=jax.tree.map(
                lambda ring, leaf: jnp.concatenate([ring[1:], leaf[None]]), state.snapshots, state.trainable
            ),
            best=jax.tree.map(partial(jnp.where, better), state.trainable, state.best),
            best_loss=jnp.where(better, loss, state.best_loss),
            best_step=jnp.where(better, step, state.best_step),
            alive=alive,
        )
        seen = Look(
            validation_loss=loss,
            update_norm=lora.update_norms(adapters, targets),
            drift={module: jnp.where(half, value, jnp.nan) for module, value in drift.items()},
            alive=alive,
        )
        return state, seen

    return Engine(
        init=jax.jit(jax.vmap(init)),
        train=jax.jit(train, donate_argnums=0),
        look=jax.jit(jax.vmap(look, in_axes=(0, None, None, None, None)), donate_argnums=0),
    )


def rate_tree(trainable: Tree, targets: lora.Targets, learning_rates: Mapping[str, Array]) -> Tree:
    """Gives every leaf the learning rate of its module."""
    return lora.unflatten(
        {path: learning_rates[targets[path.rpartition("/")[0]].module] for path in lora.flatten(trainable)}
    )
