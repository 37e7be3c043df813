"""Which examples a step sees, in which order, as batches; and the batches of the evaluation controls.

Order is a pure function of (seed, step), so a stopped run goes on exactly. Encoding is in `examples`.
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
