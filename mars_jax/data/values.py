"""Values of rows, as files hold them: which of them are absent, and their types in words."""

import math

_ABSENT_DEPTH = 4


def is_absent(value: object, depth: int = _ABSENT_DEPTH) -> bool:
    """Whether a value is one of those for no value: null, NaN, an empty text, or a list or object of nothing else."""
    if value is None or isinstance(value, str):
        return not value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return not value or (depth > 0 and all(is_absent(item, depth - 1) for item in value))
    return isinstance(value, float) and math.isnan(value)


def kind_of(value: object) -> str:
    """The type of a value in the words of JSON."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
