"""Text of numbers, durations, sizes and ranks, for the sentences and tables of the report."""

import math
from collections.abc import Mapping

NOTHING = "\u2013"  # an en dash, for a number that is not there
_MINUS, _NARROW_SPACE = "\u2212", "\u202f"


def number(value: float | None, digits: int = 3) -> str:
    """A number with some significant digits and a minus sign (U+2212); an en dash for None.

    >>> number(0.12345), number(12345.6), number(-2.0), number(None)
    ('0.123', '12\\u202f346', '−2.00', '–')
    """
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _grouped(f"{value:,.{min(decimals, 8)}f}").replace("-", _MINUS)


def count(value: float | None) -> str:
    """A whole number, with narrow spaces between thousands from five digits on.

    >>> count(18000.0), count(4096), count(None)
    ('18\\u202f000', '4096', '–')
    """
    return NOTHING if value is None else _grouped(f"{round(value):,}")


def _grouped(text: str) -> str:
    """Commas between thousands become narrow spaces, or nothing where there are only four digits."""
    return text.replace(",", "" if len(text.split(".")[0].lstrip("-")) <= 5 else _NARROW_SPACE)


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one as percent.

    >>> percent(0.8349), percent(1.0, 0)
    ('83.5%', '100%')
    """
    return NOTHING if share is None else f"{100 * share:.{digits}f}%"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units of h, min and s.

    >>> duration(7.25), duration(754), duration(9000)
    ('7.2 s', '12 min 34 s', '2 h 30 min')
    """
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def size(num_bytes: float | None) -> str:
    """Bytes in MiB or GiB.

    >>> size(3 * 2**30), size(52 * 2**20)
    ('3.0 GiB', '52 MiB')
    """
    if num_bytes is None:
        return NOTHING
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def ranks_text(ranks: Mapping[str, int] | None) -> str:
    """Ranks on one line, without frozen modules.

    >>> ranks_text({"vision": 8, "projector": 0, "llm": 32})
    'vision 8, llm 32'
    """
    return ", ".join(f"{module} {rank}" for module, rank in (ranks or {}).items() if rank)


def listing(items: list[str]) -> str:
    """Items as an English list.

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
