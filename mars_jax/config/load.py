"""Reads a config file and its overrides into a `Config`; lists all errors with their lines.

The settings are declared in `mars_jax.config.schema`. Relative paths, in the file and in overrides, are resolved
against the folder of the config file; only `run_dir` is resolved against the current directory.
"""

import copy
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mars_jax.config.adapted import DEFAULT_MODULES
from mars_jax.config.schema import Config
from mars_jax.config.yaml_text import MAX_CHARACTERS, MAX_DEPTH, YamlError, read_yaml
from mars_jax.errors import ConfigError
from mars_jax.runtime.faults import Location, innermost, location_of, value_at
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.text import short

__all__ = ["RESOLVED_CONFIG", "Config", "load_config"]

RESOLVED_CONFIG = "config.resolved.yaml"
_NAME, _PATH = 60, 1000  # characters of a key and of a path in messages
_MOST_FAULTS = 20

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


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads the settings of a run.

    Args:
        path: a YAML file, or a run directory, whose config is then read with `run_dir` set to that directory.
        overrides: `key.sub=value` texts that replace settings of the file; values are YAML, such as
            `probe.num_samples=[64, 128]`.

    Returns:
        The validated settings.

    Raises:
        ConfigError: the file can't be read, or a key or value is not allowed. Faults are listed with their
            lines; of many, the first ones.
    """
    path = Path(path)
    is_run = os.path.isdir(path)  # unlike `Path.is_dir`, false for what can't be a path
    file = path / RESOLVED_CONFIG if is_run else path
    raw, origins = _read(file)
    if is_run:
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
        origins[location] = f"override {short(override)}"
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
    if len(lines) > _MOST_FAULTS:
        lines[_MOST_FAULTS:] = [f"and {len(lines) - _MOST_FAULTS} more"]
    raise ConfigError("\n".join(lines))


def _read(file: Path) -> tuple[Document, dict[Location, str]]:
    """The file's content, and the text `FILE, line N` for each setting in it."""
    try:
        text = _file_text(file)
        document = read_yaml(text)
    except YamlError as error:
        raise ConfigError(error.at(str(file))) from None
    raw = {} if document.value is None else document.value
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold `key: value` lines; seen {_short(raw)}")
    return raw, {location: f"{file}, line {line}" for location, line in document.lines.items()}


def _file_text(file: Path) -> str:
    """Of a regular file: reading a device or a pipe may never end."""
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise ConfigError(f"the config {file} is no regular file. Give a YAML file or a run directory.")
        with file.open(encoding="utf-8") as stream:
            return stream.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise ConfigError(
            f"can't read the config {_cut(file)}: {error.strerror}. Give a YAML file or a run directory."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: the text is not YAML: {error}. Save it as UTF-8.") from None
    except ValueError as error:
        raise ConfigError(
            f"can't read the config {_cut(file)}: {error}. Give a YAML file or a run directory."
        ) from None


def _override(raw: Document, override: str) -> Location:
    """Writes one override into `raw` and returns its keys."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {short(override)} is not of the form key.sub=value, e.g. probe.steps=200")
    if not key.isprintable():
        raise ConfigError(f"override {short(override)}: the key has characters that no setting has")
    if len(names) > MAX_DEPTH:
        raise ConfigError(f"override {short(override)} has {len(names)} names; no setting has more than {MAX_DEPTH}")
    try:
        value = read_yaml(text).value
    except YamlError as error:
        raise ConfigError(error.at(f"override {short(override)}")) from None
    section = raw
    for depth, name in enumerate(names[:-1], start=1):
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            parent = ".".join(names[:depth])
            raise ConfigError(
                f"override {short(override)}: {parent} is {_short(section)}, which has no settings inside"
            )
    section[names[-1]] = value
    return tuple(names)


def _faults(error: ValidationError, raw: Document) -> dict[Location, str]:
    """Error message of each faulty setting; the types that a union allows are joined into one sentence."""
    texts: dict[Location, str] = {}
    allowed_types: dict[Location, list[str]] = {}
    for fault in error.errors():
        location = location_of(fault, raw)
        if fault["type"] == "missing":
            texts[location] = f"{_dotted(location)} is missing{_purpose(location)}"
        elif fault["type"] == "extra_forbidden":
            texts[location] = _unknown_key(location)
        elif fault["type"] == "value_error":
            prefix = f"{_dotted(location)}: " if location else ""
            texts[location] = prefix + fault["msg"].removeprefix("Value error, ")
        else:
            allowed = _ALLOWED.get(fault["type"], fault["msg"].removeprefix("Input should be "))
            if fault["type"] == "too_long":
                allowed = f"a list of at most {fault['ctx']['max_length']} items"
            allowed_types.setdefault(location, []).append(allowed)
    for location in innermost(allowed_types):
        must = " or ".join(dict.fromkeys(allowed_types[location]))
        seen = _short(value_at(raw, location))
        texts[location] = f"{_dotted(location)} is {seen} but must be {must}{_purpose(location)}"
    return texts


def _unknown_key(location: Location) -> str:
    names = _setting_names(location[:-1])
    unknown = str(location[-1])[:_NAME]
    near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.5)
    suggestions = (
        [_dotted((*location[:-1], near[0]))] if near else [p for p in _all_settings() if p.endswith("." + unknown)]
    )
    hint = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
    section = f" in {_dotted(location[:-1])}" if location[:-1] else ""
    return f"unknown key {_dotted(location)}.{hint} Allowed{section}: {', '.join(names)}"


def _all_settings(location: Location = ()) -> list[str]:
    names = _setting_names(location)
    return [_dotted(location)] if not names else [path for name in names for path in _all_settings((*location, name))]


def _setting_names(location: Location) -> list[str]:
    kind, _ = _schema(location)
    return list(kind.model_fields) if _is_section(kind) else []


def _purpose(location: Location) -> str:
    _, description = _schema(location)
    return f" ({description})" if description else ""


def _schema(location: Location) -> tuple[object, str]:
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


def _dotted(location: Location) -> str:
    return ".".join(name if len(name) <= _NAME else f"{name[:_NAME]}..." for name in map(str, location))


def _cut(file: Path) -> str:
    """A path, cut in its middle if no message has room for it."""
    return str(file) if len(str(file)) <= _PATH else short(str(file))


def _short(value: object) -> str:
    """A value as YAML writes it where that differs from Python."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else short(value)
