"""Shows the result of a command to a person: any JSON-like document as tables. It computes nothing."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def tables(result: Mapping[str, Any], title: str = "") -> Iterator["Table"]:
    """Yields the tables that show `result`.

    Single values come first, in one table of names and values. A list of records, or a mapping whose values all are
    records, becomes a table of its own with a row each; other mappings are shown in the same way, under their name.
    """
    values: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for name, value in result.items():
        (nested if _is_nested(value) else values)[name] = value
    if values:
        yield _table(title, [{"": name, " ": value} for name, value in values.items()])
    for name, value in nested.items():
        path = f"{title}.{name}" if title else name
        if isinstance(value, list):
            yield _table(path, value)
        elif all(isinstance(row, Mapping) for row in value.values()):
            yield _table(path, [{"": key, **row} for key, row in value.items()])
        else:
            yield from tables(value, path)


def check_tables(result: Mapping[str, Any]) -> Iterator["Table"]:
    """The tables of `mars check`: what the model is to learn of a sample's text stands out in it."""
    from rich.text import Text

    def marked(sample: Mapping[str, Any]) -> dict[str, Any]:
        text = Text(sample["text"], style="dim")
        for start, end in sample["learned"]:
            text.stylize("not dim bold green", start, end)
        return {"id": sample["id"], "text": text, "learned": sample["supervised"]}

    return tables({**result, "samples": [marked(sample) for sample in result["samples"]]})


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        # `{"vision": 8, "llm": 32}` reads best on one line.
        return len(value) > 4 or any(isinstance(item, Mapping | list) for item in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _table(title: str, rows: list[Mapping[str, Any]]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(
        title=Text(title) if title else None,
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
        table.add_column(Text(header), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = (row.get(name) for name in columns)
        table.add_row(*(cell if isinstance(cell, Text) else Text(_text(cell)) for cell in cells))
    return table


def _text(value: Any) -> str:
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
