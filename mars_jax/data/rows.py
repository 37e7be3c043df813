"""Reads files of samples into rows: JSON lists, JSON lines, parquet, and folders of published data sets.

The split of a folder follows a `#`: `ScienceQA#train`. `formats` interprets the rows.

A folder holds parquet files whose names begin with that of a split (as on the Hugging Face hub), or the files of
ScienceQA (problems.json, pid_splits.json, images/) or LLaVA-Bench (questions and GPT-4's answers, images/).
"""

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path

from mars_jax.errors import DataError
from mars_jax.hub.paths import local

# Questions and answers of LLaVA-Bench: in the wild, and on COCO.
_BENCH = (("questions.jsonl", "answers_gpt4.jsonl"), ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl"))


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed but unchecked entry.

    Attributes:
        number: index among the rows of its file, from 0.
        source: "file:line" or "file item N", for messages.
        value: the parsed value; only a JSON object can become a record.
    """

    number: int
    source: str
    value: object

    @property
    def id(self) -> str:
        """Its `id`, `question_id` or `index`, else "item-N"."""
        row = self.value if isinstance(self.value, dict) else {}
        ids = (row.get(key) for key in ("id", "question_id", "index"))
        return next((str(value) for value in ids if value is not None), f"item-{self.number}")

    def fault(self, what: str) -> str:
        """A message that names the row and its fault."""
        return f"{self.source} (id {self.id!r}): {what}"


def read_rows(path: Path) -> tuple[list[Row], list[str], Path]:
    """Reads a file or a folder.

    Args:
        path: a file, `folder` or `folder#split`; or an address on the hub, see `hub.paths`.

    Returns:
        The rows that parse, a fault for each line that does not, and the folder that picture paths are relative to.

    Raises:
        DataError: the file does not exist or cannot be read, or the folder has no such split.
    """
    path, split = _path_and_split(path)
    if path.is_dir():
        return _folder(path, split)
    if split:
        raise DataError(f"{path}: is no folder, so it has no split {split!r}. Leave out `#{split}`.")
    if path.suffix == ".parquet":
        return _parquet([path]), [], path.parent
    text = _text(path)
    return *(_lines(path, text) if path.suffix == ".jsonl" else (_list(path, text), [])), path.parent


def source_files(path: Path) -> list[Path]:
    """The existing files that `read_rows` reads, pictures excluded."""
    path, split = _path_and_split(path)
    if not path.is_dir():
        files = [path]
    elif (path / "problems.json").is_file():
        files = [path / "problems.json", path / "pid_splits.json"]
    else:
        files = [path / name for pair in _BENCH for name in pair]
        files += [file for file in _parquet_files(path) if split in ("", _split_of(file))]
    return [file for file in files if file.is_file()]


def _path_and_split(path: Path) -> tuple[Path, str]:
    """The local path, and the split after its `#`, or ""."""
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


def _json(path: Path, text: str) -> object:
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
        problem = f"there is no split {split!r}" if split else "the split is not given"
        raise DataError(f"{path}: {problem}. Write one of {', '.join(f'{path.name}#{name}' for name in splits)}.")
    return split


def _scienceqa(path: Path, split: str) -> list[Row]:
    """The original files: problems by number, and the numbers of each split."""
    problems, splits = (_object(path / name) for name in ("problems.json", "pid_splits.json"))
    numbers = splits[_split(path, split, sorted(splits))]
    if not isinstance(numbers, list):
        raise DataError(
            f"{path}: a split of pid_splits.json is {reprlib.repr(numbers)}; a list of problems' numbers is expected. "
            "Fetch both."
        )
    absent = [str(number) for number in numbers if number not in problems]
    if absent:
        raise DataError(
            f"{path}: problems.json has no {', '.join(absent[:5])}, which pid_splits.json lists. Fetch both."
        )
    rows = []
    for index, number in enumerate(numbers):
        problem = problems[number]
        if isinstance(problem, dict):
            image = problem.get("image") and f"{problem.get('split', split)}/{number}/{problem['image']}"
            problem = {**problem, "id": number, "image": image}
        rows.append(Row(index, f"problems.json {number}", problem))
    return rows


def _object(path: Path) -> dict[str, object]:
    document = _json(path, _text(path))
    if not isinstance(document, dict):
        raise DataError(f"{path}: the file holds a JSON {type(document).__name__}; an object is expected. Fetch both.")
    return document


def _bench(questions: Path, answers: Path) -> tuple[list[Row], list[str]]:
    """Questions joined with their reference answers, as LLaVA's rows."""
    question_rows, faults = _lines(questions, _text(questions))
    replies, more = _lines(answers, _text(answers))
    by_id = {row.id: row.value.get("text") for row in replies if isinstance(row.value, dict)}
    rows = []
    for row in question_rows:
        reply = by_id.get(row.id)
        if not (isinstance(reply, str) and isinstance(row.value, dict)):
            faults.append(row.fault(f"{answers.name} has no answer to it. Fetch both files again."))
            continue
        question = str(row.value.get("text"))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        rows.append(Row(row.number, row.source, {**row.value, "conversations": turns}))
    return rows, faults + more
