"""The compiled part of training: many lanes in one program. No host loop, no files, no schedule of its own.

A lane's ranks, seed, learning rates and schedule are data, never attributes: one compiled program serves them all.
Final runs are lanes too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mars_jax.adapters.method import AdapterMethod, AnyArray
from mars_jax.adapters.norms import relative_change, update_norms
from mars_jax.adapters.registry import METHODS
from mars_jax.adapters.targets import Targets
from mars_jax.adapters.tree import kernels_of
from mars_jax.adapters.vector import VectorLayout
from mars_jax.errors import ConfigError
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.state import EvalOutput, LaneState, Work, not_evaluated, rows_of
from mars_jax.lanes.step import StepInputs, make_step, row_losses
from mars_jax.models.multimodal import Batch
from mars_jax.runtime.sharding import share_cores
from mars_jax.runtime.trees import Tree

_LANES = PartitionSpec("lane")
_EVERYWHERE = PartitionSpec()


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained and how, whatever the lanes; equal only to itself.

    Attributes:
        model: a Linen module with a method `loss(batch) -> (summed loss of each row [B], its tokens [B])`.
        targets: the linears that take adapters.
        method: the adapter method; it must be registered, since layers look it up by its name.
        transform: gradients -> unscaled updates, without a learning rate. It acts on a lane's flat vector, so on each
            entry alone or through the norm of all (AdamW, SGD, Lion, clipping): padding is exact for those only.
        num_snapshots: n, eval points per doubling of the step.
    """

    model: nn.Module
    targets: Targets
    method: AdapterMethod
    transform: optax.GradientTransformation
    num_snapshots: int


@dataclass(frozen=True)
class EngineShape:
    """The static shapes of an engine; hashable.

    Attributes:
        padded_ranks: module -> columns R of every lane; 0 leaves the module without adapters.
        num_slots: N, lanes in memory.
        lane_block: lanes that run in one vectorised step.
        cached_encoder: whether batches hold `features`, the vision encoder's output, in place of `pixels`.
    """

    padded_ranks: Mapping[str, int] = field(hash=False)  # compared, though a dict has no hash
    num_slots: int
    lane_block: int
    cached_encoder: bool = False


@dataclass(frozen=True)
class Engine:
    """Compiled functions over N lane slots, for lanes that share padded ranks and shapes (a bucket).

    Attributes:
        init: (base, seeds [N], ranks {module: [N]}, learning_rates {module: [N]}) -> LaneState.
        chunk: (state, base, validation batches [V, B, ...], Work) -> (state, losses [N, C], EvalOutput). Donates state.
        layout: where the adapters lie in a lane's vector.
        num_slots: N, a multiple of the mesh's lane devices.
        lane_block: lanes that run in one vectorised step.
        mesh: devices; slots lie along its axis `lane`.
        cached_encoder: whether batches hold the vision encoder's output in place of pixels.
    """

    init: Callable[[Tree, AnyArray, Mapping[str, AnyArray], Mapping[str, AnyArray]], LaneState]
    chunk: Callable[[LaneState, Tree, Mapping[str, AnyArray], Work], tuple[LaneState, Array, EvalOutput]]
    layout: VectorLayout
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

    def check_padding(self, lanes: Sequence[Lane]) -> None:
        """Refuses lanes whose ranks would be padded where that changes how they train.

        Raises:
            ConfigError: the adapter method isn't exact under padding, and a lane has other ranks than the engine.
        """
        method, columns = self.layout.method, dict(self.layout.ranks)
        padded = [lane.name for lane in lanes if dict(lane.ranks) != columns]
        if padded and not method.padding_is_exact:
            raise ConfigError(
                f"adapter method {method.name!r} trains otherwise when it is padded, and {', '.join(padded)} would be "
                f"padded to the ranks {columns}. Run lanes of different ranks one after the other."
            )


