"""Writes and reads adapters in PEFT's format, in the one key layout that loads on transformers 4.57 to 5.23.

It writes what PEFT needs and nothing PEFT would warn about; where the adapter comes from goes to `mars.json`. Loading
it in PyTorch and comparing logits is `verify.py`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.hub.card import model_card
from mars_jax.hub.families import family_of
from mars_jax.hub.read import read_json, read_tensors
from mars_jax.hub.tables import Family
from mars_jax.hub.write import write_json
from mars_jax.lora import Tree, flatten, unflatten
from mars_jax.models.configs import LlavaConfig, ModelConfig

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "mars.json"
CARD_FILE = "README.md"

PEFT_PREFIX = "base_model.model."
_LAYER_NUMBER = r"(?<=layers|blocks|\.layer)\.(\d+)\."


@dataclass(frozen=True, slots=True)
class _Linear:
    """The trimmed adapter of one linear: a [L, in, r], b [L, r, out] (L = 1 where there are no layers)."""

    path: str
    module: str
    a: np.ndarray
    b: np.ndarray
    scale: float


def write_adapter(
    directory: str | Path,
    adapters: Mapping[str, Any],
    ranks: Mapping[str, int],
    config: ModelConfig,
    *,
    base_name: str,
    base_revision: str | None = None,
    provenance: Mapping[str, Any],
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors`, `mars.json` and a model card.

    `r` and `lora_alpha` are the LLM's; the other modules follow by `rank_pattern` and `alpha_pattern`, always both.
    Padding beyond the rank is cut off, a module of rank 0 is left out, and alpha = scale * rank.

    Args:
        directory: made if it isn't there; files of the same names are replaced.
        adapters: adapter tree; linears stacked over L layers, ranks padded or not.
        ranks: module -> rank.
        config: the base's configuration.
        base_name: hub id or path of the base, as PEFT should look it up.
        base_revision: commit of the base.
        provenance: whatever says where the adapter comes from; JSON values.

    Raises:
        ConfigError: adapters that do not fit the configuration or the ranks.
        NoValidResultError: adapters that hold NaN or infinity.
    """
    directory = Path(directory)
    linears = _trained_linears(adapters, ranks, config)
    family = family_of(config)
    modules = [module for module in family.modules if any(linear.module == module for linear in linears)]
    trained = {module: ranks[module] for module in modules}
    alphas = {module: _number(_scale(linears, module) * ranks[module]) for module in modules}
    default = "llm" if "llm" in trained else modules[0]
    others = [module for module in modules if module != default]
    adapter_config = {
        "alpha_pattern": {family.modules[module].pattern_key: alphas[module] for module in others},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alphas[default],
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": trained[default],
        "rank_pattern": {family.modules[module].pattern_key: trained[module] for module in others},
        "revision": base_revision,
        "target_modules": _target_expression([linear.path for linear in linears], config),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor for linear in linears for key, tensor in _peft_tensors(linear, family).items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(directory / ADAPTER_CONFIG_FILE, adapter_config)
    record = {"ranks": dict(ranks), "alpha": alphas, "base_model": base_name, "base_revision": base_revision}
    write_json(directory / PROVENANCE_FILE, record | {"provenance": dict(provenance)})
    card = model_card(
        family, base_name, base_revision, trained, alphas, sum(tensor.size for tensor in tensors.values())
    )
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def read_adapter(directory: str | Path, config: ModelConfig) -> tuple[Tree, dict[str, int]]:
    """Reads an adapter that `write_adapter` wrote, or one that PEFT wrote with one rank and alpha for each module.

    Args:
        directory: with the adapter's files.
        config: the base's configuration.

    Returns:
        The adapter tree in float32 numpy (a [L, in, r], b [L, r, out], scale [L]; no L in the projector), and the
        ranks of the modules it adapts.

    Raises:
        ConfigError: a file that is missing or broken, or an adapter that is not plain LoRA on whole layer stacks.
    """
    directory = Path(directory)
    settings_file = read_json(directory / ADAPTER_CONFIG_FILE)
    _check_plain_lora(settings_file, directory / ADAPTER_CONFIG_FILE)
    family = family_of(config)
    file = directory / ADAPTER_WEIGHTS_FILE
    paths = {row.key.removesuffix(".weight"): path for path, row in family.linears.items()}
    found: dict[str, dict[int, np.ndarray]] = {}
    settings: dict[str, tuple[int, float]] = {}
    for name, tensor in read_tensors(file):
        match = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.*)\.lora_([AB])\.weight", name)
        key = family.hub_key(match[1]) if match else name
        layer = re.search(_LAYER_NUMBER, key)
        path = paths.get(re.sub(_LAYER_NUMBER, ".{layer}.", key))
        if not match or not path:
            raise ConfigError(
                f"{file}: {name!r} is no LoRA tensor of a linear of the model. "
                f"Give an adapter that was trained on the layers or the projector of this family."
            )
        side, module = match[2].lower(), path.split("/")[0]
        rank, alpha = (_pattern_value(settings_file, field, match[1]) for field in ("r", "lora_alpha"))
        stored = tensor.shape[0 if side == "a" else 1]
        setting = settings.setdefault(module, (stored, alpha / stored))
        if stored != rank or setting != (stored, alpha / stored):
            raise ConfigError(
                f"{file}: {name!r} has rank {stored}; {ADAPTER_CONFIG_FILE} gives it rank {rank:g}, alpha {alpha:g}, "
                f"and {module!r} has rank {setting[0]} and scale {setting[1]:g} elsewhere. "
                f"Give an adapter with one rank and one alpha for each module."
            )
        found.setdefault(f"{path}/{side}", {})[int(layer[1]) if layer else 0] = tensor.astype(np.float32).T
    scales = {module: scale for module, (_, scale) in settings.items()}
    return unflatten(_stacked(found, scales, file)), {module: rank for module, (rank, _) in settings.items()}


