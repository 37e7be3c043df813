"""Files of samples to rows: JSON lists, JSON lines, parquet, and the folders that data sets come in.

Which split of a folder is meant follows a `#`: `ScienceQA#train`. What a row says is for `formats`.

A folder holds parquet files that begin with the name of a split (as the Hugging Face hub has them), or is that of
ScienceQA (problems.json, pid_splits.json, images/), or of LLaVA-Bench (questions and GPT-4's answers, images/).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mars_jax.errors import DataError
from mars_jax.hub.paths import local

# Questions and answers of LLaVA-Bench: in the wild, and on COCO.
_BENCH = (("questions.jsonl", "answers_gpt4.jsonl"), ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl"))


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed but unchecked entry.

    Attributes:
        number: among those of its file, from 0.
        source: "file:line" or "file item N", for messages.
        value: what was parsed.
    """

    number: int
    source: str
    value: Any

    @property
    def id(self) -> str:
        """Its own, whatever it is called, or "item-N"."""
        given = (self.value.get(key) for key in ("id", "question_id", "index")) if isinstance(self.value, dict) else ()
        return next((str(value) for value in given if value is not None), f"item-{self.number}")

    def fault(self, what: str) -> str:
        """A line on what is wrong with it."""
        return f"{self.source} (id {self.id!r}): {what}"


def read_rows(path: Path) -> tuple[list[Row], list[str], Path]:
    """Reads a file or a folder.

    Args:
        path: the file, or `folder` or `folder#split`; also an address on the hub, see `hubfiles`.

    Returns:
        The rows that parse, a fault for each line that doesn't, and the folder that paths of pictures start from.

    Raises:
        DataError: nothing there, nothing readable, or a split that there isn't.
    """
    path, split = _place(path)
    if path.is_dir():
        return _folder(path, split)
    if split:
        raise DataError(f"{path}: is no folder, so it has no split {split!r}. Leave out `#{split}`.")
    if path.suffix == ".parquet":
        return _parquet([path]), [], path.parent
    text = _text(path)
    return *(_lines(path, text) if path.suffix == ".jsonl" else (_list(path, text), [])), path.parent


def source_files(path: Path) -> list[Path]:
    """The files that `read_rows` would read, those that are there; pictures aren't among them."""
    path, split = _place(path)
    if not path.is_dir():
        files = [path]
    elif (path / "problems.json").is_file():
        files = [path / "problems.json", path / "pid_splits.json"]
    else:
        files = [path / name for pair in _BENCH for name in pair]
        files += [file for file in _parquet_files(path) if split in ("", _split_of(file))]
    return [file for file in files if file.is_file()]


def _place(path: Path) -> tuple[Path, str]:
    """A path of this machine, and the split after its `#`."""
    path = local(path)
    if "#" not in path.name or path.exists():
        return path, ""
    name, _, split = path.name.rpartition("#")
    return path.parent / name, split


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the path in the configuration.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a readable JSON or JSONL file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " For one object on each line, name the file .jsonl." if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno} ({error.msg}). Mend it there.{hint}"
        ) from error


def _list(path: Path, text: str) -> list[Row]:
    values = _json(path, text)
    if not isinstance(values, list):
        raise DataError(f"{path}: the file holds a JSON {type(values).__name__}; a list of records is expected.")
    return [Row(number, f"{path.name} item {number}", value) for number, value in enumerate(values)]


def _lines(path: Path, text: str) -> tuple[list[Row], list[str]]:
    rows, faults = [], []
    # Not splitlines(): JSON strings may hold other Unicode line ends.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for row_number, (line_number, line) in enumerate(lines):
        source = f"{path.name}:{line_number}"
        try:
            rows.append(Row(row_number, source, json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append(f"{source}: not valid JSON at column {error.colno} ({error.msg}). Mend or remove the line.")
    return rows, faults


def _parquet(paths: list[Path]) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    rows: list[Row] = []
    for path in paths:
        try:
            values = parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as parquet ({error}). Fetch the file again.") from error
        rows += [Row(len(rows) + n, f"{path.name} item {n}", value) for n, value in enumerate(values)]
    return rows


def _folder(path: Path, split: str) -> tuple[list[Row], list[str], Path]:
    if (path / "problems.json").is_file():
        return _scienceqa(path, split), [], path / "images"
    for questions, answers in _BENCH:
        if (path / questions).is_file():
            return *_bench(path / questions, path / answers), path / "images"
    files = _parquet_files(path)
    if not files:
        raise DataError(
            f"{path}: cannot be read: a folder with neither parquet files nor those of ScienceQA (problems.json) or "
            "LLaVA-Bench (questions.jsonl). Give the file with the samples."
        )
    chosen = _split(path, split, sorted({_split_of(file) for file in files}))
    return _parquet([file for file in files if _split_of(file) == chosen]), [], path


def _parquet_files(path: Path) -> list[Path]:
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


def _split_of(file: Path) -> str:
    return file.stem.split("-")[0]


def _split(path: Path, split: str, splits: list[str]) -> str:
    if not split and len(splits) == 1:
        return splits[0]
    if split not in splits:
        asked = f"there is no split {split!r}" if split else "which split is meant isn't said"
        raise DataError(f"{path}: {asked}. Write one of {', '.join(f'{path.name}#{name}' for name in splits)}.")
    return split


def _scienceqa(path: Path, split: str) -> list[Row]:
    """The original files: problems by number, and the numbers of each split."""
    problems, splits = (_json(path / name, _text(path / name)) for name in ("problems.json", "pid_splits.json"))
    numbers = splits[_split(path, split, sorted(splits))]
    absent = [number for number in numbers if number not in problems]
    if absent:
        raise DataError(
            f"{path}: problems.json has no {', '.join(absent[:5])}, which pid_splits.json lists. Fetch both."
        )
    rows = []
    for place, number in enumerate(numbers):
        problem = problems[number]
        image = problem.get("image") and f"{problem.get('split', split)}/{number}/{problem['image']}"
        rows.append(Row(place, f"problems.json {number}", {**problem, "id": number, "image": image}))
    return rows


def _bench(questions: Path, answers: Path) -> tuple[list[Row], list[str]]:
    """Questions joined with their reference answers, as LLaVA's rows."""
    asked, faults = _lines(questions, _text(questions))
    replies, more = _lines(answers, _text(answers))
    by_id = {row.id: row.value.get("text") for row in replies if isinstance(row.value, dict)}
    rows = []
    for row in asked:
        reply = by_id.get(row.id)
        if not (isinstance(reply, str) and isinstance(row.value, dict)):
            faults.append(row.fault(f"{answers.name} has no answer to it. Fetch both files again."))
            continue
        question = str(row.value.get("text"))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        rows.append(Row(row.number, row.source, {**row.value, "conversations": turns}))
    return rows, faults + more
