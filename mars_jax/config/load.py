"""Reads a config file and its overrides into a `Config`; lists all errors with their lines.

The settings are declared in `mars_jax.config.schema`. Relative paths, in the file and in overrides, are resolved
against the folder of the config file; only `run_dir` is resolved against the current directory.
"""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mars_jax.config.adapted import DEFAULT_MODULES
from mars_jax.config.schema import Config
from mars_jax.errors import ConfigError
from mars_jax.runtime.jsonfiles import Document

__all__ = ["RESOLVED_CONFIG", "Config", "load_config"]

RESOLVED_CONFIG = "config.resolved.yaml"

# Keys of a setting: ("probe", "steps"), or ("probe", "num_samples", 2) inside a list.
_Location = tuple[str | int, ...]

_ALLOWED = {
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a section of `key: value` lines",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that reads `1e-3` as a number; in YAML 1.1, and so in PyYAML, it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads the settings of a run.

    Args:
        path: a YAML file, or a run directory, whose config is then read with `run_dir` set to that directory.
        overrides: `key.sub=value` texts that replace settings of the file; values are YAML, such as
            `probe.num_samples=[64, 128]`.

    Returns:
        The validated settings.

    Raises:
        ConfigError: the file can't be read, or a key or value is not allowed. Every error is listed, with its line.
    """
    path = Path(path)
    file = path / RESOLVED_CONFIG if path.is_dir() else path
    raw, origins = _read(file)
    if path.is_dir():
        if not raw:
            raise ConfigError(
                f"{file} is empty: it was damaged. Run the command with the config that the run was made with, and "
                f"run_dir={path}: if the settings are the same, it is written again."
            )
        raw["run_dir"] = str(path.absolute())
    lora = raw.setdefault("lora", {})
    if isinstance(lora, dict):
        # Filled in before the overrides, so that lora.modules.llm.ranks=[8] changes one default and keeps the others.
        lora.setdefault("modules", copy.deepcopy(dict(DEFAULT_MODULES)))
    for override in overrides:
        location = _override(raw, override)
        origins = {keys: origin for keys, origin in origins.items() if keys[: len(location)] != location}
        origins[location] = f"override {override!r}"
    try:
        return Config.model_validate(raw, context={"folder": file.parent.absolute()})
    except ValidationError as error:
        faults = _faults(error, raw)
    lines = []
    for location, text in faults.items():
        origin = next(
            (origins[location[:n]] for n in range(len(location), 0, -1) if location[:n] in origins), str(file)
        )
        lines.append(f"{origin}: {text}")
    raise ConfigError("\n".join(lines))


def _read(file: Path) -> tuple[Document, dict[_Location, str]]:
    """The file's content, and the text `FILE, line N` for each setting in it."""
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        raw = {} if node is None else loader.construct_document(node)
    except OSError as error:
        raise ConfigError(
            f"can't read the config {file}: {error.strerror}. Give a YAML file or a run directory."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold `key: value` lines; seen {_short(raw)}")
    origins: dict[_Location, str] = {}
    if node is not None:
        _add_origins(node, (), file, origins)
    return raw, origins


def _add_origins(node: yaml.Node, location: _Location, file: Path, origins: dict[_Location, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*location, key.value)
            origin = f"{file}, line {key.start_mark.line + 1}"
            if child in origins:
                raise ConfigError(f"{origin}: {_dotted(child)} is set twice, first at {origins[child]}. Keep one.")
            origins[child] = origin
            _add_origins(value, child, file, origins)


def _override(raw: Document, override: str) -> _Location:
    """Writes one override into `raw` and returns its keys."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, e.g. probe.steps=200")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    section = raw
    for depth, name in enumerate(names[:-1], start=1):
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            parent = ".".join(names[:depth])
            raise ConfigError(f"override {override!r}: {parent} is {_short(section)}, which has no settings inside")
    section[names[-1]] = value
    return tuple(names)


def _faults(error: ValidationError, raw: Document) -> dict[_Location, str]:
    """Error message of each faulty setting; the types that a union allows are joined into one sentence."""
    texts: dict[_Location, str] = {}
    allowed_types: dict[_Location, list[str]] = {}
    for fault in error.errors():
        location = _location(fault["loc"], raw)
        if fault["type"] == "missing":
            location = (*location, fault["loc"][-1])
            texts[location] = f"{_dotted(location)} is missing{_purpose(location)}"
        elif fault["type"] == "extra_forbidden":
            texts[location] = _unknown_key(location)
        elif fault["type"] == "value_error":
            prefix = f"{_dotted(location)}: " if location else ""
            texts[location] = prefix + fault["msg"].removeprefix("Value error, ")
        else:
            allowed = _ALLOWED.get(fault["type"], fault["msg"].removeprefix("Input should be "))
            allowed_types.setdefault(location, []).append(allowed)
    for location, types in allowed_types.items():
        # A union reports both the whole and, in the branch that fits, the part: the part is enough.
        if not any(len(other) > len(location) and other[: len(location)] == location for other in allowed_types):
            value: Any = raw
            for name in location:
                value = value[name]
            must = " or ".join(dict.fromkeys(types))
            texts[location] = f"{_dotted(location)} is {_short(value)} but must be {must}{_purpose(location)}"
    return texts


def _location(loc: Sequence[str | int], raw: object) -> _Location:
    """pydantic's location without its names of union branches."""
    location: list[str | int] = []
    for part in loc:
        children = dict(enumerate(raw)) if isinstance(raw, list) else raw
        if isinstance(children, dict) and part in children:
            raw = children[part]
            location.append(part)
    return tuple(location)


def _unknown_key(location: _Location) -> str:
    names = _setting_names(location[:-1])
    unknown = str(location[-1])
    near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.5)
    suggestions = (
        [_dotted((*location[:-1], near[0]))] if near else [p for p in _all_settings() if p.endswith("." + unknown)]
    )
    hint = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
    section = f" in {_dotted(location[:-1])}" if location[:-1] else ""
    return f"unknown key {_dotted(location)}.{hint} Allowed{section}: {', '.join(names)}"


def _all_settings(location: _Location = ()) -> list[str]:
    names = _setting_names(location)
    return [_dotted(location)] if not names else [path for name in names for path in _all_settings((*location, name))]


def _setting_names(location: _Location) -> list[str]:
    kind, _ = _schema(location)
    return list(kind.model_fields) if _is_section(kind) else []


def _purpose(location: _Location) -> str:
    _, description = _schema(location)
    return f" ({description})" if description else ""


def _schema(location: _Location) -> tuple[object, str]:
    """Declared type at a location, and the description of its setting."""
    kind: object = Config
    description = ""
    for name in location:
        if _is_section(kind) and name in kind.model_fields:
            description = kind.model_fields[name].description or ""
            kind = kind.model_fields[name].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None, description
    return kind, description


def _is_section(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _dotted(location: _Location) -> str:
    return ".".join(str(name) for name in location)


def _short(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
