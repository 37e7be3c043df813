"""Training batches in a reproducible random order, and evaluation batches.

The order is a pure function of (seed, step), so an interrupted run resumes exactly. Encoding is in `examples`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from mars_jax.data.examples import Example, ExampleSource
from mars_jax.errors import ConfigError

Batch = Example
"""The arrays of `ExampleSource` with a leading batch axis B."""


class EvalBatch(NamedTuple):
    """A batch, and the number of its rows that hold samples; the others have zero `target_weights`."""

    batch: Batch
    valid: int


def subset(total: int, num_samples: int, subset_seed: int) -> tuple[int, ...]:
    """A random subset of `range(total)`, fixed by the seed; a smaller subset is a prefix of a larger one.

    Args:
        total: number of records.
        num_samples: size of the subset, D.
        subset_seed: seed of the permutation whose first `num_samples` are taken.

    Raises:
        ConfigError: `num_samples` is not in 1 to `total`.
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
        indices: indices of the samples, for instance from `subset`.
        seed: seed of the permutations; 0 to 2^32 - 1.
        batch_size: B; may be larger than the number of indices.
    """
    order = grain.MapDataset.source(np.asarray(indices)).shuffle(seed=seed).repeat()
    return order.map(source.__getitem__).batch(batch_size, drop_remainder=True)


def nested_stream(
    source: Examples, indices: Sequence[int], sizes: Sequence[int], *, seed: int, batch_size: int
) -> grain.MapDataset[Batch]:
    """The batch stream of a single pass in which the data of each size in `sizes` is a prefix.

    For every D of `sizes`, the first D samples of the stream are the first D of `indices`. Between one size and the
    next the order is random.

    Args:
        source: the examples.
        indices: indices of the samples, as many as the largest of `sizes`.
        sizes: numbers of samples D, increasing.
        seed: seed of the order.
        batch_size: B.
    """
    parts = itertools.pairwise((0, *sizes))
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.asarray(indices)[start:stop]) for start, stop in parts])
    return grain.MapDataset.source(order).map(source.__getitem__).batch(batch_size, drop_remainder=True)


def eval_batches(
    source: ExampleSource, batch_size: int, start: int = 0, stop: int | None = None
) -> Iterator[EvalBatch]:
    """Batches of examples `start` to `stop`, once and in order.

    Args:
        source: the examples.
        batch_size: B.
        start: index of the first example.
        stop: index after the last example; None: the end of the source.

    Returns:
        The batches. The last one is padded to B rows with copies of its last row, with weight 0.
    """
    stop = len(source) if stop is None else stop
    for first in range(start, stop, batch_size):
        valid = min(batch_size, stop - first)
        rows = [source[first + min(row, valid - 1)] for row in range(batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["target_weights"][valid:] = 0
        yield EvalBatch(batch, valid)
