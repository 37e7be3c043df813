"""Splits: pictures never cross them, they do not depend on the file, and the search cannot see the test set."""

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mars_jax.data.formats.base import Turn
from mars_jax.data.records import Record
from mars_jax.data.splits import Fractions, SearchData, split_of, split_records, splits_of_files
from mars_jax.errors import ConfigError, DataError


def record(number: int, picture: int | None) -> Record:
    images = () if picture is None else (Path(f"{picture}.png"),)
    group = f"text:{number}" if picture is None else f"image:{picture}"
    turns, digests = (Turn("user", "?"), Turn("assistant", "!")), tuple(path.name for path in images)
    return Record(str(number), images, turns, f"data.json item {number}", group, digests)


def test_fractions_hold_and_pictures_stay_together() -> None:
    records = [record(number, number // 5) for number in range(10_000)]
    splits = split_records(records, Fractions(0.7, 0.2, 0.1))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 10_000
    assert len(splits.train) == pytest.approx(7000, abs=300)
    assert len(splits.validation) == pytest.approx(2000, abs=300)
    groups = [{r.group for r in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(len(group) for group in groups) == len(set.union(*groups)) == 2000


def test_split_does_not_depend_on_file_id_or_path_of_a_picture() -> None:
    one = record(1, 5)
    for number in range(20):
        other = replace(one, id=f"id{number}", source="elsewhere", images=(Path(f"/moved/{number}.png"),))
        assert split_of(other, Fractions()) == split_of(one, Fractions())
    # Fixed for ever: a change here would move the test set of every user.
    counts = Counter(split_of(record(number, None), Fractions()) for number in range(1000))
    assert counts == {"train": 792, "validation": 93, "test": 115}


def test_search_data_has_no_test_set() -> None:
    assert {field.name for field in fields(SearchData)} == {"train", "validation"}


def test_empty_split_is_an_error() -> None:
    with pytest.raises(DataError, match=r"split is empty \(records: train \d, validation \d, test \d\). Give more pic"):
        split_records([record(0, 0), record(1, 0)], Fractions())
    with pytest.raises(DataError, match="the test split is empty"):
        splits_of_files([record(0, 0)], [record(1, 1)], [])


def test_explicit_files_may_not_share_a_picture() -> None:
    with pytest.raises(
        DataError, match=r"item 2 \(id '2'\) in test has the same picture as data.json item 0 .* in train"
    ):
        splits_of_files([record(0, 0)], [record(1, 1)], [record(2, 0)])


def test_no_picture_of_several_may_be_shared() -> None:
    several = replace(record(5, 0), images=(Path("0.png"), Path("3.png")), digests=("0.png", "3.png"))
    with pytest.raises(DataError, match=r"item 2 .* in test has the same picture as .* in train: 3\.png"):
        splits_of_files([several], [record(1, 1)], [record(2, 3)])


def test_explicit_files_keep_records_and_may_repeat_default_ids_of_text() -> None:
    splits = splits_of_files([record(0, None), record(1, 1), record(2, 1)], [record(0, None)], [record(3, 3)])
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [3, 1, 1]


@pytest.mark.parametrize("fractions", [(0.9, 0.2, 0.1), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_are_checked(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="they must sum to 1"):
        Fractions(*fractions)
