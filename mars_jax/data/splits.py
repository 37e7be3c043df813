"""Train, validation and test splits that share no picture.

Search code receives `SearchData`, which has no test split.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mars_jax.data.records import Record
from mars_jax.errors import ConfigError, DataError

SplitName = Literal["train", "validation", "test"]

# Part of the definition of the splits: another salt would move records between them.
_SALT = "mars_jax splits 1:"


@dataclass(frozen=True, slots=True)
class Fractions:
    """Fractions of the pictures in each split.

    They sum to 1. That of train is positive; the others are 0 where a file gives the split.

    Raises:
        ConfigError: the fractions break these conditions.
    """

    train: float = 0.8
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.test)
        if self.train <= 0 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(
                f"split fractions are train {self.train}, validation {self.validation}, test {self.test}; they must "
                "sum to 1, train above 0 and none below."
            )


@dataclass(frozen=True, slots=True)
class SearchData:
    """The data that probes, fits and strategies may see."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three splits, as checked by `split_records` or `splits_of_files`."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]


def split_of(record: Record, fractions: Fractions) -> SplitName:
    """The split of a record: a fixed function of its picture's bytes (or of its id, for text alone).

    Records that share a picture are in one split, independent of the file's order and name. If every record has one
    picture, a record's split does not depend on the other records; a record with several pictures merges the groups of
    its pictures, which may move them.
    """
    digest = hashlib.sha256((_SALT + record.group).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < fractions.train:
        return "train"
    return "validation" if position < fractions.train + fractions.validation else "test"


def split_records(records: Sequence[Record], fractions: Fractions) -> Splits:
    """Splits one data set by the hash of its pictures.

    Raises:
        DataError: a split is empty.
    """
    names = [split_of(record, fractions) for record in records]
    parts: dict[SplitName, tuple[Record, ...]] = {
        split: tuple(record for record, name in zip(records, names, strict=True) if name == split)
        for split in ("train", "validation", "test")
    }
    return _checked(Splits(**parts), hint="Give more pictures, larger fractions, or explicit files")


def splits_of_files(train: Sequence[Record], validation: Sequence[Record], test: Sequence[Record]) -> Splits:
    """The splits of three files, each taken whole.

    Raises:
        DataError: a split is empty, or two share a picture (compared by the bytes of the file).
    """
    splits = _checked(Splits(tuple(train), tuple(validation), tuple(test)), hint="Give each split a file with records")
    first_use: dict[str, tuple[str, Record]] = {}
    for name, records in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        for record in records:
            for digest, path in zip(record.digests, record.images, strict=True):
                other_name, other = first_use.setdefault(digest, (name, record))
                if other_name != name:
                    raise DataError(
                        f"{record} in {name} has the same picture as {other} in {other_name}: {path}. A picture may be "
                        "in one split only; move or remove one of the records."
                    )
    return splits


def _checked(splits: Splits, hint: str) -> Splits:
    counts = {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}
    for name, count in counts.items():
        if count == 0:
            listed = ", ".join(f"{other} {number}" for other, number in counts.items())
            raise DataError(f"the {name} split is empty (records: {listed}). {hint}.")
    return splits