def _trained_linears(adapters: Mapping[str, Any], ranks: Mapping[str, int], config: ModelConfig) -> list[_Linear]:
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(adapters).items()}
    family = family_of(config)
    shapes = {parameter.path: parameter.shape for parameter in family.parameters(config)}
    linears = []
    for path in (path for path in family.linears if f"{path}/a" in flat):
        module = path.split("/")[0]
        rank = ranks.get(module)
        if rank == 0:
            continue
        a, b, scale = (flat[f"{path}/{name}"] for name in ("a", "b", "scale"))
        if rank is None or not 0 < rank <= a.shape[-1]:
            raise ConfigError(
                f"export: the adapter of {path!r} holds {a.shape[-1]} columns, and the rank of {module!r} is {rank}; "
                f"it must be 0 (left out) to {a.shape[-1]}."
            )
        if (*a.shape[:-1], b.shape[-1]) != shapes[f"{path}/kernel"]:
            raise ConfigError(
                f"export: the adapter of {path!r} is for a kernel {[*a.shape[:-1], b.shape[-1]]}; the configuration "
                f"has {list(shapes[f'{path}/kernel'])}. Give the configuration of the base it was trained on."
            )
        if a[..., rank:].any() and b[..., rank:, :].any():
            raise ConfigError(
                f"export: the adapter of {path!r} is not zero beyond rank {rank}, so cutting it there would change "
                f"the model. Give the ranks that it was trained with."
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(scale).all()):
            raise NoValidResultError(f"export: the adapter of {path!r} holds NaN or infinity: the run diverged.")
        stacked = a.ndim == 3
        a, b = (a, b) if stacked else (a[None], b[None])
        if np.ptp(scale):
            raise ConfigError(f"export: the scales of {path!r} differ between layers: {scale.min()} to {scale.max()}.")
        linears.append(_Linear(path, module, a[..., :rank], b[..., :rank, :], float(scale.flat[0])))
    strays = {path.rpartition("/")[0] for path in flat} - set(family.linears)
    bare = [module for module, rank in ranks.items() if rank and not any(x.module == module for x in linears)]
    if strays or bare or not linears:
        raise ConfigError(
            f"export: ranks {dict(ranks)} and adapters do not fit together. Modules with a rank but no adapter: "
            f"{', '.join(bare) or 'none'}. Adapters of what PEFT has no linear for: "
            f"{', '.join(sorted(strays)) or 'none'}. Linears with a rank above 0: {len(linears)}."
        )
    return linears


def _scale(linears: list[_Linear], module: str) -> float:
    scales = {linear.scale for linear in linears if linear.module == module}
    if len(scales) > 1:
        raise ConfigError(f"export: the linears of {module!r} have different scales: {sorted(scales)}; one is needed.")
    return scales.pop()


