"""JSON objects that other programs wrote: files are read within bounds, values checked against a declared schema."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mars_jax.errors import ConfigError
from mars_jax.runtime.faults import Location, innermost, location_of, value_at
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.text import json_type, short

# An index of a large checkpoint has some megabytes, nested a few levels.
_MAX_BYTES = 2**26
_MAX_DEPTH = 64
_MOST_FAULTS = 5

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a text",
}
_BOUNDS = {
    "ge": "{} or more",
    "gt": "more than {}",
    "le": "{} or less",
    "lt": "less than {}",
    "max_length": "at most {} items",
    "min_length": "{} or more items",
}
_MISSING = "is missing"


class Settings(BaseModel):
    """Base class of schemas: types are strict, numbers finite, and keys that a schema does not name are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


def read_json_object(path: Path) -> Document:
    """Reads a file that holds a JSON object.

    Raises:
        ConfigError: the file cannot be read, is too large or too deeply nested, or is not a JSON object.
    """
    again = "Fetch the file again."
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: is not there, or no regular file. {again}")
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ConfigError(f"{path}: has {size} bytes; at most {_MAX_BYTES} are read. {again}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}. {again}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply; at most {_MAX_DEPTH} levels are read. {again}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an integer of thousands of digits
        raise ConfigError(f"{path}: cannot be read: {error}. {again}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {json_type(value)}; an object is needed. {again}")
    if _depth(value) > _MAX_DEPTH:
        raise ConfigError(f"{path}: is nested too deeply; at most {_MAX_DEPTH} levels are read. {again}")
    return value


def checked(schema: type[SettingsT], values: object, source: str, section: str = "") -> SettingsT:
    """Checks parsed JSON against a schema.

    Args:
        schema: the schema.
        values: the parsed JSON.
        source: path of the file, for error messages.
        section: where in the file the values are, as a dotted key; "" for the whole file.

    Raises:
        ConfigError: values are missing, of another type or out of range; the message names each by its key.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = _faults(error.errors(include_url=False), values, section)
    more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
    raise ConfigError(f"{source}: {'; '.join(faults[:_MOST_FAULTS])}{more}. {belongs(source)}")


def refusal(source: str, key: str, value: object, expected: str) -> ConfigError:
    """The error for one value of a file that cannot be used."""
    return ConfigError(f"{source}: {key} is {shown(value)}; {expected}. {belongs(source)}")


def key_in(section: str, *names: object) -> str:
    """The dotted key of something in a section of a file; "" is the whole file."""
    return ".".join(filter(None, (section, *map(str, names))))


def belongs(source: str) -> str:
    """What to do about a file that cannot be used."""
    return f"Take the {Path(source).name} that belongs to the checkpoint."


def shown(value: object) -> str:
    """A JSON value in a message, shortened."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return short(value)


def _faults(errors: Sequence[ErrorDetails], values: object, section: str) -> list[str]:
    """A text for each faulty key; what the branches of a union expect is joined."""
    expected: dict[Location, list[str]] = {}
    for error in errors:
        expected.setdefault(location_of(error, values), []).append(_expectation(error))
    texts = []
    for keys in innermost(expected):
        name = key_in(section, *keys) or "the file"
        must = _joined(expected[keys])
        texts.append(f"{name} is missing" if must == _MISSING else f"{name} is {shown(value_at(values, keys))}; {must}")
    return texts


def _joined(expectations: Sequence[str]) -> str:
    """What the branches of a union expect, as one phrase."""
    *first, last = dict.fromkeys(expectations)
    return " or ".join([*(text.removesuffix(" expected") for text in first), last])


def _expectation(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return _MISSING
    if kind == "literal_error":
        return f"this version supports {context['expected'].replace('False', 'false').replace('True', 'true')}"
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    for name, words in _BOUNDS.items():
        if name in context:
            bound = context[name]
            whole = isinstance(bound, float) and bound.is_integer()
            return f"{words.format(int(bound) if whole else bound)} expected"
    return f"{_EXPECTED.get(kind, error['msg'].removeprefix('Input should be '))} expected"


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
