"""Reads a config file and its overrides into a `Config`, and says in plain words what is wrong with it.

The settings themselves are in `mars_jax.config.schema`. Relative paths, in the file and in overrides alike, are taken
from the folder of the config file; only `run_dir` is taken from the current directory.
"""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mars_jax.config.schema import DEFAULT_MODULES, Config
from mars_jax.errors import ConfigError

__all__ = ["RESOLVED_CONFIG", "Config", "load_config"]

RESOLVED_CONFIG = "config.resolved.yaml"

# A place in the config: ("probe", "steps"), or ("probe", "num_samples", 2) inside a list.
_Place = tuple[str | int, ...]

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
    """Safe YAML that reads `1e-3` as a number; YAML 1.1, and so PyYAML, takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads the settings of a run.

    Args:
        path: a YAML file, or a run directory, whose config is then read with `run_dir` set to that directory.
        overrides: `key.sub=value` texts that win over the file; values are YAML, e.g. `probe.num_samples=[64, 128]`.

    Raises:
        ConfigError: the file can't be read, or a key or value is not allowed. Every fault is listed, with its line.
    """
    path = Path(path)
    file = path / RESOLVED_CONFIG if path.is_dir() else path
    raw, origins = _read(file)
    if path.is_dir():
        raw["run_dir"] = str(path.absolute())
    lora = raw.setdefault("lora", {})
    if isinstance(lora, dict):
        # Filled in before the overrides, so that lora.modules.llm.ranks=[8] changes one default and keeps the others.
        lora.setdefault("modules", copy.deepcopy(dict(DEFAULT_MODULES)))
    for override in overrides:
        place = _override(raw, override)
        origins = {seen: origin for seen, origin in origins.items() if seen[: len(place)] != place}
        origins[place] = f"override {override!r}"
    try:
        return Config.model_validate(raw, context={"folder": file.parent.absolute()})
    except ValidationError as error:
        faults = _faults(error, raw)
    lines = []
    for place, text in faults.items():
        origin = next((origins[place[:n]] for n in range(len(place), 0, -1) if place[:n] in origins), str(file))
        lines.append(f"{origin}: {text}")
    raise ConfigError("\n".join(lines))


def _read(file: Path) -> tuple[dict[str, Any], dict[_Place, str]]:
    """The file's content, and `FILE, line N` for each place in it."""
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
    origins: dict[_Place, str] = {}
    if node is not None:
        _add_origins(node, (), file, origins)
    return raw, origins


def _add_origins(node: yaml.Node, place: _Place, file: Path, origins: dict[_Place, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            origin = f"{file}, line {key.start_mark.line + 1}"
            if here in origins:
                raise ConfigError(f"{origin}: {_dotted(here)} is set twice, first at {origins[here]}. Keep one.")
            origins[here] = origin
            _add_origins(value, here, file, origins)


def _override(raw: dict[str, Any], override: str) -> _Place:
    """Writes one override into `raw` and returns its place."""
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


def _faults(error: ValidationError, raw: Mapping[str, Any]) -> dict[_Place, str]:
    """What is wrong at each place. The kinds that a union would have taken are joined into one sentence."""
    texts: dict[_Place, str] = {}
    wrong: dict[_Place, list[str]] = {}
    for fault in error.errors():
        place = _place(fault["loc"], raw)
        if fault["type"] == "missing":
            place = (*place, fault["loc"][-1])
            texts[place] = f"{_dotted(place)} is missing{_purpose(place)}"
        elif fault["type"] == "extra_forbidden":
            texts[place] = _unknown_key(place)
        elif fault["type"] == "value_error":
            prefix = f"{_dotted(place)}: " if place else ""
            texts[place] = prefix + fault["msg"].removeprefix("Value error, ")
        else:
            allowed = _ALLOWED.get(fault["type"], fault["msg"].removeprefix("Input should be "))
            wrong.setdefault(place, []).append(allowed)
    for place, allowed_here in wrong.items():
        # A union faults both the whole and, in the branch that fits, the part: the part says it all.
        if not any(len(other) > len(place) and other[: len(place)] == place for other in wrong):
            seen: Any = raw
            for name in place:
                seen = seen[name]
            must = " or ".join(dict.fromkeys(allowed_here))
            texts[place] = f"{_dotted(place)} is {_short(seen)} but must be {must}{_purpose(place)}"
    return texts


def _place(loc: Sequence[str | int], raw: Any) -> _Place:
    """pydantic's location without its names of union branches."""
    place: list[str | int] = []
    for part in loc:
        is_index = isinstance(raw, list) and isinstance(part, int)
        if is_index or (isinstance(raw, dict) and part in raw):
            raw = raw[part]
            place.append(part)
    return tuple(place)


def _unknown_key(place: _Place) -> str:
    names = _setting_names(place[:-1])
    unknown = str(place[-1])
    near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.5)
    suggestions = (
        [_dotted((*place[:-1], near[0]))] if near else [p for p in _all_settings() if p.endswith("." + unknown)]
    )
    hint = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
    section = f" in {_dotted(place[:-1])}" if place[:-1] else ""
    return f"unknown key {_dotted(place)}.{hint} Allowed{section}: {', '.join(names)}"


def _all_settings(place: _Place = ()) -> list[str]:
    names = _setting_names(place)
    return [_dotted(place)] if not names else [path for name in names for path in _all_settings((*place, name))]


def _setting_names(place: _Place) -> list[str]:
    kind, _ = _schema(place)
    return list(kind.model_fields) if _is_section(kind) else []


def _purpose(place: _Place) -> str:
    _, description = _schema(place)
    return f" ({description})" if description else ""


def _schema(place: _Place) -> tuple[Any, str]:
    """The declared type at a place, and the description of the setting that it belongs to."""
    kind: Any = Config
    description = ""
    for name in place:
        if _is_section(kind) and name in kind.model_fields:
            description = kind.model_fields[name].description or ""
            kind = kind.model_fields[name].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None, description
    return kind, description


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _dotted(place: _Place) -> str:
    return ".".join(str(name) for name in place)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
