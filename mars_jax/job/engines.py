"""The engines of a job: what a step keeps in memory, and the compiled functions for each shape, made once."""

import math
from functools import cached_property

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mars_jax.config.load import Config
from mars_jax.job.base import JobBase
from mars_jax.job.data import JobData
from mars_jax.lanes.engine import Engine, EngineShape, Training, make_engine
from mars_jax.models.attention import has_flash
from mars_jax.models.families.registry import build_model
from mars_jax.models.memory import activation_bytes, lane_state_bytes
from mars_jax.runtime.devices import device_memory_bytes
from mars_jax.runtime.progress import Reporter

# Of a device's memory, what a step may plan for; the rest is for batches and for what a plan misses.
_MEMORY_SHARE = 0.8
# Tokens in flight at which an accelerator is busy. A core always is; of cores that share a lane's products, two lanes
# hide what a step costs besides them.
_SATURATED_TOKENS = 4096
_SHARED_CORES_LANE_BLOCK = 2


class Engines:
    """Compiled training functions of a job, by shape and mesh."""

    def __init__(self, config: Config, reporter: Reporter, base: JobBase, data: JobData) -> None:
        self._config = config
        self._reporter = reporter
        self._base = base
        self._data = data
        self._made: dict[tuple[EngineShape, Mesh], Engine] = {}

    def engine(self, shape: EngineShape, mesh: Mesh | None = None) -> Engine:
        """The engine of a shape: see `job.programs` for which to ask for."""
        key = shape, mesh or self._base.mesh
        if key not in self._made:
            self._made[key] = make_engine(self._training, *key)
        return self._made[key]

    @cached_property
    def _training(self) -> Training:
        return Training(
            build_model(self._base.model_config, self.remat),
            self._base.targets,
            self._base.method,
            self.transform,
            num_snapshots=self._config.probe.looks_per_doubling,
        )

    @cached_property
    def transform(self) -> optax.GradientTransformation:
        """AdamW of the config without its learning rate: gradients to unscaled updates."""
        settings = self._config.optimizer
        steps = [optax.clip_by_global_norm(settings.clip_norm)]
        steps.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
        if settings.weight_decay:
            steps.append(optax.add_decayed_weights(settings.weight_decay))
        return optax.chain(*steps)

    @cached_property
    def remat(self) -> str:
        """What layers keep for the backward pass: the config's choice, or everything where that fits."""
        asked = self._config.model.remat
        if asked != "auto":
            return asked
        needed, there = self.step_bytes("none"), _MEMORY_SHARE * device_memory_bytes(self._base.mesh)
        if needed <= there:
            return "none"
        self._reporter.notice(
            f"model.remat is attention: a step without remat would take about {needed / 2**30:.0f} GiB of the "
            f"{there / 2**30:.0f} GiB that may be used"
        )
        return "attention"

    @property
    def default_lane_block(self) -> int:
        """Lanes in one vectorised step of a device, where nothing was measured."""
        if jax.default_backend() == "cpu":
            return 1 if self._base.mesh.size > 1 else _SHARED_CORES_LANE_BLOCK
        rows, tokens, _ = self._at_once
        return math.ceil(_SATURATED_TOKENS / (rows * tokens))

    @property
    def _at_once(self) -> tuple[int, int, int]:
        """Samples of a lane that a step computes at once, or rows of them, and their tokens and tiles."""
        batch_size, shapes = self._config.probe.batch_size, self._data.shapes
        if plan := self._data.packing(batch_size):
            return plan.packing.row_block, plan.packing.wide.tokens, plan.packing.wide.tiles
        return batch_size, shapes.max_tokens, shapes.max_tiles

    def step_bytes(self, remat: str) -> int:
        """Memory of a device for the probes, about: its part of the base, all lanes' states, one step's activations."""
        config, base = self._config, self._base
        settings, mesh = config.probe, base.mesh.shape
        block = self.default_lane_block if settings.lane_block == "auto" else settings.lane_block
        rows, tokens, tiles = self._at_once
        head_dims = {"vision": base.model_config.vision.head_dim, "llm": base.model_config.text.head_dim}
        activations = activation_bytes(
            base.model_config,
            {module: max(ranks) for module, ranks in config.lora.grids.items()},
            batch_size=math.ceil(block * rows / (mesh["data"] * mesh["fsdp"])),
            tokens=tokens,
            tiles=tiles,
            remat=remat,
            itemsize=jnp.dtype(config.model.dtype).itemsize,
            flash=[module for module, size in head_dims.items() if has_flash(config.model.dtype, size)],
        )
        states = math.ceil(settings.lanes_per_program / mesh["lane"]) * self.lane_bytes
        return base.num_bytes // (mesh["fsdp"] * mesh["tensor"]) + states + activations

    @property
    def lane_bytes(self) -> int:
        """Memory of the state of a lane with the largest ranks."""
        return lane_state_bytes(self.largest_lane, self._config.probe.looks_per_doubling)

    @property
    def largest_lane(self) -> int:
        """Trainable parameters of a lane with the largest ranks."""
        return self._base.num_trained({module: max(ranks) for module, ranks in self._config.lora.grids.items()})
