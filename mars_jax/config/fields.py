"""Types of settings: sections, paths, counts, numbers with bounds, and names of registry members."""

import os
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from mars_jax.errors import ConfigError
from mars_jax.hub.paths import on_hub
from mars_jax.runtime.registry import Named, Registry

Member = TypeVar("Member", bound=Named)


def _from_config_folder(path: Path, info: ValidationInfo) -> Path:
    if on_hub(path):
        return path
    return Path(os.path.abspath((info.context or {}).get("folder", Path()) / path.expanduser()))


def _from_current_folder(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


InputPath = Annotated[Path, AfterValidator(_from_config_folder)]
RunPath = Annotated[Path, AfterValidator(_from_current_folder)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, gt=0)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
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
