"""Writes Hugging Face checkpoints in the hub's key layout: our parameters, or a base with adapters merged into it.

The hub's layout is the one that every transformers version and the serving engines read. Adapters on their own are
written by `adapter.py`.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mars_jax.adapters.files import save_tensors
from mars_jax.adapters.lora import LORA
from mars_jax.adapters.merge import delta_of
from mars_jax.adapters.method import AdapterMethod, leaf_names
from mars_jax.errors import ConfigError
from mars_jax.hub.read import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    read_config,
    read_tensors,
    weight_files,
)
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families import tables
from mars_jax.models.families.registry import checkpoint_table, model_config
from mars_jax.runtime.json_object import read_json_object
from mars_jax.runtime.jsonfiles import write_json
from mars_jax.runtime.trees import flatten

# What makes a checkpoint usable besides weights: configurations, tokenizer, processor, chat template.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm")
# Lists of weights that are not there, and what would make the folder an adapter.
_NOT_COPIED = (".index.json", ADAPTER_CONFIG_FILE)
_METADATA = {"format": "pt"}


def write_checkpoint(
    directory: str | Path,
    config_json: Mapping[str, Any],
    params: Mapping[str, Any],
    dtype: DTypeLike,
    extra_files: Iterable[str | Path] = (),
) -> None:
    """Writes parameters as an ordinary checkpoint: `config.json`, `model.safetensors`, and copies of `extra_files`.

    All tensors are in memory once more in the dtype stored.

    Args:
        directory: made if it isn't there; files of the same names are replaced.
        config_json: the Hugging Face configuration, written as it is.
        params: parameter tree of the model that `config_json` describes.
        dtype: dtype of the stored tensors.
        extra_files: files to copy beside them (tokenizer, processor).

    Raises:
        ConfigError: parameters that are not those of the configuration.
    """
    directory = Path(directory)
    config = model_config(config_json, "config_json")
    table = checkpoint_table(config)
    if config.num_vision_layers_used != config.vision.num_layers:
        remedy = " and ".join(f"{key} to {value}" for key, value in config.trimmed_settings.items())
        raise ConfigError(
            f"config_json: has {config.vision.num_layers} vision layers, of which the parameters hold the "
            f"{config.num_vision_layers_used} in use. Set {remedy}: it is the same model."
        )
    flat = flatten(params)
    parameters = table.parameters(config)
    differing = {parameter.path for parameter in parameters} ^ set(flat)
    if differing:
        raise ConfigError(
            f"{directory}: parameters and config_json differ in {len(differing)} paths: {', '.join(sorted(differing))}."
        )
    tensors = {}
    for parameter in parameters:
        array = np.asarray(flat[parameter.path])
        if array.shape != parameter.shape:
            raise ConfigError(
                f"{directory}: {parameter.path} has shape {list(array.shape)}; "
                f"config_json asks for {list(parameter.shape)}."
            )
        array = array.astype(jnp.dtype(dtype))
        for key, layer in zip(parameter.keys, array if parameter.stacked else [array], strict=True):
            tensors[key] = tables.to_stored(layer, parameter)
    sizes = table.dimensions(config)
    for key, (names, value) in table.extra_tensors.items():
        tensors[key] = np.full([sizes[name] for name in names], value, jnp.dtype(dtype))
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / WEIGHTS_FILE, tensors, metadata=_METADATA)
    # Not by `write_json`: numbers stay as they are, infinite ones too.
    (directory / CONFIG_FILE).write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
    for file in extra_files:
        shutil.copyfile(file, directory / Path(file).name)


def write_merged(
    directory: str | Path, base_directory: str | Path, adapters: Mapping[str, Any], method: AdapterMethod = LORA
) -> None:
    """Writes the base with the adapters added to its weights, in float32.

    Tensors keep the dtype, the file and the order they have in the base, and get the hub's names. Configuration,
    tokenizer and processor files are copied. One shard is in memory at a time.

    Args:
        directory: made if it isn't there; files of the same names are replaced.
        base_directory: the checkpoint that the adapters were trained on.
        adapters: adapter tree; padded ranks are fine.
        method: the adapter method.

    Raises:
        ConfigError: the two directories are the same, a method that can't be merged, or an adapter that does not fit
            the base.
    """
    directory, base = Path(directory), Path(base_directory)
    config = read_config(base)
    if directory.resolve() == base.resolve():
        raise ConfigError(f"{directory}: is the base checkpoint itself. Give another directory for the merged one.")
    updates = _leaves_by_key(adapters, config, base, method)
    directory.mkdir(parents=True, exist_ok=True)
    table = checkpoint_table(config)
    weight_map: dict[str, str] = {}
    for file in weight_files(base):
        tensors = {}
        for name, tensor in read_tensors(file):
            key = table.hub_key(name)
            if key in updates:
                tensor = _merged(tensor, updates.pop(key), method, f"{file}: {name!r}")
            tensors[key] = tensor
        save_tensors(directory / file.name, tensors, metadata=_METADATA)
        weight_map |= dict.fromkeys(tensors, file.name)
    if updates:
        raise ConfigError(
            f"{base}: the adapters update {len(updates)} tensors that it does not have, such as {next(iter(updates))}. "
            f"Give the checkpoint that the adapters were trained on."
        )
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in _COMPANIONS and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, directory / path.name)
    if (base / INDEX_FILE).is_file():
        index = read_json_object(base / INDEX_FILE) | {"weight_map": weight_map}
        write_json(directory / INDEX_FILE, index, synced=False)


def _leaves_by_key(
    adapters: Mapping[str, Any], config: ModelConfig, base: Path, method: AdapterMethod
) -> dict[str, Mapping[str, np.ndarray]]:
    """Maps hub keys to the leaves that update one tensor, without the axis of layers."""
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(adapters).items()}
    table = checkpoint_table(config)
    keys, linears = {parameter.path: parameter for parameter in table.parameters(config)}, table.linears
    updates: dict[str, Mapping[str, np.ndarray]] = {}
    for path in sorted({path.rpartition("/")[0] for path in flat}):
        parameter = keys.get(f"{path}/kernel")
        leaves = {name: flat[f"{path}/{name}"] for name in leaf_names(method)}
        first = next(iter(leaves.values()))
        if not parameter or path not in linears or (parameter.stacked and len(first) != len(parameter.keys)):
            raise ConfigError(
                f"{base}: has no place for the adapter of {path!r} with shape {list(first.shape)}. "
                f"Give the checkpoint that the adapters were trained on."
            )
        # Refused before anything is written.
        jax.eval_shape(partial(delta_of, method), jax.ShapeDtypeStruct(parameter.shape, np.float32), leaves)
        for layer, key in enumerate(parameter.keys):
            updates[key] = {name: leaf[layer] if parameter.stacked else leaf for name, leaf in leaves.items()}
    return updates


def _merged(
    tensor: tables.HostArray, leaves: Mapping[str, np.ndarray], method: AdapterMethod, where: str
) -> tables.HostArray:
    stored = tensor.astype(np.float32)
    delta = np.asarray(delta_of(method, stored.T, leaves)).T
    if delta.shape != tensor.shape:
        raise ConfigError(
            f"{where} has shape {list(tensor.shape)}, its adapter makes {list(delta.shape)}. "
            f"Give the checkpoint that the adapters were trained on."
        )
    return (stored + delta).astype(tensor.dtype)
