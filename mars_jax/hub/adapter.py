"""Writes and reads adapters in PEFT's format, in the one key layout that loads on transformers 4.57 to 5.23.

It writes what PEFT needs and nothing PEFT would warn about; where the adapter comes from goes to `mars.json`. Loading
it in PyTorch and comparing logits is `verify.py`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mars_jax.adapters.files import save_tensors
from mars_jax.adapters.lora import LORA
from mars_jax.adapters.merge import delta_of
from mars_jax.adapters.method import AdapterMethod, PeftFormat, leaf_names
from mars_jax.adapters.targets import Target
from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.hub.adapter_settings import read_lora_settings
from mars_jax.hub.card import model_card
from mars_jax.hub.read import ADAPTER_CONFIG_FILE, read_tensors
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import checkpoint_table
from mars_jax.models.families.tables import CheckpointTable, Parameter
from mars_jax.runtime.json_object import read_json_object
from mars_jax.runtime.jsonfiles import write_json
from mars_jax.runtime.trees import Tree, flatten, unflatten

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "mars.json"
CARD_FILE = "README.md"

PEFT_PREFIX = "base_model.model."
# What `read_adapter` reads.
_LORA = LORA.peft()
_LORA_LEAVES = {tensor.name: leaf for leaf, tensor in _LORA.tensors.items()}
# A state dict saved as it is has the adapter's name in it, and no prefix where there was no `PeftModel`.
_LORA_TENSOR = re.compile(
    rf"({re.escape(PEFT_PREFIX)})?(?P<linear>.+)\.(?P<name>{'|'.join(_LORA_LEAVES)})(\.[^.]+)?\.weight"
)


@dataclass(frozen=True, slots=True)
class _Linear:
    """The trimmed adapter of one linear: PEFT's name -> our leaf [L, ...] (L = 1 where there are no layers)."""

    path: str
    module: str
    tensors: Mapping[str, np.ndarray]
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
    method: AdapterMethod = LORA,
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
        provenance: whatever says where the adapter comes from; JSON values. The card shows its `prompt`, the text of
            a prompt.
        method: the adapter method.

    Raises:
        ConfigError: a method that PEFT has no format for, or adapters that do not fit the configuration or the ranks.
        NoValidResultError: adapters that hold NaN or infinity.
    """
    directory = Path(directory)
    peft = method.peft()
    if peft is None:
        raise ConfigError(
            f"export: PEFT has no format for the adapter method {method.name!r}. Write the merged checkpoint instead: "
            f"`mars export RUN --merged`."
        )
    linears = _trained_linears(adapters, ranks, config, method, peft)
    family = checkpoint_table(config)
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
        "peft_type": peft.peft_type,
        "r": trained[default],
        "rank_pattern": {family.modules[module].pattern_key: trained[module] for module in others},
        "revision": base_revision,
        "target_modules": _target_expression([linear.path for linear in linears], config),
        "task_type": "CAUSAL_LM",
        **peft.settings,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor for linear in linears for key, tensor in _peft_tensors(linear, family).items()}
    save_tensors(directory / ADAPTER_WEIGHTS_FILE, tensors, metadata={"format": "pt"})
    write_json(directory / ADAPTER_CONFIG_FILE, dict(sorted(adapter_config.items())), synced=False)
    record = {"ranks": dict(ranks), "alpha": alphas, "base_model": base_name, "base_revision": base_revision}
    write_json(directory / PROVENANCE_FILE, record | {"provenance": dict(provenance)}, synced=False)
    size = sum(tensor.size for tensor in tensors.values())
    card = model_card(family, base_name, base_revision, trained, alphas, size, provenance.get("prompt"))
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def read_adapter(directory: str | Path, config: ModelConfig) -> tuple[Tree, dict[str, int]]:
    """Reads a LoRA adapter that `write_adapter` or PEFT wrote, under the names of any transformers version.

    Read are plain LoRA (also rsLoRA) and, for each module, one rank and one scale; ranks and alphas follow patterns as
    PEFT resolves them. What belongs to vision layers that the model never reads is left out.

    Args:
        directory: with the adapter's files.
        config: the base's configuration.

    Returns:
        The adapter tree in float32 numpy (a [L, in, r], b [L, r, out], scale [L]; no L in the projector), and the
        ranks of the modules it adapts.

    Raises:
        ConfigError: a file that is missing or broken, a setting that makes it more than plain LoRA or is none, or a
            tensor that has no place in the tree or holds what is no weight.
    """
    directory = Path(directory)
    config_file = directory / ADAPTER_CONFIG_FILE
    settings = read_lora_settings(read_json_object(config_file), config_file)
    file = directory / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        found = sorted(path.name for path in directory.iterdir())
        raise ConfigError(
            f"{file}: no such file; found: {', '.join(found)}. Only safetensors are read: save the adapter again with "
            f"`save_pretrained`, which writes them."
        )
    family = checkpoint_table(config)
    kernels = {parameter.path: parameter for parameter in family.parameters(config)}
    places = {
        key.removesuffix(".weight"): (path, layer)
        for path in family.linears
        for layer, key in enumerate(kernels[f"{path}/kernel"].keys)
    }
    layers: dict[str, dict[int, np.ndarray]] = {}
    names: dict[tuple[str, int], str] = {}
    modules: dict[str, tuple[int, float]] = {}
    for name, tensor in read_tensors(file):
        match = _LORA_TENSOR.fullmatch(name)
        key = family.hub_key(match["linear"]) if match else ""
        if match and family.unused(f"{key}.weight", config):
            continue
        if not match or key not in places:
            raise ConfigError(
                f"{file}: {name!r} is no LoRA tensor of a linear in the layers or the projector of this model. Give an "
                f"adapter that was trained on those of a {config.family} base with as many layers; names start with "
                f"{PEFT_PREFIX} and {family.layouts}."
            )
        path, layer = places[key]
        name_of_leaf, kernel = _LORA_LEAVES[match["name"]], kernels[f"{path}/kernel"]
        leaf = f"{path}/{name_of_leaf}"
        other = names.setdefault((leaf, layer), name)
        if other != name:
            raise ConfigError(
                f"{file}: {name!r} and {other!r} are the same tensor of two adapters or in two key layouts. "
                f"Keep one of them."
            )
        setting = settings.rank_and_scale(match["linear"])
        module = path.split("/")[0]
        if modules.setdefault(module, setting) != setting:
            rank, scale = modules[module]
            raise ConfigError(
                f"{file}: {name!r} has rank {setting[0]} and scale {setting[1]:g}; other linears of {module!r} have "
                f"rank {rank} and scale {scale:g}. Give an adapter with one rank and one alpha for each module."
            )
        target = Target(module, None, *kernel.shape[-2:])
        expected = LORA.leaves(target, setting[0])[name_of_leaf].shape[::-1]
        if tensor.shape != expected:
            raise ConfigError(
                f"{file}: {name!r} has shape {list(tensor.shape)}; rank {setting[0]}, which {ADAPTER_CONFIG_FILE} "
                f"gives it, and the base's configuration make it {list(expected)}. Give the files of one adapter, and "
                f"the base that it was trained on."
            )
        layers.setdefault(leaf, {})[layer] = _float32(tensor, file, name).T
    if not layers:
        raise ConfigError(f"{file}: holds no tensor that the model would read. Export the adapter again.")
    flat = _stacked(layers, kernels, {module: scale for module, (_, scale) in modules.items()}, file)
    return unflatten(flat), {module: rank for module, (rank, _) in modules.items()}


def _trained_linears(
    adapters: Mapping[str, Any], ranks: Mapping[str, int], config: ModelConfig, method: AdapterMethod, peft: PeftFormat
) -> list[_Linear]:
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(adapters).items()}
    adapted = {path.rpartition("/")[0] for path in flat}
    family = checkpoint_table(config)
    shapes = {parameter.path: parameter.shape for parameter in family.parameters(config)}
    linears = []
    for path in (path for path in family.linears if path in adapted):
        rank = ranks.get(path.split("/")[0])
        if rank != 0:
            leaves = {name: flat[f"{path}/{name}"] for name in leaf_names(method)}
            linears.append(_trimmed_linear(path, leaves, rank, shapes[f"{path}/kernel"], method, peft))
    strays = adapted - set(family.linears)
    bare = [module for module, rank in ranks.items() if rank and not any(x.module == module for x in linears)]
    if strays or bare or not linears:
        raise ConfigError(
            f"export: ranks {dict(ranks)} and adapters do not fit together. Modules with a rank but no adapter: "
            f"{', '.join(bare) or 'none'}. Adapters of what PEFT has no linear for: "
            f"{', '.join(sorted(strays)) or 'none'}. Linears with a rank above 0: {len(linears)}."
        )
    return linears


def _trimmed_linear(
    path: str,
    leaves: Mapping[str, np.ndarray],
    rank: int | None,
    shape: tuple[int, ...],
    method: AdapterMethod,
    peft: PeftFormat,
) -> _Linear:
    module = path.split("/")[0]
    columns = min(leaves[leaf].shape[tensor.rank_axis] for leaf, tensor in peft.tensors.items())
    if rank is None or not 0 < rank <= columns:
        raise ConfigError(
            f"export: the adapter of {path!r} holds {columns} columns, and the rank of {module!r} is {rank}; "
            f"it must be 0 (left out) to {columns}."
        )
    update = jax.eval_shape(partial(delta_of, method), jax.ShapeDtypeStruct(shape, np.float32), leaves)
    if update.shape != shape:
        raise ConfigError(
            f"export: the adapter of {path!r} is for a kernel {list(update.shape)}; the configuration "
            f"has {list(shape)}. Give the configuration of the base it was trained on."
        )
    within, beyond = {}, []
    for leaf, tensor in peft.tensors.items():
        within[tensor.name], rest = np.split(leaves[leaf], [rank], axis=tensor.rank_axis)
        beyond.append(rest.any())
    if all(beyond):
        raise ConfigError(
            f"export: the adapter of {path!r} is not zero beyond rank {rank}, so cutting it there would change "
            f"the model. Give the ranks that it was trained with."
        )
    if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
        raise NoValidResultError(f"export: the adapter of {path!r} holds NaN or infinity: the run diverged.")
    scale = leaves[peft.scale]
    if np.ptp(scale):
        raise ConfigError(f"export: the scales of {path!r} differ between layers: {scale.min()} to {scale.max()}.")
    stacked = {name: leaf if leaf.ndim == 3 else leaf[None] for name, leaf in within.items()}
    return _Linear(path, module, stacked, float(scale.flat[0]))


def _scale(linears: list[_Linear], module: str) -> float:
    scales = {linear.scale for linear in linears if linear.module == module}
    if len(scales) > 1:
        raise ConfigError(f"export: the linears of {module!r} have different scales: {sorted(scales)}; one is needed.")
    return scales.pop()


def _peft_tensors(linear: _Linear, family: CheckpointTable[ModelConfig]) -> dict[str, np.ndarray]:
    key = PEFT_PREFIX + family.memory_key(family.linears[linear.path].key.removesuffix(".weight"))
    tensors = {}
    for layer in range(len(next(iter(linear.tensors.values())))):
        for name, stacked in linear.tensors.items():
            # safetensors 0.8.0 writes garbage for transposed views, without a word.
            tensors[f"{key.format(layer=layer)}.{name}.weight"] = np.ascontiguousarray(stacked[layer].T)
    return tensors


def _target_expression(paths: list[str], config: ModelConfig) -> str:
    """An expression for `target_modules` that matches exactly these linears, under the names of every version."""
    numbers = {"vision": r"\d+", "projector": "", "llm": r"\d+"}
    if config.num_vision_layers_used < config.vision.num_layers:
        numbers["vision"] = f"({'|'.join(map(str, range(config.num_vision_layers_used)))})"
    branches, family = [], checkpoint_table(config)
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
    family = checkpoint_table(config)
    for parameter in family.parameters(config.with_all_vision_layers()):
        linear = parameter.path.rpartition("/")[0]
        for layer, key in enumerate(parameter.keys):
            reached = not linear.startswith("vision/layers") or layer < config.num_vision_layers_used
            name = family.memory_key(key.rpartition(".")[0])
            newest = next((name.replace(old, new) for old, new in family.aliases.items() if name.endswith(old)), name)
            for variant in (name, name.replace("vision_model.", ""), newest):
                assert bool(re.fullmatch(expression, variant)) == (linear in paths and reached), (expression, variant)


def _float32(tensor: np.ndarray, file: Path, name: str) -> np.ndarray:
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
        raise ConfigError(
            f"{file}: {name!r} is stored as {tensor.dtype}; float16, bfloat16, float32 and float64 are read. Save the "
            "adapter without quantisation."
        )
    with np.errstate(over="ignore"):
        values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise ConfigError(
            f"{file}: {name!r} holds NaN, infinity or what float32 can't hold, in {np.sum(~np.isfinite(values))} of "
            f"{values.size} numbers: the run that wrote it diverged, or the file is damaged. Give another adapter."
        )
    return values


def _stacked(
    layers: Mapping[str, Mapping[int, np.ndarray]],
    kernels: Mapping[str, Parameter],
    scales: Mapping[str, float],
    file: Path,
) -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for path in sorted({leaf.rpartition("/")[0] for leaf in layers}):
        kernel = kernels[f"{path}/kernel"]
        for name, leaf in _LORA_LEAVES.items():
            found = layers.get(f"{path}/{leaf}", {})
            missing = sorted(set(range(len(kernel.keys))) - set(found))
            if missing:
                raise ConfigError(
                    f"{file}: {path!r} lacks {name} in layers {missing} of {len(kernel.keys)}; only whole "
                    f"stacks are read. Export the adapter again, or train every layer."
                )
            stack = np.stack([found[layer] for layer in sorted(found)])
            flat[f"{path}/{leaf}"] = stack if kernel.stacked else stack[0]
        scale = np.full(len(kernel.keys), scales[path.split("/")[0]], np.float32)
        flat[f"{path}/{_LORA.scale}"] = scale if kernel.stacked else scale[0]
    return flat


def _number(value: float) -> int | float:
    """An int where the value is one, as in PEFT's own files; PEFT computes alpha / r with either."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-6) else value
