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

from mars_jax import lora
from mars_jax.config import Config
from mars_jax.data.batches import Batch, eval_batches, nested_stream, stream, subset
from mars_jax.data.examples import ExampleSource, Preprocessor, ShapePlan, Shapes, load_preprocessor, plan_shapes
from mars_jax.data.features import FeatureSource
from mars_jax.data.pictures import ENCODER_INPUTS
from mars_jax.data.records import Record, load_records
from mars_jax.data.splits import Fractions, SearchData, Splits, split_of, split_records, splits_of_files
from mars_jax.devices import device_memory_bytes, devices_to_use, single_lane_mesh
from mars_jax.errors import ConfigError
from mars_jax.hub.families import parameters
from mars_jax.hub.read import open_safetensors, read_checkpoint, read_config, weight_files
from mars_jax.hubfiles import local
from mars_jax.memory import activation_bytes, lane_state_bytes
from mars_jax.models.families import build_model
from mars_jax.models.multimodal import Multimodal
from mars_jax.probe.engine import Engine, make_engine
from mars_jax.probe.plan import Lane
from mars_jax.progress import Reporter
from mars_jax.sharding import base_shardings, check_batch, make_mesh, place

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
        dropped = [
            {"id": record.id, "split": name, "reason": f"{length} tokens, more than {self.config.data.max_tokens}"}
            for name, plan in plans.items()
            for record, length in plan.dropped
        ]
        for entry in dropped:
            self.reporter.warn(f"sample {entry['id']!r} of {entry['split']} is left out: {entry['reason']}")
        shapes = self.shapes
        return {
            **{name: len(plan.kept) for name, plan in plans.items()},
            "images": {name: len({d for r in plan.kept for d in r.digests}) for name, plan in plans.items()},
            "formats": sorted({record.format for plan in plans.values() for record in plan.kept}),
            "dropped": dropped,
            "shapes": {
                name: getattr(shapes, name) for name in ("max_tokens", "max_tiles", "max_supervised", "corners")
            },
        }

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
        return math.ceil(_SATURATED_TOKENS / (self.config.probe.batch_size * self.shapes.max_tokens))

    def step_bytes(self, remat: str) -> int:
        """Memory of a device for the probes, about: its part of the base, all lanes' states, one step's activations."""
        settings, mesh, grids = self.config.probe, self.mesh.shape, self.grids
        largest = sum(max(grids[module]) * count for module, count in lora.parameters_per_rank(self.targets).items())
        block = self.default_lane_block if settings.lane_block == "auto" else settings.lane_block
        activations = activation_bytes(
            self.model_config,
            {module: max(ranks) for module, ranks in grids.items()},
            batch_size=math.ceil(block * settings.batch_size / (mesh["data"] * mesh["fsdp"])),
            tokens=self.shapes.max_tokens,
            tiles=self.shapes.max_tiles,
            remat=remat,
            itemsize=jnp.dtype(self.config.model.dtype).itemsize,
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
        return lora.unflatten({p.path: jax.ShapeDtypeStruct(p.shape, dtype) for p in base})

    @property
    def base_bytes(self) -> int:
        """Bytes of the base."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_base))

    @cached_property
    def targets(self) -> lora.Targets:
        """Linears that take adapters; refuses patterns and ranks that mean nothing."""
        modules = self.config.lora.modules
        targets = lora.find_targets(self.abstract_base, {name: module.targets for name, module in modules.items()})
        for ends in (min, max):
            lora.check_ranks(targets, {name: ends(module.ranks) for name, module in modules.items()})
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
        """The engine of these shapes, made once: see `mars_jax.programs` for which to ask for."""
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

    def stream(self, lane: Lane, batch_size: int) -> "grain.MapDataset[Batch]":
        """Batches of a lane: smaller D lie in larger ones, and lanes of one seed see the same order."""
        indices = subset(len(self.search.train), lane.num_samples, self.config.seed)
        return stream(self._train_source, indices, seed=self.config.seed + lane.seed, batch_size=batch_size)

    def probe_stream(self, lane: Lane, *, cached_encoder: bool) -> "grain.MapDataset[Batch]":
        """Batches of a probe, with the encoder's output in place of pixels if asked for."""
        settings = self.config.probe
        indices = subset(len(self.search.train), lane.num_samples, self.config.seed)
        source = self._feature_source if cached_encoder else self._train_source
        seed = self.config.seed + lane.seed
        if settings.sampling == "nested":
            return nested_stream(source, indices, settings.num_samples, seed=seed, batch_size=settings.batch_size)
        return stream(source, indices, seed=seed, batch_size=settings.batch_size)

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

    def check_model(self) -> None:
        """Refuses a checkpoint, targets or ranks that can't be used, reading headers only, before the data are read.

        Raises:
            ConfigError: no usable checkpoint, a target without a hit, or a rank beyond a width.
        """
        _ = self.targets
        for file in weight_files(self.checkpoint):
            with open_safetensors(file):
                pass
        sizes = self.config.probe.num_samples
        if self.config.lora.is_searched and len(sizes) < 2:
            raise ConfigError(
                f"probe.num_samples is {list(sizes)}; the laws need at least two numbers of samples. Add another."
            )

    def check_sizes(self) -> None:
        """Refuses data sizes that the training split can't give.

        Raises:
            ConfigError: more samples asked for than there are.
        """
        total = len(self.search.train)
        wanted = {"probe.num_samples": max(self.config.probe.num_samples)} if self.config.lora.is_searched else {}
        if self.config.selection.target_num_samples:
            wanted["selection.target_num_samples"] = self.config.selection.target_num_samples
        for key, value in wanted.items():
            if value > total:
                raise ConfigError(
                    f"{key} asks for {value} training samples, but the training split has {total}. "
                    f"Choose at most {total}, or give more data."
                )
