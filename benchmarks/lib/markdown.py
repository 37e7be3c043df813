"""Tables and numbers as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""Part of a JSON document."""


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown; a column is there if any row has it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(value: object) -> str:
    """A value as text that can't end its cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = number(value) if isinstance(value, int | float) else str(value)
    return " ".join(text.split()).replace("|", r"\|")


def number(value: float) -> str:
    """Whole numbers in full up to a million; others with four digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share in whole percent."""
    return "under 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def listed(values: Iterable[object]) -> str:
    """Values with commas, and an "and" before the last."""
    *most, last = [cell(value) for value in values]
    return f"{', '.join(most)} and {last}" if most else last


def columns(rows: Iterable[Row], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Some columns of rows, in the order of `names`, which maps those of the rows to what the page calls them."""
    return [{shown: row.get(name) for name, shown in names.items()} for row in rows]
