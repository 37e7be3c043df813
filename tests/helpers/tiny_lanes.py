"""A tiny LLaVA-OneVision with random weights, its targets, and batches that it can learn: what the probe tests run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod
from mars_jax.adapters.targets import find_targets
from mars_jax.lanes.engine import Engine, EngineShape, Training, make_engine
from mars_jax.lanes.inputs import Hooks, LaneInputs
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.schedule import Schedule, warmup_multipliers
from mars_jax.models.configs import TextConfig, VisionConfig
from mars_jax.models.families.llava.config import LlavaOnevisionConfig
from mars_jax.models.families.llava.model import LlavaOnevision
from mars_jax.runtime.sharding import make_mesh
from mars_jax.runtime.trees import flatten, unflatten

CONFIG = LlavaOnevisionConfig(
    vision=VisionConfig(16, 24, num_layers=1, num_heads=2, image_size=28, patch_size=14),
    text=TextConfig(24, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8),
    image_token_id=1,
    vision_feature_layers=(1,),
    image_grid_pinpoints=((28, 28),),
)
MODEL = LlavaOnevision(CONFIG)
PATTERNS = {
    "vision": [r"vision/layers/self_attn/q_proj", r"vision/layers/mlp/fc1"],
    "projector": [r"projector/linear_1"],
    "llm": [r"llm/layers/self_attn/v_proj", r"llm/layers/mlp/up_proj"],
}
PADDED = {"vision": 4, "projector": 2, "llm": 4}
RATES = {"vision": 3e-3, "projector": 3e-3, "llm": 3e-3}
LANES = [
    Lane({"vision": 4, "projector": 2, "llm": 4}, 8, 1),
    Lane({"vision": 2, "projector": 1, "llm": 4}, 8, 1),
    Lane({"vision": 2, "projector": 0, "llm": 1}, 8, 1),
    Lane({"vision": 0, "projector": 0, "llm": 3}, 8, 1),
]
LOOKS_PER_DOUBLING = 2
ONE_DEVICE = {"lane": 1}
# What the program says is under test, not LLVM: half of the compile time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def examples(count: int, seed: int) -> dict[str, np.ndarray]:
    """Pictures [count, ...] of one of four grey levels, a prompt, and the level as two supervised tokens."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 4, count).astype(np.int32)
    patches, length = CONFIG.vision.num_patches, CONFIG.vision.num_patches + 4
    image_index = np.full((count, length, 1), -1, np.int32)
    image_index[:, 1 : 1 + patches, 0] = np.arange(patches)
    tokens = np.ones((count, length), np.int32)
    tokens[:, [0, -3, -1]] = 2
    tokens[:, -2] = 4 + level
    noise = rng.normal(0.0, 0.3, (count, 1, 3, 28, 28))
    return {
        "tokens": tokens,
        "pixels": (level.reshape(-1, 1, 1, 1, 1) - 1.5 + noise).astype(np.float32),
        "image_index": image_index,
        "image_weight": (image_index >= 0).astype(np.float32),
        "targets": np.stack([4 + level, 8 + level], axis=1),
        "target_positions": np.tile(np.int32([length - 3, length - 1]), (count, 1)),
        "target_weights": np.ones((count, 2), np.float32),
    }


class Stream:
    """Batches [2, ...] of a lane's samples, a pure function of the step."""

    def __init__(self, lane: Lane) -> None:
        self._pool = examples(lane.num_samples, seed=1)
        self._seed = lane.seed

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        chosen = np.random.default_rng((self._seed, step)).integers(0, len(self._pool["tokens"]), 2)
        return {name: leaf[chosen] for name, leaf in self._pool.items()}


VALIDATION = {name: leaf.reshape(2, 4, *leaf.shape[1:]) for name, leaf in examples(8, seed=2).items()}


@cache
def base() -> Any:
    """Random frozen parameters."""
    batch = {name: leaf[0] for name, leaf in VALIDATION.items()}
    shapes = flatten(jax.eval_shape(MODEL.init, jax.random.key(0), batch)["params"])
    rng = np.random.default_rng(0)
    return unflatten(
        {
            path: jnp.asarray(rng.normal(1.0 if path.endswith("/scale") else 0.0, 0.2, leaf.shape), jnp.float32)
            for path, leaf in shapes.items()
        }
    )


TARGETS = find_targets(base(), PATTERNS)


@cache
def padded_engine() -> Engine:
    """The engine of LANES, compiled once for all tests: blocks of two lanes on one device."""
    return engine(PADDED, num_slots=4, lane_block=2)


def engine(
    padded_ranks: Mapping[str, int],
    num_slots: int = 1,
    lane_block: int = 1,
    mesh_sizes: Mapping[str, int] = ONE_DEVICE,
    method: AdapterMethod = LORA,
) -> Engine:
    """AdamW with clipping and weight decay, as a run has it."""
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95, 1e-8), optax.add_decayed_weights(0.05)
    )

    def update(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types; ours does not
            return adamw.update(*arguments)

    transform = optax.GradientTransformation(adamw.init, update)
    training = Training(MODEL, TARGETS, method, transform, num_snapshots=LOOKS_PER_DOUBLING)
    return make_engine(training, EngineShape(padded_ranks, num_slots, lane_block), mesh(mesh_sizes))


class Program:
    """A chunk that is compiled for its first arguments and can be read."""

    def __init__(self, chunk: Any) -> None:
        self._chunk = chunk
        self.compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        self.compiled = self.compiled or self._chunk.lower(*arguments).compile(QUICK)
        return self.compiled(*arguments)


def run(lanes: Sequence[Lane], engine: Engine, timing: Schedule, **changes: Any) -> GroupResult:
    """Runs lanes of the first one's data; `changes` are fields of `LaneInputs` and `Hooks`, or `start`."""
    inputs = LaneInputs(base(), Stream(lanes[0]), VALIDATION, RATES)
    return run_with(lanes, engine, inputs, timing, changes)


def run_with(
    lanes: Sequence[Lane], engine: Engine, inputs: LaneInputs, timing: Schedule, changes: Mapping[str, Any]
) -> GroupResult:
    """Runs lanes with some fields of `LaneInputs` and `Hooks` changed, and perhaps a `start`."""
    hooks = {field.name: changes[field.name] for field in fields(Hooks) if field.name in changes}
    read = {field.name: changes[field.name] for field in fields(LaneInputs) if field.name in changes}
    assert set(changes) == {*hooks, *read, *({"start"} & set(changes))}
    return run_group(lanes, engine, replace(inputs, **read), timing, Hooks(**hooks), changes.get("start"))


def assert_same(left: Any, right: Any) -> None:
    """The same trees of arrays, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def assert_same_points(left: Any, right: Any) -> None:
    """The same eval points, in lists of any depth, to the last digit; NaN equals NaN."""
    np.testing.assert_equal(_documents(left), _documents(right))


def _documents(points: Any) -> Any:
    return [_documents(point) for point in points] if isinstance(points, list | tuple) else points.to_json()


def mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def schedule(steps: Sequence[int], **changes: Any) -> Schedule:
    """Two steps of warm-up, chunks of four steps, a checkpoint at every eval point."""
    multipliers = warmup_multipliers(max(steps[-1], 1), 2, "constant")
    settings = {"multipliers": multipliers, "per_doubling": 0, "chunk_steps": 4, "checkpoint_seconds": 0.0}
    return Schedule(eval_steps=steps, **settings | changes)
