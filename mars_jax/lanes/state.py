"""State of a lane and the inputs and outputs of a compiled chunk."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mars_jax.adapters.targets import Targets
from mars_jax.adapters.vector import Fixed
from mars_jax.models.multimodal import Batch


class LaneState(NamedTuple):
    """What a lane carries from step to step; every leaf gains a leading axis of N slots when lanes run together."""

    trainable: Array  # float32 [P]: the trained leaves of every adapter, padded to the bucket's ranks
    average: Array  # float32 [P]: of `trainable` over the steps, see `Work.newest_share`; what evaluations read
    fixed: Fixed  # the leaves that the optimizer doesn't train
    optimizer: optax.OptState
    snapshots: Array  # float32 [n, P]: `average` at the last n eval points, oldest first
    best: Array  # float32 [P]: `average` at the eval point with the lowest validation loss
    best_loss: Array  # float32 []
    best_step: Array  # int32 []
    alive: Array  # bool []; False once the loss was not finite: the lane is frozen from then on
    learning_rates: dict[str, Array]  # module -> float32 []


class EvalOutput(NamedTuple):
    """What one evaluation of a lane finds; every leaf gains a leading axis of N slots, NaN for slots not evaluated.

    Losses of rows are None on the host where nothing keeps them.
    """

    validation_loss: Array  # float32 [], nats per supervised token
    row_losses: (
        Array | None
    )  # float32 [V, B]: summed over the supervised tokens of a row, nats; 0 beyond `eval_batches`
    row_tokens: Array | None  # float32 [V, B]: supervised tokens of a row; 0 where it holds no sample
    update_norm: dict[str, Array]  # Frobenius norm of the update by module
    drift: dict[str, Array]  # relative change of the update since the eval point n places before
    alive: Array  # bool []


class Work(NamedTuple):
    """What a call of the chunk is to do; arrays of numpy or JAX. L is the number of the mesh's lane devices.

    Slots that aren't listed neither change nor cost anything. `batches` may hold more than `num_steps` batches.
    """

    slots: Any  # int32 [L * M]: for each device the slots to run, counted within the device; the rest is padding
    num_blocks: Any  # int32 [L]: blocks of `lane_block` slots to run on each device
    batches: Any  # Batch of arrays [C, B, ...], or packed ones (see `loss_and_gradients`), read by every lane
    multipliers: Any  # float32 [C], factor on the learning rates
    newest_share: Any  # float32 [C], share of a step's adapters in the average after it; 1 for no average
    num_steps: Any  # int32 []
    evaluate: Any  # bool []: whether to evaluate the lanes after these steps
    step: Any  # int32 []: the step after these
    half: Any  # bool []: whether the oldest snapshot is the one of `step` / 2
    eval_batches: Any  # int32 []: validation batches that an evaluation reads, from the first


def rows_of(validation: Batch) -> tuple[int, int]:
    """V and B of validation batches [V, B, ...]."""
    batches, rows = jax.tree.leaves(validation)[0].shape[:2]
    return batches, rows


def not_evaluated(targets: Targets, slots: int, rows: tuple[int, int]) -> EvalOutput:
    """The output of slots that were not evaluated; validation batches have `rows`, [V, B]."""
    nothing = jnp.full(slots, jnp.nan, jnp.float32)
    modules = dict.fromkeys((target.module for target in targets.values()), nothing)
    by_row = jnp.full((slots, *rows), jnp.nan, jnp.float32)
    return EvalOutput(nothing, by_row, by_row, modules, modules, jnp.zeros(slots, bool))