def _peft_tensors(linear: _Linear, family: Family) -> dict[str, np.ndarray]:
    key = PEFT_PREFIX + family.memory_key(family.linears[linear.path].key.removesuffix(".weight"))
    tensors = {}
    for layer, (a, b) in enumerate(zip(linear.a, linear.b, strict=True)):
        # safetensors 0.8.0 writes garbage for transposed views, without a word.
        tensors[f"{key.format(layer=layer)}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{key.format(layer=layer)}.lora_B.weight"] = np.ascontiguousarray(b.T)
    return tensors


def _target_expression(paths: list[str], config: ModelConfig) -> str:
    """An expression for `target_modules` that matches exactly these linears, under the names of every version."""
    numbers = {"vision": r"\d+", "projector": "", "llm": r"\d+"}
    if config.num_vision_layers_used < config.vision.num_layers:
        numbers["vision"] = f"({'|'.join(map(str, range(config.num_vision_layers_used)))})"
    branches, family = [], family_of(config)
    for module, names in family.modules.items():
        keys = [family.linears[path].key for path in paths if path.split("/")[0] == module]
        ends = [key.removeprefix(names.prefix).removesuffix(".weight") for key in keys]
        leaves = [re.escape(end) for end in ends]
        leaves += [re.escape(family.aliases[end]) for end in ends if end in family.aliases]
        if leaves:
            dot = r"\." if numbers[module] else ""
            branches.append(f"{names.expression}{numbers[module]}{dot}({'|'.join(leaves)})")
    result = rf"(.*\.)?({'|'.join(branches)})"
    _check_expression(result, paths, config)
    return result


def _check_expression(expression: str, paths: list[str], config: ModelConfig) -> None:
    """Asserts that the expression matches the trained linears and no other part of the model, in both layouts."""
    family = family_of(config)
    whole = config
    if isinstance(config, LlavaConfig):
        whole = replace(config, vision_feature_layers=(config.vision.num_layers,))
    for parameter in family.parameters(whole):
        linear = parameter.path.rpartition("/")[0]
        for layer, key in enumerate(parameter.keys):
            reached = not linear.startswith("vision/layers") or layer < config.num_vision_layers_used
            name = family.memory_key(key.rpartition(".")[0])
            newest = next((name.replace(old, new) for old, new in family.aliases.items() if name.endswith(old)), name)
            for variant in (name, name.replace("vision_model.", ""), newest):
                assert bool(re.fullmatch(expression, variant)) == (linear in paths and reached), (expression, variant)


def _pattern_value(config: Mapping[str, Any], name: str, path: str) -> float:
    """The rank or alpha that PEFT gives a module path: the first pattern that matches up to its end, or the default."""
    patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]) or {}
    hits = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)]
    return float(hits[0] if hits else config[name])


def _check_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_dora": (False, None),
        "use_rslora": (False, None),
        "modules_to_save": (None, []),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise ConfigError(
                f"{path}: {key} is {config.get(key)!r}; only {values[0]!r} is read here. Give a plain LoRA adapter."
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ConfigError(f"{path}: {key} is {config.get(key)!r}; a number is needed. Export the adapter again.")


def _stacked(
    found: Mapping[str, Mapping[int, np.ndarray]], scales: Mapping[str, float], file: Path
) -> dict[str, np.ndarray]:
    depth = dict.fromkeys(scales, 0)
    for path, layers in found.items():
        module = path.split("/")[0]
        depth[module] = max(depth[module], 1 + max(layers))
    flat: dict[str, np.ndarray] = {}
    for path in sorted({path.rpartition("/")[0] for path in found}):
        module = path.split("/")[0]
        for side in ("a", "b"):
            layers = found.get(f"{path}/{side}", {})
            missing = sorted(set(range(depth[module])) - set(layers))
            if missing:
                raise ConfigError(
                    f"{file}: {path!r} lacks lora_{side.upper()} in layers {missing} of {depth[module]}; only whole "
                    f"stacks are read. Export the adapter again, or train every layer."
                )
            stack = np.stack([layers[layer] for layer in range(depth[module])])
            flat[f"{path}/{side}"] = stack[0] if module == "projector" else stack
        scale = np.full(depth[module], scales[module], np.float32)
        flat[f"{path}/scale"] = scale[0] if module == "projector" else scale
    return flat


def _number(value: float) -> int | float:
    """An int where the value is one, as in PEFT's own files; PEFT computes alpha / r with either."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-6) else value