@dataclass(frozen=True, eq=False)
class EngineContext:
    """What the compiled functions of an engine share: all that is static.

    Attributes:
        training: what is trained and how.
        layout: where the adapters lie in a lane's vector.
        lane_block: lanes that run in one vectorised step.
    """

    training: Training
    layout: VectorLayout
    lane_block: int


def make_engine(training: Training, shape: EngineShape, mesh: Mesh) -> Engine:
    """Builds the compiled functions of a bucket.

    Args:
        training: what is trained and how.
        shape: padded ranks, slots and blocks.
        mesh: see `mars_jax.runtime.sharding.make_mesh`.

    Raises:
        ConfigError: an adapter method that isn't registered.
    """
    METHODS.check(training.method.name)
    layout = VectorLayout(training.method, training.targets, shape.padded_ranks)
    context = EngineContext(training, layout, shape.lane_block)
    mapped = jax.shard_map(
        partial(chunk, context),
        mesh=mesh,
        in_specs=(_LANES, _EVERYWHERE, _EVERYWHERE, _WORK_SPECS),
        out_specs=_LANES,
        axis_names={"lane"},
        check_vma=False,
    )
    by_lane = NamedSharding(mesh, _LANES)
    return Engine(
        init=jax.jit(jax.vmap(partial(init, context), in_axes=(None, 0, 0, 0)), out_shardings=by_lane),
        chunk=jax.jit(mapped, donate_argnums=0, out_shardings=by_lane),
        layout=layout,
        num_slots=shape.num_slots,
        lane_block=shape.lane_block,
        mesh=mesh,
        cached_encoder=shape.cached_encoder,
    )


_WORK_SPECS = Work(
    slots=_LANES,
    num_blocks=_LANES,
    batches=_EVERYWHERE,
    multipliers=_EVERYWHERE,
    newest_share=_EVERYWHERE,
    num_steps=_EVERYWHERE,
    evaluate=_EVERYWHERE,
    step=_EVERYWHERE,
    half=_EVERYWHERE,
    eval_batches=_EVERYWHERE,
)


def init(
    context: EngineContext, base: Tree, seed: Array, ranks: dict[str, Array], learning_rates: dict[str, Array]
) -> LaneState:
    """A fresh lane, from its seed int32 [], ranks {module: int32 []} and learning rates {module: float32 []}."""
    training, layout = context.training, context.layout
    kernels = kernels_of(base, training.targets)
    adapters = layout.method.init(jax.random.key(seed), training.targets, ranks, layout.ranks, kernels)
    vector = layout.ravel(adapters)
    return LaneState(
        trainable=vector,
        average=vector,
        fixed=layout.fixed(adapters, ranks),
        optimizer=training.transform.init(vector),
        # The last snapshot is that of step 0, which is not evaluated again: see `best_loss` in `lanes.loop`.
        snapshots=jnp.zeros((training.num_snapshots, layout.size)).at[-1:].set(vector[None]),
        best=vector,
        best_loss=jnp.asarray(jnp.inf, jnp.float32),
        best_step=jnp.asarray(0, jnp.int32),
        alive=jnp.asarray(True),
        learning_rates={module: learning_rates[module] for module in layout.modules},
    )


def chunk(
    context: EngineContext, state: LaneState, base: Tree, validation: Batch, work: Work
) -> tuple[LaneState, Array, EvalOutput]:
    """Steps and evaluation of the lanes of one lane device, block after block.

    Args:
        context: of the engine.
        state: of all slots of the device, leading axis N.
        base: frozen parameters.
        validation: batches [V, B, ...].
        work: with the slots and the number of blocks of the device.

    Returns:
        The state, losses of the steps [N, C], NaN where none was taken, and what the evaluation found.
    """
    local_slots, lane_block = state.alive.shape[0], context.lane_block

    def body(j: Array, carry: tuple[LaneState, Array, EvalOutput]) -> tuple[LaneState, Array, EvalOutput]:
        places = jax.lax.dynamic_slice(work.slots, (j * lane_block,), (lane_block,))
        lanes = jax.tree.map(lambda leaf: leaf.at[places].get(mode="clip"), carry[0])
        new = block(context, lanes, base, validation, work)
        # Padding lies beyond the last slot: it is computed and dropped.
        return jax.tree.map(lambda all_, some: all_.at[places].set(some, mode="drop"), carry, new)

    losses = jnp.full((local_slots, work.multipliers.shape[0]), jnp.nan, jnp.float32)
    carry = (state, losses, not_evaluated(context.training.targets, local_slots, rows_of(validation)))
    return jax.lax.fori_loop(0, work.num_blocks[0], body, carry)


