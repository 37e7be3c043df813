"""What the phases of a run share, loaded once and only when needed: data, targets, base, batches.

No phase's logic is here. Search code gets `search`, which has no test split to look at.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mars_jax.adapters import lora
from mars_jax.adapters.targets import Targets, check_ranks, find_targets, parameters_per_rank
from mars_jax.config.load import Config
from mars_jax.data.batches import Batch, eval_batches, nested_stream, stream, subset
from mars_jax.data.examples import ExampleSource
from mars_jax.data.features import FeatureSource
from mars_jax.data.packing import PackingPlan, plan_packing
from mars_jax.data.preprocessor import Preprocessor, load_preprocessor
from mars_jax.data.records import Record, load_records
from mars_jax.data.shapes import ShapePlan, Shapes, plan_shapes
from mars_jax.data.splits import Fractions, SearchData, Splits, split_of, split_records, splits_of_files
from mars_jax.data.summary import data_summary
from mars_jax.hub.paths import local
from mars_jax.hub.read import read_checkpoint, read_config
from mars_jax.lanes.engine import Engine, make_engine
from mars_jax.lanes.lane import Lane
from mars_jax.models.attention import has_flash
from mars_jax.models.families.pictures import ENCODER_INPUTS
from mars_jax.models.families.registry import build_model, parameters
from mars_jax.models.memory import activation_bytes, lane_state_bytes
from mars_jax.models.multimodal import Multimodal
from mars_jax.runtime.devices import device_memory_bytes, devices_to_use, single_lane_mesh
from mars_jax.runtime.progress import Reporter
from mars_jax.runtime.sharding import base_shardings, batch_parts, check_batch, make_mesh, place
from mars_jax.runtime.trees import unflatten

if TYPE_CHECKING:
    import grain

_UNLIMITED = 2**31
# Of a device's memory, what a step may plan for; the rest is for batches and for what a plan misses.
_MEMORY_SHARE = 0.8
# Tokens in flight at which an accelerator is busy. A core always is; of cores that share a lane's products, two lanes
# hide what a step costs besides them.
_SATURATED_TOKENS = 4096
_SHARED_CORES_LANE_BLOCK = 2


class Workspace:
    """Lazily loaded parts of one run."""

    def __init__(self, config: Config, reporter: Reporter) -> None:
        self.config = config
        self.reporter = reporter
        self._engines: dict[Any, Engine] = {}
        self._packings: dict[tuple[int, int], PackingPlan] = {}

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the base, downloaded if it is named by its address."""
        return local(self.config.model.checkpoint)

    # Data.

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """Tokenizer and pictures of the checkpoint."""
        return load_preprocessor(self.checkpoint, self.config.data.max_pixels)

    @cached_property
    def _splits(self) -> Splits:
        data = self.config.data

        def load(path: Path) -> tuple[Record, ...]:
            return load_records(path, data.image_root)

        train = load(data.train)
        validation_share = 0.0 if data.validation else data.validation_fraction
        test_share = 0.0 if data.test else data.test_fraction
        fractions = Fractions(1.0 - validation_share - test_share, validation_share, test_share)
        if not (data.validation or data.test):
            return split_records(train, fractions)
        parts: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
        for record in train:
            parts[split_of(record, fractions)].append(record)
        return splits_of_files(
            parts["train"],
            load(data.validation) if data.validation else parts["validation"],
            load(data.test) if data.test else parts["test"],
        )

    def _plan(self, records: Sequence[Record]) -> ShapePlan:
        return plan_shapes(records, self.preprocessor, self.config.data.max_tokens or _UNLIMITED)

    @cached_property
    def _train_plan(self) -> ShapePlan:
        return self._plan(self._splits.train)

    @cached_property
    def _validation_plan(self) -> ShapePlan:
        return self._plan(self._splits.validation)

    @cached_property
    def _test_plan(self) -> ShapePlan:
        return self._plan(self._splits.test)

    @cached_property
    def search(self) -> SearchData:
        """Training and validation records that fit; all that search code may see."""
        return SearchData(train=self._train_plan.kept, validation=self._validation_plan.kept)

    @property
    def test_records(self) -> tuple[Record, ...]:
        """Test records that fit: for evaluation and export only."""
        return self._test_plan.kept

    @cached_property
    def shapes(self) -> Shapes:
        """Static shapes of training and validation batches."""
        return self._train_plan.shapes.union(self._validation_plan.shapes)

    @cached_property
    def _train_source(self) -> ExampleSource:
        return ExampleSource(self.search.train, self.preprocessor, self.shapes)

    def data_summary(self) -> dict[str, Any]:
        """The document of data.json; what was dropped is told by name."""
        plans = {"train": self._train_plan, "validation": self._validation_plan, "test": self._test_plan}
        summary = data_summary(plans, self.shapes, self.config.data.max_tokens)
        for entry in summary["dropped"]:
            self.reporter.warn(f"sample {entry['id']!r} of {entry['split']} is left out: {entry['reason']}")
        return {**summary, "padding": self._padding()}

    def _padding(self) -> dict[str, Any]:
        """Shares of padding in what a step of a probe, or of the final run alone, computes: part of data.json."""
        section = self.config.probe if self.config.lora.is_searched else self.config.finetune
        tokens, tiles, _ = np.mean(self._train_plan.sizes, axis=0).tolist()
        shapes, plan = self.shapes, self._packing_plan(section.batch_size, self._batch_parts)
        unpacked = {"tokens": 1.0 - tokens / shapes.max_tokens, "tiles": 1.0 - tiles / shapes.max_tiles}
        return {"batch_size": section.batch_size, "unpacked": unpacked, "packed": plan.padding}

    def packing(self, batch_size: int, parts: int | None = None) -> PackingPlan | None:
        """How training batches are packed, if so, where samples are split over so many devices; None: as in probes."""
        return self._packing_plan(batch_size, parts or self._batch_parts) if self.config.data.packing else None

    def _packing_plan(self, batch_size: int, parts: int) -> PackingPlan:
        key = batch_size, parts
        if key not in self._packings:
            sizes = np.asarray(self._train_plan.sizes, np.int64)
            self._packings[key] = plan_packing(sizes, batch_size, parts, self.preprocessor.pictures.rows_per_tile)
        return self._packings[key]

    @property
    def _batch_parts(self) -> int:
        """Devices that a probe's samples are split over; they are looked for only where the config leaves it open."""
        sizes = self.config.mesh.data, self.config.mesh.fsdp
        return math.prod(sizes) if min(sizes) > 0 else batch_parts(self.mesh)

    def target_num_samples(self) -> int:
        """D that ranks are picked for: all training samples unless the config says otherwise."""
        return self.config.selection.target_num_samples or len(self.search.train)

    # Model.

    @cached_property
    def model_config(self) -> Any:
        """Architecture of the checkpoint."""
        return read_config(self.checkpoint)

    @cached_property
    def model(self) -> Multimodal:
        """The Linen module."""
        return build_model(self.model_config, self.remat)

    @cached_property
    def remat(self) -> str:
        """What layers keep for the backward pass: the config's choice, or everything where that fits."""
        asked = self.config.model.remat
        if asked != "auto":
            return asked
        needed, there = self.step_bytes("none"), _MEMORY_SHARE * device_memory_bytes(self.mesh)
        if needed <= there:
            return "none"
        self.reporter.notice(
            f"model.remat is attention: a step without remat would take about {needed / 2**30:.0f} GiB of the "
            f"{there / 2**30:.0f} GiB that may be used"
        )
        return "attention"

    @property
    def default_lane_block(self) -> int:
        """Lanes in one vectorised step of a device, where nothing was measured."""
        if jax.default_backend() == "cpu":
            return 1 if self.mesh.size > 1 else _SHARED_CORES_LANE_BLOCK
        rows, tokens, _ = self._at_once
        return math.ceil(_SATURATED_TOKENS / (rows * tokens))

    @property
    def _at_once(self) -> tuple[int, int, int]:
        """Samples of a lane that a step computes at once, or rows of them, and their tokens and tiles."""
        batch_size = self.config.probe.batch_size
        if plan := self.packing(batch_size):
            return plan.packing.row_block, plan.packing.wide.tokens, plan.packing.wide.tiles
        return batch_size, self.shapes.max_tokens, self.shapes.max_tiles

    def step_bytes(self, remat: str) -> int:
        """Memory of a device for the probes, about: its part of the base, all lanes' states, one step's activations."""
        settings, mesh, grids = self.config.probe, self.mesh.shape, self.grids
        largest = sum(max(grids[module]) * count for module, count in parameters_per_rank(self.targets).items())
        block = self.default_lane_block if settings.lane_block == "auto" else settings.lane_block
        rows, tokens, tiles = self._at_once
        parts = {"vision": self.model_config.vision, "llm": self.model_config.text}
        activations = activation_bytes(
            self.model_config,
            {module: max(ranks) for module, ranks in grids.items()},
            batch_size=math.ceil(block * rows / (mesh["data"] * mesh["fsdp"])),
            tokens=tokens,
            tiles=tiles,
            remat=remat,
            itemsize=jnp.dtype(self.config.model.dtype).itemsize,
            flash=[module for module, part in parts.items() if has_flash(self.config.model.dtype, part.head_dim)],
        )
        states = math.ceil(settings.lanes_per_program / mesh["lane"]) * lane_state_bytes(
            largest, settings.looks_per_doubling
        )
        return self.base_bytes // (mesh["fsdp"] * mesh["tensor"]) + states + activations

    @cached_property
    def mesh(self) -> Mesh:
        """The devices of the config.

        Raises:
            ConfigError: sizes that don't fit the devices, or a base or batch that they don't divide.
        """
        sizes = self.config.mesh.model_dump()
        devices = devices_to_use(sizes, self.base_bytes, self.config.probe.lanes_per_program)
        mesh = make_mesh(sizes, devices)
        for batch_size in (self.config.probe.batch_size, self.config.finetune.batch_size):
            check_batch(batch_size, mesh)
        base_shardings(self.abstract_base, mesh)
        return mesh

    @cached_property
    def single_lane_mesh(self) -> Mesh:
        """The same devices for one lane: see `devices.single_lane_mesh`."""
        return single_lane_mesh(self.mesh, self.config.finetune.batch_size)

    @cached_property
    def base(self) -> Any:
        """Frozen parameters on the devices."""
        loaded = read_checkpoint(self.checkpoint, self.config.model.dtype)[1]
        return place(loaded, base_shardings(self.abstract_base, self.mesh))

    def base_on(self, mesh: Mesh) -> Any:
        """Frozen parameters as an engine on this mesh takes them."""
        return self.base if mesh == self.mesh else place(self.base, base_shardings(self.abstract_base, mesh))

    @cached_property
    def abstract_base(self) -> Any:
        """Shapes of the parameters, from the config alone."""
        dtype = jnp.dtype(self.config.model.dtype)
        base = parameters(self.model_config)
        return unflatten({p.path: jax.ShapeDtypeStruct(p.shape, dtype) for p in base})

    @property
    def base_bytes(self) -> int:
        """Bytes of the base."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_base))

    @cached_property
    def targets(self) -> Targets:
        """Linears that take adapters; refuses patterns and ranks that mean nothing."""
        modules = self.config.lora.modules
        targets = find_targets(self.abstract_base, {name: module.targets for name, module in modules.items()})
        for ends in (min, max):
            check_ranks(targets, {name: ends(module.ranks) for name, module in modules.items()})
        return targets

    @property
    def grids(self) -> dict[str, tuple[int, ...]]:
        """Module -> ranks to try."""
        return {name: module.ranks for name, module in self.config.lora.modules.items()}

    @property
    def alpha(self) -> lora.AlphaRule:
        """The alpha rule."""
        return lora.AlphaRule(self.config.lora.alpha.rule, self.config.lora.alpha.value)

    def learning_rates(self, override: float | None = None) -> dict[str, float]:
        """Module -> learning rate."""
        rate = override or self.config.optimizer.learning_rate
        return dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(self.grids, rate)

    # Training.

    @cached_property
    def transform(self) -> optax.GradientTransformation:
        """AdamW of the config without its learning rate: gradients to unscaled updates."""
        settings = self.config.optimizer
        steps = [optax.clip_by_global_norm(settings.clip_norm)]
        steps.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
        if settings.weight_decay:
            steps.append(optax.add_decayed_weights(settings.weight_decay))
        return optax.chain(*steps)

    def engine(
        self,
        padded_ranks: Mapping[str, int],
        num_slots: int,
        lane_block: int,
        *,
        cached_encoder: bool = False,
        mesh: Mesh | None = None,
    ) -> Engine:
        """The engine of these shapes, made once: see `mars_jax.job.programs` for which to ask for."""
        mesh = mesh or self.mesh
        key = (tuple(padded_ranks.items()), num_slots, lane_block, cached_encoder, mesh)
        if key not in self._engines:
            self._engines[key] = make_engine(
                self.model,
                self.targets,
                padded_ranks=padded_ranks,
                alpha=self.alpha,
                transform=self.transform,
                num_snapshots=self.config.probe.looks_per_doubling,
                num_slots=num_slots,
                lane_block=lane_block,
                mesh=mesh,
                cached_encoder=cached_encoder,
            )
        return self._engines[key]

    def stream(self, lane: Lane, batch_size: int, parts: int | None = None) -> "grain.MapDataset[Any]":
        """Batches of a lane: smaller D lie in larger ones, and lanes of one seed see the same order.

        With `data.packing` they are packed, for `parts` devices: see `packing`.
        """
        indices = subset(len(self.search.train), lane.num_samples, self.config.seed)
        batches = stream(self._train_source, indices, seed=self.config.seed + lane.seed, batch_size=batch_size)
        plan = self.packing(batch_size, parts)
        return batches.map(plan.packing.pack) if plan else batches

    def probe_stream(self, lane: Lane, *, cached_encoder: bool) -> "grain.MapDataset[Any]":
        """Batches of a probe, with the encoder's output in place of pixels if asked for."""
        settings = self.config.probe
        indices = subset(len(self.search.train), lane.num_samples, self.config.seed)
        source = self._feature_source if cached_encoder else self._train_source
        seed = self.config.seed + lane.seed
        if settings.sampling == "nested":
            batches = nested_stream(source, indices, settings.num_samples, seed=seed, batch_size=settings.batch_size)
        else:
            batches = stream(source, indices, seed=seed, batch_size=settings.batch_size)
        plan = self.packing(settings.batch_size)
        return batches.map(plan.packing.pack) if plan else batches

    @cached_property
    def _encode(self) -> Callable[[Any], Any]:
        apply = jax.jit(lambda base, batch: self.model.apply({"params": base}, batch, method="encode"))
        dtype = jnp.dtype(self.config.model.dtype)
        base = self.base_on(self.single_lane_mesh)
        return lambda inputs: jax.device_get(apply(base, {**inputs, "pixels": inputs["pixels"].astype(dtype)}))

    @cached_property
    def _feature_source(self) -> FeatureSource:
        settings = self.config.probe
        indices = subset(len(self.search.train), max(settings.num_samples), self.config.seed)
        return FeatureSource(self._train_source, indices, self._encode, settings.batch_size)

    def validation_batches(self, batch_size: int, *, cached_encoder: bool = False) -> Batch:
        """Validation batches [V, B, ...] for looks of probes, of the sweep and of the final run: see `look_batches`.

        All get all of them, so that they can share a compiled program.
        """
        records = self.search.validation
        chosen = subset(len(records), max(self._look_samples), self.config.seed)
        batches: list[Batch] = []
        for start, stop in pairwise((0, *self._look_samples)):
            part = [records[i] for i in chosen[start:stop]]
            source = ExampleSource(part, self.preprocessor, self.shapes, cache_bytes=0)
            batches += [batch for batch, _ in eval_batches(source, batch_size)]
        if cached_encoder:
            for batch in batches:
                batch["features"] = self._encode({name: batch.pop(name) for name in ENCODER_INPUTS if name in batch})
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def look_batches(self, samples: int, batch_size: int) -> int:
        """How many of the validation batches, from the first, hold the samples that a look is to read."""
        parts = pairwise((0, *(size for size in self._look_samples if size <= samples)))
        return sum(-(-(stop - start) // batch_size) for start, stop in parts)

    @property
    def _look_samples(self) -> list[int]:
        """Validation samples in the looks of a run, the fewest first."""
        asked = (self.config.probe.validation_samples, self.config.finetune.validation_samples)
        return sorted({min(samples, len(self.search.validation)) for samples in asked})
