"""Evaluation controls: batches without pictures, and records with the pictures of other samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mars_jax.data.batches import Batch
from mars_jax.data.records import Record
from mars_jax.errors import DataError


def image_blind(batch: Batch) -> Batch:
    """The batch with every picture zero (mean grey), to measure what the model infers from the text alone."""
    return {**batch, "pixels": np.zeros_like(batch["pixels"])}


def can_shuffle(records: Sequence[Record]) -> bool:
    """Whether every picture can be replaced by one that is not in its record."""
    digests = [set(record.digests) for record in records]
    return len(set().union(*digests)) > max(map(len, digests), default=0) > 0


def shuffle_images(records: Sequence[Record], seed: int) -> tuple[Record, ...]:
    """The records with every picture replaced by one from another record; text-only records are unchanged.

    The distinct pictures are put in a random ring, and each is replaced by its predecessor, or the nearest one before
    that is not in the record. The shapes of the result must be planned again, since picture sizes differ.

    Args:
        records: the records.
        seed: seed of the ring's order.

    Raises:
        DataError: a record has every picture of the data, so none remains to replace one.
    """
    paths = {digest: path for record in records for digest, path in zip(record.digests, record.images, strict=True)}
    if not can_shuffle(records):
        raise DataError(
            "the shuffled-picture control needs more different pictures than any record has, and at least two; the "
            f"data have {len(paths)}. Leave the control out, or evaluate on more data."
        )
    ring = [sorted(paths)[index] for index in np.random.default_rng(seed).permutation(len(paths))]
    indices = {digest: index for index, digest in enumerate(ring)}

    def swapped(record: Record) -> Record:
        donors = [
            next(donor for donor in ring[indices[digest] - 1 :: -1] + ring[::-1] if donor not in record.digests)
            for digest in record.digests
        ]
        return replace(record, images=tuple(paths[donor] for donor in donors), digests=tuple(donors))

    return tuple(swapped(record) for record in records)