def block(
    context: EngineContext, state: LaneState, base: Tree, validation: Batch, work: Work
) -> tuple[LaneState, Array, EvalOutput]:
    """The steps of a block of lanes [lane_block, ...], vectorised, and their evaluation where it is asked for."""
    training, lane_block = context.training, context.lane_block
    step = make_step(training.model, context.layout, training.transform)
    done_before = work.step - work.num_steps

    def body(i: Array, carry: tuple[LaneState, Array]) -> tuple[LaneState, Array]:
        state, losses = carry
        batch = jax.tree.map(lambda leaf: leaf[i], work.batches)
        inputs = StepInputs(batch, work.multipliers[i], work.newest_share[i], number=done_before + i + 1)
        state, value = jax.vmap(step, in_axes=(0, None, None))(state, base, inputs)
        return state, losses.at[:, i].set(value)

    def evaluated(state: LaneState) -> tuple[LaneState, EvalOutput]:
        return jax.vmap(partial(evaluate, context), in_axes=(0, None, None, None))(state, base, validation, work)

    def skipped(state: LaneState) -> tuple[LaneState, EvalOutput]:
        return state, not_evaluated(training.targets, lane_block, rows_of(validation))

    losses = jnp.full((lane_block, work.multipliers.shape[0]), jnp.nan, jnp.float32)
    state, losses = jax.lax.fori_loop(0, work.num_steps, body, (state, losses))
    state, output = jax.lax.cond(work.evaluate, evaluated, skipped, state)
    return state, losses, output


def evaluate(
    context: EngineContext, state: LaneState, base: Tree, validation: Batch, work: Work
) -> tuple[LaneState, EvalOutput]:
    """Validation losses, norms and drift of one lane; keeps its adapters as a snapshot, and as the best if they are."""
    training, layout = context.training, context.layout
    method, targets, kernels = layout.method, training.targets, kernels_of(base, training.targets)
    adapters = layout.adapters(state.average, state.fixed)

    def read(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda leaf: leaf[i], validation)
        losses, counts = row_losses(training.model, base, adapters, batch, method)
        return sums[0].at[i].set(losses), sums[1].at[i].set(counts)

    nothing = jnp.zeros(rows_of(validation), jnp.float32)
    row_sums, row_tokens = jax.lax.fori_loop(0, work.eval_batches, read, (nothing, nothing))
    loss = row_sums.sum() / row_tokens.sum()
    earlier = layout.adapters(state.snapshots[0], state.fixed)
    drift = relative_change(adapters, earlier, targets, method, kernels)
    alive = state.alive & jnp.isfinite(loss)
    better = alive & (loss < state.best_loss)
    state = state._replace(
        snapshots=jnp.concatenate([state.snapshots[1:], state.average[None]]),
        best=jnp.where(better, state.average, state.best),
        best_loss=jnp.where(better, loss, state.best_loss),
        best_step=jnp.where(better, work.step, state.best_step),
        alive=alive,
    )
    output = EvalOutput(
        validation_loss=loss,
        row_losses=row_sums,
        row_tokens=row_tokens,
        update_norm=update_norms(adapters, targets, method, kernels),
        drift={module: jnp.where(work.half, value, jnp.nan) for module, value in drift.items()},
        alive=alive,
    )
    return state, output
