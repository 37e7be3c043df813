"""Types of settings: sections, paths, counts, numbers with bounds, and names of registry members."""

import os
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from mars_jax.errors import ConfigError
from mars_jax.hub.paths import on_hub
from mars_jax.runtime.registry import Named, Registry
from mars_jax.runtime.text import short

Member = TypeVar("Member", bound=Named)


# Beyond what any file system takes.
_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes


def _checked(path: Path) -> Path:
    """Refuses what can't be a path on any machine, so that no call of the file system has to."""
    text = str(path)
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {short(text)} is not UTF-8. Rename the file or folder") from None
    if "\0" in text:
        raise ValueError(f"the path {short(text)} has a NUL character, which no path may have")
    if len(encoded) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in encoded.split(b"/")):
        raise ValueError(
            f"the path {short(text)} has {len(encoded)} bytes; a path has at most {_LONGEST_PATH}, and each name in it "
            f"{_LONGEST_NAME}"
        )
    return path


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"the path {short(str(path))} begins with the home of an unknown user") from None


def _from_config_folder(path: Path, info: ValidationInfo) -> Path:
    if on_hub(_checked(path)):
        return path
    return _checked(Path(os.path.abspath((info.context or {}).get("folder", Path()) / _expanded(path))))


def _from_current_folder(path: Path) -> Path:
    return _checked(Path(os.path.abspath(_expanded(_checked(path)))))


# Bounds that no run on any machine meets. They are there so that a slip of the keyboard is refused at its key, and not
# by what would be counted, listed or allocated from it.
MAX_COUNT = 10**12  # samples, tokens, pixels: only compared with what there is
MAX_STEPS = 10**7
MAX_SIZE = 2**20
MAX_LANES = 10_000
MAX_LISTED = 1000  # settings that are lists, or are spelled out as one
MAX_SEED = 2**32 - 1  # JAX's keys have 32 bits

InputPath = Annotated[Path, AfterValidator(_from_config_folder)]
RunPath = Annotated[Path, AfterValidator(_from_current_folder)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, gt=0, le=MAX_COUNT)]
Steps = Annotated[int, Field(strict=True, gt=0, le=MAX_STEPS)]
StepsOrZero = Annotated[int, Field(strict=True, ge=0, le=MAX_STEPS)]
Size = Annotated[int, Field(strict=True, gt=0, le=MAX_SIZE)]
Few = Annotated[int, Field(strict=True, gt=0, le=MAX_LISTED)]
Lanes = Annotated[int, Field(strict=True, gt=0, le=MAX_LANES)]
Rank = Annotated[int, Field(strict=True, ge=0, le=MAX_SIZE)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
Devices = Annotated[int, Field(strict=True, ge=-1, le=MAX_SIZE)]
Positive = Annotated[float, Field(strict=True, gt=0)]
PositiveOrZero = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]


class Section(BaseModel):
    """Base class of the sections of a config file: frozen, and a key that it does not name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def member_name(registry: Registry[Member], name: str) -> str:
    """Checks that a registry has a member of this name, built in or registered from outside the package.

    Raises:
        ValueError: it has none; pydantic adds the setting to the message.
    """
    try:
        return registry.check(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
