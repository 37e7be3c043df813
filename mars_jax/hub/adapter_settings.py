"""Settings of a PEFT adapter that is read back: only plain LoRA is, with one rank and one alpha for each linear."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.patterns import compile_pattern
from mars_jax.errors import ConfigError
from mars_jax.runtime.text import short

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


def check_plain_lora(settings: Mapping[str, Any], path: Path) -> None:
    """Refuses what isn't plain LoRA, and ranks, alphas and patterns that are none.

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
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        _check_number(key, settings.get(key), path)
        by_pattern = settings.get(patterns) or {}
        if not isinstance(by_pattern, dict):
            raise ConfigError(
                f"{path}: {patterns} is {short(by_pattern)}; an object of patterns and numbers is needed."
            )
        for pattern, value in by_pattern.items():
            _check_number(f"{patterns}[{short(pattern)}]", value, path)
            try:
                compile_pattern(pattern)
            except ValueError as error:
                raise ConfigError(f"{path}: {patterns}: {short(pattern)} {error}.") from None


def _check_number(key: str, value: object, path: Path) -> None:
    """Refuses what can't be a rank or an alpha: ranks are whole numbers, both are above 0."""
    is_rank = not key.startswith(("lora_alpha", "alpha"))
    kinds = int if is_rank else int | float
    # What float32 rounds to 0 or infinity is no alpha either.
    if isinstance(value, bool) or not isinstance(value, kinds) or not 1e-30 < value < 1e30:
        needed = "whole number above 0" if is_rank else "finite number above 0"
        raise ConfigError(f"{path}: {key} is {short(value)}; a {needed} is needed. Export the adapter again.")


def rank_and_scale(settings: Mapping[str, Any], linear: str) -> tuple[int, float]:
    """The rank and scale that PEFT gives a linear by its path."""
    rank = _pattern_value(settings, "r", "rank_pattern", linear)
    alpha = _pattern_value(settings, "lora_alpha", "alpha_pattern", linear)
    return int(rank), alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pattern_value(settings: Mapping[str, Any], default: str, patterns: str, linear: str) -> float:
    """That of the first pattern that matches up to the path's end, or the default."""
    values = (settings.get(patterns) or {}).items()
    hits = (value for key, value in values if compile_pattern(rf"(.*\.)?({key})").fullmatch(linear))
    return float(next(hits, settings[default]))
