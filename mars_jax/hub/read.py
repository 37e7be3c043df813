"""Reads a Hugging Face checkpoint directory: `config.json` and safetensors into our configuration and parameters.

Tensors are read on the host one at a time, each cast and copied into its stacked array, so there is never a second
copy of the model. Sharding and downloads are not handled here, and torch pickles are not read.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from mars_jax.errors import ConfigError
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families import tables
from mars_jax.models.families.registry import checkpoint_table, model_config
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.trees import Tree, unflatten

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LISTED = 8
_MAPPED_BYTES = 2**27


def read_checkpoint(directory: str | Path, dtype: DTypeLike) -> tuple[ModelConfig, Tree]:
    """Reads a checkpoint in any key layout of its family, from a single file or from the shards that an index lists.

    Args:
        directory: a local directory with `config.json` and safetensors.
        dtype: dtype of every parameter returned, e.g. "bfloat16".

    Returns:
        The configuration, and the parameters as numpy arrays on the host (ready for `jax.device_put`).

    Raises:
        ConfigError: a file is missing or broken, or the tensors do not match the configuration one to one.
    """
    directory = Path(directory)
    config = read_config(directory)
    table = checkpoint_table(config)
    targets = {
        key: (parameter, layer) for parameter in table.parameters(config) for layer, key in enumerate(parameter.keys)
    }
    arrays = {parameter.path: np.empty(parameter.shape, jnp.dtype(dtype)) for parameter, _ in targets.values()}
    seen: dict[str, str] = {}
    unexpected: list[str] = []
    tied_head = None
    for file in weight_files(directory):
        for name, tensor in read_tensors(file):
            key = table.hub_key(name)
            if key in seen:
                raise ConfigError(
                    f"{file}: {name!r} and {seen[key]!r} are the same parameter in two key layouts. "
                    f"Keep one of them; a checkpoint holds every parameter once."
                )
            seen[key] = name
            if key in targets:
                parameter, layer = targets[key]
                array = arrays[parameter.path][layer] if parameter.stacked else arrays[parameter.path]
                array[...] = tables.from_stored(_checked(tensor, parameter, file, name), parameter.transform)
            elif key == table.head_key and config.text.tie_word_embeddings:
                tied_head = (file, name, tensor.astype(jnp.dtype(dtype)))
            elif not table.unused(key, config):
                unexpected.append(name)
    _check_complete(directory, table.layouts, [key for key in targets if key not in seen], unexpected)
    if tied_head is not None and not np.array_equal(tied_head[2], arrays[tables.EMBEDDING_PATH]):
        raise ConfigError(
            f"{tied_head[0]}: {CONFIG_FILE} ties the word embeddings, yet {tied_head[1]!r} differs from the embedding. "
            f"Set tie_word_embeddings to false in {directory / CONFIG_FILE}, or remove the tensor."
        )
    return config, unflatten(arrays)


def read_config(directory: Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory.

    Raises:
        ConfigError: the file is missing or not JSON, or the model is not supported.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file. A checkpoint is a local directory with {CONFIG_FILE} and safetensors files; "
            f"fetch one with `hf download REPO --local-dir DIR` and point to that directory."
        )
    return model_config(read_json(path), str(path))


def read_json(path: Path) -> Document:
    """Reads a JSON object.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}. Fetch the file again."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}; an object is needed. Fetch the file again.")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that the index lists where there is an index, else the single file.

    Raises:
        ConfigError: there are no weights, a listed shard is missing, or the index does not match its shards.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        single = directory / WEIGHTS_FILE
        if single.is_file():
            return [single]
        names = sorted(path.name for path in directory.iterdir())
        raise ConfigError(
            f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; found: {', '.join(names) or 'nothing'}. "
            f"Only safetensors are read: fetch those files, or save the model again with transformers."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: has no weight_map of tensor names to files. Fetch the file again.")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{index}: lists {len(files)} shards, of which {len(missing)} are not there: {_listing(missing)}. "
            f"The download is incomplete; fetch them again."
        )
    for file in files:
        listed = {name for name, shard in weight_map.items() if shard == file.name}
        with open_safetensors(file) as tensors:
            differing = sorted(listed ^ set(tensors.keys()))
        if differing:
            raise ConfigError(
                f"{index}: does not describe {file.name}; they differ in {len(differing)} tensors: "
                f"{_listing(differing)}. Index and shards come from different downloads; fetch both again."
            )
    return files


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file for numpy; only its header is read.

    Raises:
        ConfigError: the file is missing, truncated or not safetensors; raised also during reads.
    """
    try:
        with safe_open(path, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a complete safetensors file ({path.stat().st_size if path.exists() else 0} bytes): {error}. "
            f"The download broke off, or the file is a Git LFS pointer; fetch it again."
        ) from error


def read_tensors(path: Path) -> Iterator[tuple[str, tables.HostArray]]:
    """Yields the tensors of a safetensors file, one in memory at a time.

    Raises:
        ConfigError: as `open_safetensors`.
    """
    with open_safetensors(path) as tensors:
        names = deque(tensors.keys())
    while names:
        # The file is memory-mapped, and pages that were read stay resident until it is closed.
        with open_safetensors(path) as tensors:
            read = 0
            while names and read < _MAPPED_BYTES:
                name = names.popleft()
                tensor = tensors.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor


def _checked(tensor: tables.HostArray, parameter: tables.Parameter, file: Path, name: str) -> tables.HostArray:
    if tensor.shape != parameter.stored_shape:
        raise ConfigError(
            f"{file}: {name!r} has shape {list(tensor.shape)}, but {CONFIG_FILE} asks for "
            f"{list(parameter.stored_shape)} ({parameter.path}). The two belong to different models; fetch both again."
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
        raise ConfigError(
            f"{file}: {name!r} is stored as {tensor.dtype}; float16, bfloat16, float32 and float64 are read. "
            f"Use the checkpoint that was not quantised."
        )
    return tensor


def _check_complete(directory: Path, layouts: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    if missing or unexpected:
        raise ConfigError(
            f"{directory}: the tensors do not fit {CONFIG_FILE}. Missing {len(missing)}: {_listing(missing)}. "
            f"Not part of the model {len(unexpected)}: {_listing(unexpected)}. "
            f"Known layouts start with {layouts}; use a checkpoint of the model that {CONFIG_FILE} describes."
        )


def _listing(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_LISTED])
    return f"{listed or 'none'}{', ...' if len(names) > _LISTED else ''}"
