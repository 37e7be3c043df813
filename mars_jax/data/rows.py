"""Reads files and folders of samples into rows; `formats` interprets them.

The split of a folder follows a `#`: `ScienceQA#train`. A folder holds parquet or Arrow files whose names begin with
that of a split (as on the Hugging Face hub), a data set as `datasets` saves it, or the files of ScienceQA
(problems.json, pid_splits.json, images/) or LLaVA-Bench (questions and GPT-4's answers, images/).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mars_jax.data.files.json_text import read_json, read_lines, read_samples
from mars_jax.data.files.row import MAX_ID, Row, Rows, check_readable, facts_of, is_folder
from mars_jax.data.files.tables import read_arrow, read_csv, read_parquet
from mars_jax.errors import DataError
from mars_jax.hub.paths import local
from mars_jax.runtime.text import json_type, readable, short

# Questions and answers of LLaVA-Bench: in the wild, and on COCO.
_BENCH = (("questions.jsonl", "answers_gpt4.jsonl"), ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl"))
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_TABLES = (".parquet", ".arrow")
_FILES = (".json", ".jsonl", ".csv", ".tsv", *_TABLES)


class _Layout(NamedTuple):
    """What the samples of a folder are read from.

    Attributes:
        files: all files that are read, pictures excluded.
        read: reads them.
    """

    files: Sequence[Path]
    read: Callable[[], Rows]


def read_rows(path: Path) -> Rows:
    """Reads a file or a folder.

    Args:
        path: a file, `folder` or `folder#split`; or an address on the hub, see `hub.paths`.

    Raises:
        DataError: the file does not exist or cannot be read, or the folder has no such split.
    """
    path, split = _path_and_split(path)
    if is_folder(path):
        return _layout(path, split).read()
    if split:
        raise DataError(f"{path}: is no folder, so it has no split {split!r}. Leave out `#{split}`.")
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return Rows(_read_tables([path]), path.parent)
    reader = read_csv if suffix in (".csv", ".tsv") else read_samples
    rows, faults, notes = reader(path)
    return Rows(rows, path.parent, faults, notes)


def source_files(path: Path) -> list[Path]:
    """The existing files that `read_rows` reads, pictures excluded.

    Raises:
        DataError: what is there is no regular file that can be read.
    """
    path, split = _path_and_split(path)
    if facts_of(path) is None:
        return []
    if not is_folder(path):
        check_readable(path)
        return [path]
    return [file for file in _layout(path, split).files if file.is_file()]


def _path_and_split(path: Path) -> tuple[Path, str]:
    """The local path, and the split after its `#`, or ""."""
    path = local(path)
    if "#" not in path.name or facts_of(path) is not None:
        return path, ""
    name, _, split = path.name.rpartition("#")
    return path.parent / name, split


def _read_tables(paths: list[Path]) -> list[Row]:
    """The rows of parquet or Arrow files; their names end alike."""
    return (read_parquet if paths[0].suffix.lower() == ".parquet" else read_arrow)(paths)


def _layout(path: Path, split: str) -> _Layout:
    """The layout of a folder: the first of the known ones whose files it has.

    Raises:
        DataError: it is a data set that `datasets` saved, without such a split or with a broken list of files.
    """
    if (path / "problems.json").is_file():
        return _Layout([path / "problems.json", path / "pid_splits.json"], partial(_scienceqa, path, split))
    for questions, answers in _BENCH:
        if (path / questions).is_file():
            return _Layout([path / questions, path / answers], partial(_bench, path / questions, path / answers, split))
    if saved := _saved_folder(path, split):
        tables = _saved_files(saved)
        return _Layout([path / _SPLITS, saved / _STATE, *tables], lambda: Rows(read_arrow(tables), path))
    files = _table_files(path)
    return _Layout([file for file in files if split in ("", _split_of(file))], partial(_tables, path, split, files))


def _tables(path: Path, split: str, files: Sequence[Path]) -> Rows:
    if not files:
        raise DataError(f"{path}: cannot be read: {_what_is_in(path)}")
    chosen = _split(path, split, sorted({_split_of(file) for file in files}))
    return Rows(_read_tables([file for file in files if _split_of(file) == chosen]), path)


def _what_is_in(path: Path) -> str:
    """What a folder without samples has instead, and what to give."""
    try:
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _FILES)
    except OSError as error:
        return f"{error.strerror}. Give a folder that can be read."
    if files:
        return f"a folder whose samples are in files. Give one of {', '.join(files[:5])}."
    below = [f"*/*{suffix}" for suffix in _FILES] + ["*/data/*.parquet", "*/*/*.parquet"]
    folders = sorted({found.relative_to(path).parts[0] for pattern in below for found in path.glob(pattern)})
    if folders:
        return f"a folder without samples, but with folders that may have some. Give one of {', '.join(folders[:5])}."
    return (
        "a folder with neither parquet files nor those of ScienceQA (problems.json) or LLaVA-Bench (questions.jsonl). "
        "Give the file with the samples."
    )


def _table_files(path: Path) -> list[Path]:
    """The parquet files of a folder; where there are none, its Arrow files."""
    for suffix in _TABLES:
        files = sorted([*path.glob(f"*{suffix}"), *path.glob(f"data/*{suffix}")])
        if files:
            return files
    return []


def _split_of(file: Path) -> str:
    return file.stem.split("-")[0]


def _split(path: Path, split: str, splits: list[str]) -> str:
    if not split and len(splits) == 1:
        return splits[0]
    if split not in splits:
        problem = f"there is no split {split!r}" if split else "the split is not given"
        raise DataError(f"{path}: {problem}. Write one of {', '.join(f'{path.name}#{name}' for name in splits)}.")
    return split


def _saved_folder(path: Path, split: str) -> Path | None:
    """The folder of a split that `datasets` saved, or None if it saved none here."""
    if (path / _SPLITS).is_file():
        return path / _split(path, split, sorted(file.parent.name for file in path.glob(f"*/{_STATE}")))
    if not (path / _STATE).is_file():
        return None
    if split:
        raise DataError(f"{path}: is a saved data set without splits. Leave out `#{split}`.")
    return path


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved, by its state.json."""
    state = _object(folder / _STATE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder / _STATE}: the data set was saved with an order or a choice of its own ('_indices_data_files'), "
            "which is not read. Save it again with a newer version of datasets, which writes the rows themselves."
        )
    listed = state.get("_data_files")
    names = (
        [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
        if isinstance(listed, list)
        else []
    )
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(
            f"{folder / _STATE}: '_data_files' is {short(listed)}; a list of files is expected. Save it again."
        )
    return [folder / str(name) for name in names]


def _scienceqa(path: Path, split: str) -> Rows:
    """The original files: problems by number, and the numbers of each split."""
    problems, splits = (_object(path / name) for name in ("problems.json", "pid_splits.json"))
    numbers = splits[_split(path, split, sorted(splits))]
    if not isinstance(numbers, list) or not all(isinstance(number, str) for number in numbers):
        raise DataError(
            f"{path}: a split of pid_splits.json is {short(numbers)}; a list of problems' numbers is expected. "
            "Fetch the file again."
        )
    absent = [number for number in numbers if number not in problems]
    if absent:
        names = ", ".join(readable(number, MAX_ID) for number in absent[:5])
        raise DataError(f"{path}: problems.json has no {names}, which pid_splits.json lists. Fetch both files again.")
    rows = []
    for index, number in enumerate(numbers):
        problem = problems[number]
        if isinstance(problem, dict):
            values = {key: value for key, value in problem.items() if key != "split"}
            image = problem.get("image") and f"{problem.get('split', split)}/{number}/{problem['image']}"
            problem = {**values, "id": number, "image": image}
        rows.append(Row(index, f"problems.json {number}", problem))
    return Rows(rows, path / "images")


def _object(path: Path) -> dict[str, object]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: the file holds a JSON {json_type(document)}; an object is expected. Fetch the file again."
        )
    return document


def _bench(questions: Path, answers: Path, split: str) -> Rows:
    """Questions joined with their reference answers, as LLaVA's rows."""
    if split:
        raise DataError(f"{questions.parent}: is LLaVA-Bench, which has no splits. Leave out `#{split}`.")
    asked, faults, notes = read_lines(questions)
    replies, more, other_notes = read_lines(answers)
    by_id = {row.id: row.value.get("text") for row in replies if isinstance(row.value, dict)}
    rows = []
    for row in asked:
        reply = by_id.get(row.id)
        question = row.value.get("text") if isinstance(row.value, dict) else None
        if not (isinstance(reply, str) and isinstance(question, str) and isinstance(row.value, dict)):
            fault = f"{answers.name} has no answer to it. Fetch both files again."
            faults.append(row.fault(fault if isinstance(question, str) else "'text' is no text. Fetch the file again."))
            continue
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        values = {key: value for key, value in row.value.items() if key != "text"}
        rows.append(Row(row.number, row.source, {**values, "conversations": turns}))
    return Rows(rows, questions.parent / "images", [*faults, *more], [*notes, *other_notes])
