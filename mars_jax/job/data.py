"""The data of a job: splits, static shapes, packing, training streams and validation batches.

Everything is loaded when first asked for. Search code gets `search`, which has no test split to look at.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import grain
import numpy as np

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
from mars_jax.data.template import prompt_text
from mars_jax.hub.end_tokens import load_end_tokens
from mars_jax.job.base import JobBase
from mars_jax.job.sample_notes import sample_notes
from mars_jax.lanes.lane import Lane
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.progress import Reporter
from mars_jax.runtime.sharding import batch_parts


class JobData:
    """Samples of a job as splits, shapes and batches."""

    def __init__(self, config: Config, reporter: Reporter, base: JobBase) -> None:
        self._config = config
        self._reporter = reporter
        self._base = base
        self._packings: dict[tuple[int, int], PackingPlan] = {}
        self._notes: list[str] = []

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """Tokenizer and image processor of the checkpoint."""
        return load_preprocessor(self._base.checkpoint, self._config.data.max_pixels)

    @cached_property
    def search(self) -> SearchData:
        """Training and validation records that fit; all that search code may see."""
        return SearchData(train=self._plans["train"].kept, validation=self._plans["validation"].kept)

    @property
    def test_records(self) -> tuple[Record, ...]:
        """Test records that fit: for evaluation and export only."""
        return self._plans["test"].kept

    @cached_property
    def shapes(self) -> Shapes:
        """Static shapes of training and validation batches."""
        return self._plans["train"].shapes.union(self._plans["validation"].shapes)

    def target_num_samples(self) -> int:
        """D that ranks are picked for: all training samples unless the config says otherwise."""
        return self._config.selection.target_num_samples or len(self.search.train)

    @cached_property
    def _splits(self) -> Splits:
        data = self._config.data

        def load(path: Path) -> tuple[Record, ...]:
            return load_records(path, data.image_root, learn=data.learn, note=self._notes.append)

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

    @cached_property
    def _plans(self) -> "_Plans":
        return _Plans(self._splits, self.preprocessor, self._config.data.max_tokens)

    def pictures(self) -> dict[Path, str]:
        """Picture file -> SHA-256 of its bytes, of the samples of all splits."""
        records = (*self._splits.train, *self._splits.validation, *self._splits.test)
        return {
            picture: digest
            for record in records
            for picture, digest in zip(record.images, record.digests, strict=True)
            if isinstance(picture, Path)
        }

    def prompt(self) -> str:
        """A prompt as it is trained and asked: of the first test sample, or of the first training sample."""
        record = (*self.test_records[:1], *self.search.train[:1])[0]
        return prompt_text(record, self.preprocessor.chat)

    # What data.json says.

    def summary(self) -> Document:
        """The document of data.json; notes on the data, and samples that were dropped, are reported as warnings."""
        plans = {name: self._plans[name] for name in ("train", "validation", "test")}
        ends = load_end_tokens(self._base.checkpoint, self.preprocessor.tokenizer)
        notes = [*self._notes, *sample_notes(self.search.train, self.preprocessor, ends)]
        document = data_summary(plans, self.shapes, self._config.data.max_tokens, notes)
        for text in document["notes"]:
            self._reporter.warn(text)
        for entry in document["dropped"]:
            self._reporter.warn(f"sample {entry['id']!r} of {entry['split']} is left out: {entry['reason']}")
        return {**document, "padding": self._padding()}

    def _padding(self) -> Document:
        """Shares of padding in what a step of a probe, or of the final run alone, computes: part of data.json."""
        config = self._config
        batch_size = (config.probe if config.lora.is_searched else config.finetune).batch_size
        tokens, tiles, _ = np.mean(self._plans["train"].sizes, axis=0).tolist()
        shapes, plan = self.shapes, self._packing_plan(batch_size, self._batch_parts)
        unpacked = {"tokens": 1.0 - tokens / shapes.max_tokens, "tiles": 1.0 - tiles / shapes.max_tiles}
        return {"batch_size": batch_size, "unpacked": unpacked, "packed": plan.padding}

    # Packing.

    def packing(self, batch_size: int, parts: int | None = None) -> PackingPlan | None:
        """How training batches are packed where the config asks for it.

        Args:
            batch_size: B.
            parts: devices that samples are split over; None: as in probes.
        """
        return self._packing_plan(batch_size, parts or self._batch_parts) if self._config.data.packing else None

    def _packing_plan(self, batch_size: int, parts: int) -> PackingPlan:
        key = batch_size, parts
        if key not in self._packings:
            sizes = np.asarray(self._plans["train"].sizes, np.int64)
            self._packings[key] = plan_packing(sizes, batch_size, parts, self.preprocessor.pictures.rows_per_tile)
        return self._packings[key]

    @property
    def _batch_parts(self) -> int:
        """Devices that a probe's samples are split over; they are looked for only where the config leaves it open."""
        sizes = self._config.mesh.data, self._config.mesh.fsdp
        return math.prod(sizes) if min(sizes) > 0 else batch_parts(self._base.mesh)

    # Training streams.

    def stream(self, lane: Lane, batch_size: int, parts: int | None = None) -> grain.MapDataset[Batch]:
        """Batches of a final run: smaller D lie in larger ones, and lanes of one seed see the same order.

        With `data.packing` they are packed, for `parts` devices: see `packing`.
        """
        batches = stream(self._train_source, self._indices(lane), seed=self._seed(lane), batch_size=batch_size)
        plan = self.packing(batch_size, parts)
        return batches.map(plan.packing.pack) if plan else batches

    def probe_stream(self, lane: Lane, *, cached_encoder: bool) -> grain.MapDataset[Batch]:
        """Batches of a probe, with the encoder's output in place of pixels if asked for."""
        settings, indices, seed = self._config.probe, self._indices(lane), self._seed(lane)
        source = self._feature_source if cached_encoder else self._train_source
        if settings.sampling == "nested":
            batches = nested_stream(source, indices, settings.num_samples, seed=seed, batch_size=settings.batch_size)
        else:
            batches = stream(source, indices, seed=seed, batch_size=settings.batch_size)
        plan = self.packing(settings.batch_size)
        return batches.map(plan.packing.pack) if plan else batches

    def _indices(self, lane: Lane) -> tuple[int, ...]:
        return subset(len(self.search.train), lane.num_samples, self._config.seed)

    def _seed(self, lane: Lane) -> int:
        return self._config.seed + lane.seed

    @cached_property
    def _train_source(self) -> ExampleSource:
        return ExampleSource(self.search.train, self.preprocessor, self.shapes)

    @cached_property
    def _feature_source(self) -> FeatureSource:
        settings = self._config.probe
        indices = subset(len(self.search.train), max(settings.num_samples), self._config.seed)
        return FeatureSource(self._train_source, indices, self._base.encode, settings.batch_size)

    # Validation batches.

    def validation_batches(self, batch_size: int, *, cached_encoder: bool = False) -> Batch:
        """Validation batches [V, B, ...] for eval points of probes and final runs: see `num_eval_batches`.

        All of them, whoever asks, so that probes and final runs can share a compiled program.
        """
        batches: list[Batch] = []
        for start, stop in pairwise((0, *self._eval_samples)):
            batches += [batch for batch, _ in eval_batches(self._validation_source, batch_size, start, stop)]
        if cached_encoder:
            for batch in batches:
                inputs = {name: batch.pop(name) for name in self.preprocessor.encoder_inputs}
                batch["features"] = self._base.encode(inputs)
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def num_eval_batches(self, samples: int, batch_size: int) -> int:
        """How many of the validation batches, from the first, hold the samples that an eval point is to read."""
        parts = pairwise((0, *(size for size in self._eval_samples if size <= samples)))
        return sum(-(-(stop - start) // batch_size) for start, stop in parts)

    @cached_property
    def _validation_source(self) -> ExampleSource:
        """The validation samples in the order that eval points read them; kept in memory as far as they fit."""
        records = self.search.validation
        chosen = subset(len(records), max(self._eval_samples), self._config.seed)
        return ExampleSource([records[i] for i in chosen], self.preprocessor, self.shapes)

    @property
    def _eval_samples(self) -> list[int]:
        """Validation samples that eval points of probes and final runs read, the fewest first."""
        asked = (self._config.probe.validation_samples, self._config.finetune.validation_samples)
        return sorted({min(samples, len(self.search.validation)) for samples in asked})


class _Plans:
    """Shape plans of the splits, each made when first asked for: a search never reads a test picture."""

    def __init__(self, splits: Splits, preprocessor: Preprocessor, max_tokens: int | None) -> None:
        self._splits, self._preprocessor, self._max_tokens = splits, preprocessor, max_tokens
        self._made: dict[str, ShapePlan] = {}

    def __getitem__(self, name: str) -> ShapePlan:
        if name not in self._made:
            records: Sequence[Record] = getattr(self._splits, name)
            self._made[name] = plan_shapes(records, self._preprocessor, self._max_tokens)
        return self._made[name]
