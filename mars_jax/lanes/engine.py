"""The compiled part of training: many lanes in one program. No host loop, no files, no schedule of its own.

A lane's ranks, seed, learning rates and schedule are data, never attributes: one compiled program serves them all.
The final fine-tune and the local sweep are lanes too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mars_jax.adapters import lora
from mars_jax.adapters.norms import relative_change, update_norms
from mars_jax.adapters.targets import Targets
from mars_jax.adapters.vector import Layout
from mars_jax.lanes.state import LaneState, Look, Work, not_evaluated
from mars_jax.lanes.step import make_step, summed_loss
from mars_jax.models.multimodal import Batch
from mars_jax.runtime.sharding import share_cores
from mars_jax.runtime.trees import Tree

_LANES = PartitionSpec("lane")
_EVERYWHERE = PartitionSpec()


@dataclass(frozen=True)
class Engine:
    """Compiled functions over N lane slots, for lanes that share padded ranks and shapes (a bucket).

    Attributes:
        init: (seeds [N], ranks {module: [N]}, learning_rates {module: [N]}) -> LaneState.
        chunk: (state, base, validation batches [V, B, ...], Work) -> (state, losses [N, C], Look). Donates state.
        layout: where the adapters lie in a lane's vector.
        num_slots: N, a multiple of the mesh's lane devices.
        lane_block: lanes that run in one vectorised step.
        mesh: devices; slots lie along its axis `lane`.
        cached_encoder: whether batches hold the vision encoder's output in place of pixels.
    """

    init: Callable[..., LaneState]
    chunk: Any
    layout: Layout
    num_slots: int
    lane_block: int
    mesh: Mesh
    cached_encoder: bool = False

    @property
    def lane_devices(self) -> int:
        """L, devices along the mesh's lane axis."""
        return self.mesh.shape["lane"]

    def blocks(self, counts: Sequence[int]) -> list[int]:
        """Blocks that each lane device runs in a call, from the lanes that it is to run.

        The same number on every device, since those that share a base wait for one another at every product, and the
        others would wait at the end; but cores do what is left to do.
        """
        blocks = [-(-count // self.lane_block) for count in counts]
        return blocks if share_cores(self.mesh) else [max(blocks)] * len(blocks)

    def places(self, lanes: int) -> int:
        """Lanes that a call computes when it is to run some number of them, dealt out over the devices."""
        counts = [len(range(device, lanes, self.lane_devices)) for device in range(self.lane_devices)]
        return sum(self.blocks(counts)) * self.lane_block


def make_engine(
    model: nn.Module,
    targets: Targets,
    *,
    padded_ranks: Mapping[str, int],
    alpha: lora.AlphaRule,
    transform: optax.GradientTransformation,
    num_snapshots: int,
    num_slots: int,
    lane_block: int,
    mesh: Mesh,
    cached_encoder: bool = False,
) -> Engine:
    """Builds the compiled functions of a bucket.

    Args:
        model: a Linen module with a method `loss(batch) -> (summed loss, tokens)`.
        targets: the linears that take adapters.
        padded_ranks: module -> columns R of every lane; 0 leaves the module without adapters.
        alpha: the alpha rule.
        transform: gradients -> unscaled updates, without a learning rate. It acts on a lane's flat vector, so on each
            entry alone or through the norm of all (AdamW, SGD, Lion, clipping): padding is exact for those only.
        num_snapshots: n, looks per doubling of the step.
        num_slots: N.
        lane_block: lanes that run in one vectorised step.
        mesh: see `mars_jax.sharding.make_mesh`.
        cached_encoder: whether batches hold `features` in place of `pixels`.
    """
    layout = Layout(targets, padded_ranks)
    step = make_step(model, layout, transform)

    def init(seed: Array, ranks: dict[str, Array], learning_rates: dict[str, Array]) -> LaneState:
        adapters = lora.init_adapters(jax.random.key(seed), targets, ranks, alpha, padded_ranks)
        vector = layout.ravel(lora.split_trainable(adapters)[0])
        return LaneState(
            trainable=vector,
            average=vector,
            scales={module: alpha.scale(ranks[module]) for module in layout.modules},
            optimizer=transform.init(vector),
            # The last snapshot is that of step 0, which is not looked at again: see `best_loss` in `lanes.loop`.
            snapshots=jnp.zeros((num_snapshots, layout.size)).at[-1:].set(vector[None]),
            best=vector,
            best_loss=jnp.asarray(jnp.inf, jnp.float32),
            best_step=jnp.asarray(0, jnp.int32),
            alive=jnp.asarray(True),
            learning_rates={module: learning_rates[module] for module in layout.modules},
        )

    def look(state: LaneState, base: Tree, validation: Batch, work: Work) -> tuple[LaneState, Look]:
        adapters = layout.adapters(state.average, state.scales)

        def read(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            batch = jax.tree.map(lambda leaf: leaf[i], validation)
            total, count = summed_loss(model, base, adapters, batch)
            return sums[0] + total, sums[1] + count

        zero = jnp.zeros((), jnp.float32)
        total, count = jax.lax.fori_loop(0, work.look_batches, read, (zero, zero))
        loss = total / count
        drift = relative_change(adapters, layout.adapters(state.snapshots[0], state.scales), targets)
        alive = state.alive & jnp.isfinite(loss)
        better = alive & (loss < state.best_loss)
        state = state._replace(
            snapshots=jnp.concatenate([state.snapshots[1:], state.average[None]]),
            best=jnp.where(better, state.average, state.best),
            best_loss=jnp.where(better, loss, state.best_loss),
            best_step=jnp.where(better, work.step, state.best_step),
            alive=alive,
        )
        seen = Look(
            validation_loss=loss,
            update_norm=update_norms(adapters, targets),
            drift={module: jnp.where(work.half, value, jnp.nan) for module, value in drift.items()},
            alive=alive,
        )
        return state, seen

    def block(state: LaneState, base: Tree, validation: Batch, work: Work) -> tuple[LaneState, Array, Look]:
        def body(i: Array, carry: tuple[LaneState, Array]) -> tuple[LaneState, Array]:
            state, losses = carry
            batch = jax.tree.map(lambda leaf: leaf[i], work.batches)
            factors = work.multipliers[i], work.newest_share[i]
            state, value = jax.vmap(step, in_axes=(0, *[None] * 4))(state, base, batch, *factors)
            return state, losses.at[:, i].set(value)

        losses = jnp.full((lane_block, work.multipliers.shape[0]), jnp.nan, jnp.float32)
        state, losses = jax.lax.fori_loop(0, work.num_steps, body, (state, losses))
        looks = jax.vmap(partial(look, base=base, validation=validation, work=work))
        state, seen = jax.lax.cond(work.look, looks, lambda state: (state, not_evaluated(targets, lane_block)), state)
        return state, losses, seen

    def chunk(state: LaneState, base: Tree, validation: Batch, work: Work) -> tuple[LaneState, Array, Look]:
        """Runs on one lane device, with its own slots, list of slots and number of blocks."""
        local_slots = state.alive.shape[0]

        def body(j: Array, carry: tuple[LaneState, Array, Look]) -> tuple[LaneState, Array, Look]:
            places = jax.lax.dynamic_slice(work.slots, (j * lane_block,), (lane_block,))
            lanes = jax.tree.map(lambda leaf: leaf.at[places].get(mode="clip"), carry[0])
            new = block(lanes, base, validation, work)
            # Padding lies beyond the last slot: it is computed and dropped.
            return jax.tree.map(lambda all_, some: all_.at[places].set(some, mode="drop"), carry, new)

        losses = jnp.full((local_slots, work.multipliers.shape[0]), jnp.nan, jnp.float32)
        carry = (state, losses, not_evaluated(targets, local_slots))
        return jax.lax.fori_loop(0, work.num_blocks[0], body, carry)

    works = Work(_LANES, _LANES, *[_EVERYWHERE] * 8)
    mapped = jax.shard_map(
        chunk,
        mesh=mesh,
        in_specs=(_LANES, _EVERYWHERE, _EVERYWHERE, works),
        out_specs=_LANES,
        axis_names={"lane"},
        check_vma=False,
    )
    by_lane = NamedSharding(mesh, _LANES)
    return Engine(
        init=jax.jit(jax.vmap(init), out_shardings=by_lane),
        chunk=jax.jit(mapped, donate_argnums=0, out_shardings=by_lane),
        layout=layout,
        num_slots=num_slots,
        lane_block=lane_block,
        mesh=mesh,
        cached_encoder=cached_encoder,
    )
