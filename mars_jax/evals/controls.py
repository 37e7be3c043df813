"""Controls of an evaluation: batches without pictures, or with the pictures of other samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mars_jax.data.batches import Batch
from mars_jax.data.records import Record
from mars_jax.errors import DataError


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
