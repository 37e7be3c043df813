"""Settings of a PEFT adapter that is read back: only plain LoRA is, with one rank and one alpha for each linear."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.patterns import Pattern, compile_pattern
from mars_jax.errors import ConfigError
from mars_jax.runtime.text import short

_ByPattern = tuple[tuple[Pattern, float], ...]
_Kinds = type[int] | UnionType

# Settings that PEFT writes and that do not change what the tensors compute, and those that are read by their values.
_WITHOUT_EFFECT = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("lora_dropout", "eva_config", "velora_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# What the others may be; what isn't here must be off. Other initialisations change the weights of the base.
_PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "peft_type": (LORA.peft().peft_type,),
    "bias": ("none", None),
    "use_rslora": (True, False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Ranks and alphas of a plain LoRA adapter, with those of linears that a pattern matches.

    Attributes:
        rank: of the linears that no pattern of `ranks` matches.
        alpha: of the linears that no pattern of `alphas` matches.
        use_rslora: whether alpha is divided by the root of the rank (arXiv 2312.03732), not by the rank.
        ranks: (pattern, rank) in the order of the file.
        alphas: (pattern, alpha) in the order of the file.
    """

    rank: int
    alpha: float
    use_rslora: bool
    ranks: _ByPattern
    alphas: _ByPattern

    def rank_and_scale(self, linear: str) -> tuple[int, float]:
        """The rank and scale that PEFT gives a linear by its path: those of the first pattern that matches its end."""
        rank = int(_first(self.ranks, linear, self.rank))
        return rank, _first(self.alphas, linear, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_settings(settings: Mapping[str, Any], path: Path) -> LoraSettings:
    """Reads the settings of a plain LoRA adapter, and refuses those of any other.

    Args:
        settings: of adapter_config.json.
        path: of that file, for messages.

    Raises:
        ConfigError: names the setting and its value.
    """
    for key, value in {"peft_type": None, **settings}.items():
        allowed = _PLAIN_LORA.get(key, (None, False, [], {}))
        if key not in _WITHOUT_EFFECT and value not in allowed:
            raise ConfigError(
                f"{path}: {short(key)[1:-1]} is {short(value)}; only {', '.join(map(repr, allowed))} is read here: "
                "plain LoRA. Give a plain LoRA adapter, or merge this one into its base in PyTorch and give that as "
                "the checkpoint."
            )
    return LoraSettings(
        rank=int(_number("r", settings.get("r"), int, path)),
        alpha=float(_number("lora_alpha", settings.get("lora_alpha"), int | float, path)),
        use_rslora=bool(settings.get("use_rslora")),
        ranks=_by_pattern("rank_pattern", settings.get("rank_pattern"), int, path),
        alphas=_by_pattern("alpha_pattern", settings.get("alpha_pattern"), int | float, path),
    )


def _by_pattern(name: str, values: object, kinds: _Kinds, path: Path) -> _ByPattern:
    values = values or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {name} is {short(values)}; an object of patterns and numbers is needed.")
    found = []
    for pattern, value in values.items():
        number = _number(f"{name}[{short(pattern)}]", value, kinds, path)
        try:
            compile_pattern(pattern)  # so that a fault has its position in what the file holds
            found.append((compile_pattern(rf"(.*\.)?({pattern})"), number))
        except ValueError as error:
            raise ConfigError(f"{path}: {name}: {short(pattern)} {error}.") from None
    return tuple(found)


def _number(key: str, value: object, kinds: _Kinds, path: Path) -> float:
    """A rank or an alpha: ranks are whole numbers, both are above 0."""
    # What float32 rounds to 0 or infinity is no alpha either.
    if isinstance(value, bool) or not isinstance(value, kinds) or not 1e-30 < value < 1e30:
        needed = "whole number above 0" if kinds is int else "finite number above 0"
        raise ConfigError(f"{path}: {key} is {short(value)}; a {needed} is needed. Export the adapter again.")
    return value


def _first(by_pattern: _ByPattern, linear: str, default: float) -> float:
    return next((value for pattern, value in by_pattern if pattern.fullmatch(linear)), default)
