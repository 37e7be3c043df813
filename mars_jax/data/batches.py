"""Which examples a step sees, in which order, as batches; and the batches of the evaluation controls.

Order is a pure function of (seed, step), so a stopped run goes on exactly. Encoding is in `examples`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import grain
import numpy as np

from mars_jax.data.examples import Example, ExampleSource
from mars_jax.data.records import Record
from mars_jax.errors import ConfigError, DataError

Batch = Example
"""The arrays of `ExampleSource` with a leading batch axis B."""


class EvalBatch(NamedTuple):
    """A batch and how many of its rows are real; the others have zero `target_weights`."""

    batch: Batch
    valid: int


def subset(total: int, num_samples: int, subset_seed: int) -> tuple[int, ...]:
    """The first `num_samples` of a permutation of `range(total)` fixed by the seed: smaller subsets lie in larger ones.

    Raises:
        ConfigError: there are not that many.
    """
    if not 1 <= num_samples <= total:
        raise ConfigError(
            f"num_samples is {num_samples}, but the training split has {total} records. Choose 1 to {total}, or give "
            "more data."
        )
    permutation = np.random.default_rng(subset_seed).permutation(total)
    return tuple(permutation[:num_samples].tolist())


class Examples(Protocol):
    """Random access to examples."""

    def __getitem__(self, number: int) -> Example:
        """The example with this number."""
        ...


def stream(source: Examples, indices: Sequence[int], *, seed: int, batch_size: int) -> grain.MapDataset[Batch]:
    """The endless batch stream of one lane: `stream(...)[step]` is the batch of that step.

    Every epoch is a new permutation of `indices`; batches run across the ends of epochs, so no sample is lost or
    repeated within an epoch.

    Args:
        source: the examples.
        indices: which of them, for instance from `subset`.
        seed: of the permutations; 0 to 2^32 - 1.
        batch_size: B; may be larger than the number of indices.
    """
    order = grain.MapDataset.source(np.asarray(indices)).shuffle(seed=seed).repeat()
    return order.map(source.__getitem__).batch(batch_size, drop_remainder=True)


def nested_stream(
    source: Examples, indices: Sequence[int], sizes: Sequence[int], *, seed: int, batch_size: int
) -> grain.MapDataset[Batch]:
    """The batch stream of a single pass whose first D samples, for every D of `sizes`, are the first D of `indices`.

    Between one size and the next the order is random.

    Args:
        source: the examples.
        indices: which of them, the largest of `sizes` many.
        sizes: numbers of samples D, rising.
        seed: of the order.
        batch_size: B.
    """
    parts = itertools.pairwise((0, *sizes))
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.asarray(indices)[start:stop]) for start, stop in parts])
    return grain.MapDataset.source(order).map(source.__getitem__).batch(batch_size, drop_remainder=True)


def eval_batches(source: ExampleSource, batch_size: int) -> Iterator[EvalBatch]:
    """All examples once, in order; the last batch is filled up with copies of its last row that weigh nothing."""
    for start in range(0, len(source), batch_size):
        valid = min(batch_size, len(source) - start)
        rows = [source[start + min(row, valid - 1)] for row in range(batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["target_weights"][valid:] = 0
        yield EvalBatch(batch, valid)


def image_blind(batch: Batch) -> Batch:
    """The batch with every picture zero (mean grey): what the model says from the text alone."""
    return {**batch, "pixels": np.zeros_like(batch["pixels"])}


def can_shuffle(records: Sequence[Record]) -> bool:
    """Whether every picture can give way to one that its record doesn't have."""
    digests = [set(record.digests) for record in records]
    return len(set().union(*digests)) > max(map(len, digests), default=0) > 0


def shuffle_images(records: Sequence[Record], seed: int) -> tuple[Record, ...]:
    """The records with every picture swapped for one of the set that its record doesn't have; text-only records stay.

    The distinct pictures are put in a random ring and each gives way to the next, or the next after that. Pictures of
    other sizes need other shapes: plan them again.

    Raises:
        DataError: no picture is left for some record.
    """
    paths = {digest: path for record in records for digest, path in zip(record.digests, record.images, strict=True)}
    if not can_shuffle(records):
        raise DataError(
            "the shuffled-picture control needs more different pictures than any record has, and at least two; the "
            f"data have {len(paths)}. Leave the control out, or evaluate on more data."
        )
    ring = [sorted(paths)[place] for place in np.random.default_rng(seed).permutation(len(paths))]
    places = {digest: place for place, digest in enumerate(ring)}

    def swapped(record: Record) -> Record:
        donors = [
            next(donor for donor in ring[places[digest] - 1 :: -1] + ring[::-1] if donor not in record.digests)
            for digest in record.digests
        ]
        return replace(record, images=tuple(paths[donor] for donor in donors), digests=tuple(donors))

    return tuple(swapped(record) for record in records)
