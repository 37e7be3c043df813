"""How values and texts that strangers wrote are shown: shortened, by their type, control characters written out."""

import re
import reprlib
from collections.abc import Sequence

# C0 without tab and newline, DEL and C1; marks that turn the direction of a text; line separators; lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_REPR = reprlib.Repr()
_REPR.maxlevel = 4
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 12
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def visible(text: str) -> str:
    r"""A text whose control characters are written as escapes, so that a terminal or a page shows and obeys none.

    Newlines and tabs stay.

    >>> visible("red\x1b[2J\n"), visible("\u202etxt")
    ('red\\x1b[2J\n', '\\u202etxt')
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def first_of(names: Sequence[str], number: int = 5) -> str:
    """The first of some names, and how many more there are.

    >>> first_of(["a", "b", "c"], number=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def short(value: object) -> str:
    """A value as Python writes it, cut to what fits a message."""
    return _REPR.repr(value)


def readable(name: str, most: int) -> str:
    r"""A name as it is if it can be printed and has at most so many characters, else as `short` writes it.

    >>> readable("a.png", 8), readable("a\x1b.png", 8)
    ('a.png', "'a\\x1b.png'")
    """
    return name if name.isprintable() and len(name) <= most else short(name)


_JSON_TYPES = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}


def json_type(value: object) -> str:
    """The type of a value in the words of JSON.

    >>> [json_type(value) for value in (None, True, 1, 0.5, "1", [1], {})]
    ['null', 'boolean', 'number', 'number', 'text', 'list', 'object']
    """
    return "null" if value is None else _JSON_TYPES.get(type(value), type(value).__name__)
