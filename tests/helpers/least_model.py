"""The least model that an engine takes, two linears that read a batch of their own: compiled in a second or two."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod
from mars_jax.adapters.targets import find_targets
from mars_jax.lanes.engine import Engine, EngineShape, Training, make_engine
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.schedule import Schedule
from mars_jax.models.layers import Dense
from tests.helpers.tiny_lanes import ONE_DEVICE, mesh, run_with

CLASSES = 6


class TwoLinears(nn.Module):
    """Module `vision` adapts the body, `llm` the head."""

    @nn.compact
    def __call__(self, batch: dict[str, Array]) -> Array:
        return Dense(CLASSES, name="head")(jnp.tanh(Dense(8, name="body")(batch["x"])))

    def loss(self, batch: dict[str, Array]) -> tuple[Array, Array]:
        losses = optax.softmax_cross_entropy_with_integer_labels(self(batch), batch["targets"])
        return losses.sum(axis=1), jnp.full(len(losses), losses.shape[1], jnp.float32)


class Numbers:
    """Batches of `TwoLinears`: which of four numbers is the largest."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        x = np.random.default_rng((self.seed, step)).normal(size=(2, 3, 4)).astype(np.float32)
        return {"x": x, "targets": x.argmax(-1).astype(np.int32)}


@cache
def base() -> Any:
    """Random frozen parameters."""
    return TwoLinears().init(jax.random.key(0), Numbers(0)[0])["params"]


@cache
def engine() -> Engine:
    """Compiled once for all tests: four slots in blocks of two on one device, ranks up to 4."""
    return engine_of(LORA, 4)


def engine_of(method: AdapterMethod, rank: int) -> Engine:
    """The same for any method."""
    targets = find_targets(base(), {"vision": ["body"], "llm": ["head"]})
    training = Training(TwoLinears(), targets, method, optax.clip_by_global_norm(1.0), num_snapshots=2)
    return make_engine(training, EngineShape({"vision": rank, "llm": rank}, 4, lane_block=2), mesh(ONE_DEVICE))


def run(
    lanes: Sequence[Lane], rates: dict[str, float], timing: Schedule, other: Engine | None = None, **changes: Any
) -> GroupResult:
    """Runs lanes, in another engine if one is given; `changes` as in `tiny_lanes.run`."""
    validation = jax.tree.map(lambda leaf: leaf[None], Numbers(99)[0])
    inputs = LaneInputs(base(), Numbers(0), validation, rates)
    return run_with(lanes, other or engine(), inputs, timing, changes)
