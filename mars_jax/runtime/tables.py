"""Tables of the result of a command, for the terminal: any JSON-like document. Control characters are shown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.text import visible

if TYPE_CHECKING:
    from rich.table import Table

_Nested = Mapping[str, object] | list[Mapping[str, object]]


def tables(result: Mapping[str, object], title: str = "") -> Iterator["Table"]:
    """Yields the tables of a document.

    Single values come first, in one table of names and values. A list of records, or a mapping whose values are all
    records, becomes a table of its own with a row for each; other mappings are shown in the same way, under their name.

    Args:
        result: the document.
        title: of the first table, and the start of all other titles.
    """
    values: dict[str, object] = {}
    nested: dict[str, _Nested] = {}
    for name, value in result.items():
        if _is_nested(value):
            nested[name] = value
        else:
            values[name] = value
    if values:
        yield _table(title, [{"": name, " ": value} for name, value in values.items()])
    for name, part in nested.items():
        path = f"{title}.{name}" if title else name
        if isinstance(part, list):
            yield _table(path, part)
            continue
        rows = [{"": key, **row} for key, row in part.items() if isinstance(row, Mapping)]
        if len(rows) == len(part):
            yield _table(path, rows)
        else:
            yield from tables(part, path)


def check_tables(result: Document) -> Iterator["Table"]:
    """Yields the tables of `mars check`, the supervised part of each sample's text highlighted."""
    from rich.text import Text

    def highlighted(sample: Document) -> dict[str, object]:
        text, done = Text(style="dim"), 0
        for start, end in sample["learned"]:
            text.append(visible(sample["text"][done:start]))
            text.append(visible(sample["text"][start:end]), "not dim bold green")
            done = end
        text.append(visible(sample["text"][done:]))
        return {"id": sample["id"], "text": text, "learned": sample["supervised"]}

    notes = [{"note": text} for text in result["data"]["notes"]]
    samples = [highlighted(sample) for sample in result["samples"]]
    return tables({**result, "data": {**result["data"], "notes": notes}, "samples": samples})


def _is_nested(value: object) -> TypeGuard[_Nested]:
    if isinstance(value, Mapping):
        # `{"vision": 8, "llm": 32}` reads best on one line.
        return len(value) > 4 or any(isinstance(item, Mapping | list) for item in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(
        title=Text(visible(title)) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_header=any(name.strip() for name in columns),
    )
    for name in columns:
        numeric = name.strip() != "" and all(isinstance(row.get(name), int | float | None) for row in rows)
        header = name.replace("_", " ")
        table.add_column(Text(visible(header)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = (row.get(name) for name in columns)
        table.add_row(*(cell if isinstance(cell, Text) else Text(visible(_text(cell))) for cell in cells))
    return table


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if not math.isfinite(value) or abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 1_000_000 else str(value)
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)
