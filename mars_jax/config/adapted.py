"""Settings of what is adapted: the method, LoRA's alpha, the modules with their targets and ranks."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from mars_jax.adapters.patterns import compile_pattern
from mars_jax.adapters.registry import METHODS
from mars_jax.config.fields import MAX_LISTED, Positive, Rank, Section, member_name
from mars_jax.runtime.text import short

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
# Linears adapted by default: those of every layer, and the projector's.
DEFAULT_MODULES: Mapping[str, Mapping[str, Sequence[str | int]]] = {
    "vision": {"targets": ["vision/layers/(self_attn|mlp)/.*"], "ranks": [4, 8, 16, 32, 64]},
    "projector": {"targets": ["projector/linear_[12]"], "ranks": [16]},
    "llm": {
        "targets": ["llm/layers/self_attn/(q|k|v|o)_proj", "llm/layers/mlp/(gate|up|down)_proj"],
        "ranks": [4, 8, 16, 32, 64],
    },
}


class AdapterConfig(Section):
    """How the linears of `lora.modules` are adapted."""

    method: str = Field(default="lora", description="adapter method: lora, or full_rank, which has no ranks")

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        return member_name(METHODS, method)


class AlphaConfig(Section):
    """The rule that gives LoRA's alpha from the rank r; it is part of every result."""

    rule: Literal["proportional", "fixed", "rslora"] = Field(
        default="proportional", description="scale: value (proportional), value / r (fixed), value / sqrt(r) (rslora)"
    )
    value: Positive = Field(default=2.0, description="the value in the rule")


class ModuleConfig(Section):
    """The adapted linears of one module, and the ranks and rates to try."""

    targets: tuple[str, ...] = Field(
        min_length=1, max_length=MAX_LISTED, description="regular expressions over whole parameter paths"
    )
    ranks: tuple[Rank, ...] = Field(
        min_length=1,
        max_length=MAX_LISTED,
        description="ranks to search, rising; one rank is used as it is, 0 freezes the module",
    )
    rates: tuple[Positive, ...] = Field(
        default=(1.0,),
        min_length=1,
        max_length=MAX_LISTED,
        description="factors on the module's learning rate to search, rising; one factor is used as it is",
    )

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            try:
                compile_pattern(target)
            except ValueError as error:
                raise ValueError(f"{short(target)} {error}") from None
        return targets

    @field_validator("ranks", "rates")
    @classmethod
    def _check_rising(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if list(values) != sorted(set(values)):
            example = sorted(set(values))
            raise ValueError(f"{info.field_name} must rise without repeats, e.g. {example}; seen {list(values)}")
        return values


def _default_modules() -> dict[str, ModuleConfig]:
    return {name: ModuleConfig.model_validate(settings) for name, settings in DEFAULT_MODULES.items()}


class LoraConfig(Section):
    """Which modules are adapted. A module that isn't listed stays frozen."""

    alpha: AlphaConfig = AlphaConfig()
    modules: dict[str, ModuleConfig] = Field(
        default_factory=_default_modules,
        description="adapted modules by name; vision, projector and llm have default targets and ranks",
    )

    @field_validator("modules", mode="before")
    @classmethod
    def _fill_defaults(cls, modules: object) -> object:
        if not isinstance(modules, Mapping):
            return modules
        return {
            name: {**DEFAULT_MODULES.get(name, {}), **settings} if isinstance(settings, Mapping) else settings
            for name, settings in modules.items()
        }

    @field_validator("modules")
    @classmethod
    def _check_adapted(cls, modules: dict[str, ModuleConfig]) -> dict[str, ModuleConfig]:
        # They are keys of files, titles of figures and parts of lanes' names.
        odd = [name for name in modules if not _NAME.fullmatch(name)]
        if odd:
            raise ValueError(
                f"{short(odd[0])} can't name a module; a name has up to 40 letters, digits and underscores, the first "
                "a letter"
            )
        if not any(max(module.ranks) > 0 for module in modules.values()):
            raise ValueError("at least one module needs a rank above 0")
        return modules

    @property
    def grids(self) -> dict[str, tuple[int, ...]]:
        """Module -> ranks to try."""
        return {name: module.ranks for name, module in self.modules.items()}

    @property
    def searched(self) -> list[str]:
        """Modules with ranks to choose from."""
        return [name for name, ranks in self.grids.items() if len(ranks) > 1]

    @property
    def factors(self) -> dict[str, tuple[float, ...]]:
        """Module -> factors on its learning rate to choose from; modules with one factor are left out."""
        return {name: module.rates for name, module in self.modules.items() if len(module.rates) > 1}

    @property
    def is_searched(self) -> bool:
        """Whether some module has ranks or rates to choose from."""
        return bool(self.searched or self.factors)
