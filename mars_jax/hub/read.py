"""Reads a Hugging Face checkpoint directory: `config.json` and safetensors into our configuration and parameters.

Tensors are read on the host one at a time, each cast and copied into its stacked array, so there is never a second
copy of the model. Sharding and downloads are not handled here, and torch pickles are not read.
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field
from safetensors import SafetensorError, safe_open

from mars_jax.errors import ConfigError
from mars_jax.hub.match import CONFIG_FILE, Header, listing, match_tensors
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families import tables
from mars_jax.models.families.registry import model_config, parameters
from mars_jax.runtime.json_object import Settings, checked, read_json_object, refusal
from mars_jax.runtime.trees import Tree, unflatten

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
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
    files = weight_files(directory)
    matches = match_tensors(_headers(files), config, directory)
    arrays = {parameter.path: np.empty(parameter.shape, jnp.dtype(dtype)) for parameter in parameters(config)}
    tied_head = None
    for file in files:
        wanted = {match.header.name: match for match in matches if match.header.file == file}
        for name, tensor in read_tensors(file, wanted):
            parameter, layer = wanted[name].parameter, wanted[name].layer
            if parameter is None:
                tied_head = (file, name, tensor.astype(jnp.dtype(dtype)))
            else:
                array = arrays[parameter.path][layer] if parameter.stacked else arrays[parameter.path]
                array[...] = tables.from_stored(tensor, parameter.transform)
    if tied_head is not None and not np.array_equal(tied_head[2], arrays[tables.EMBEDDING_PATH]):
        raise ConfigError(
            f"{tied_head[0]}: {CONFIG_FILE} ties the word embeddings, yet {tied_head[1]!r} differs from the embedding. "
            f"Set tie_word_embeddings to false in {directory / CONFIG_FILE}, also in text_config, or remove the tensor."
        )
    return config, unflatten(arrays)


def check_weights(directory: Path) -> None:
    """Compares the weights of a checkpoint with its configuration, from the headers of the files alone.

    Raises:
        ConfigError: as `read_checkpoint`, except for a tied head whose values differ.
    """
    config = read_config(directory)
    match_tensors(_headers(weight_files(directory)), config, directory)


def read_config(directory: Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory.

    Raises:
        ConfigError: the file is missing or not JSON, or the model is not supported.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        if (directory / ADAPTER_CONFIG_FILE).is_file():
            raise ConfigError(
                f"{directory}: holds a PEFT adapter ({ADAPTER_CONFIG_FILE}), no model. Point model.checkpoint at its "
                "base model."
            )
        # Of a name such as OWNER/NAME, neither folder is there.
        name = "/".join(directory.parts[-2:])
        hint = "" if directory.parent.is_dir() else f" If you mean the model on the hub, write hf://{name}."
        raise ConfigError(
            f"{path}: no such file. A checkpoint is a local directory with {CONFIG_FILE} and safetensors files; "
            f"fetch one with `hf download REPO --local-dir DIR` and point to that directory.{hint}"
        )
    return model_config(read_json_object(path), str(path))


class _Index(Settings):
    """The index of the shards of a checkpoint."""

    weight_map: Annotated[dict[str, str], Field(min_length=1, max_length=10**6)]


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
            f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; found: {listing(names)}. "
            f"Only safetensors are read: fetch those files, or save the model again with transformers."
        )
    weight_map = checked(_Index, read_json_object(index), str(index)).weight_map
    for name in set(weight_map.values()):
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise refusal(str(index), "a file in weight_map", name, "the name of a safetensors file beside it expected")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{index}: lists {len(files)} shards, of which {len(missing)} are not there: {listing(missing)}. "
            f"The download is incomplete; fetch them again."
        )
    for file in files:
        listed = {name for name, shard in weight_map.items() if shard == file.name}
        with open_safetensors(file) as tensors:
            differing = sorted(listed ^ set(tensors.keys()))
        if differing:
            raise ConfigError(
                f"{index}: does not describe {file.name}; they differ in {len(differing)} tensors: "
                f"{listing(differing)}. Index and shards come from different downloads; fetch both again."
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


def read_tensors(path: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, tables.HostArray]]:
    """Yields the tensors of a safetensors file, one in memory at a time.

    Args:
        path: the file.
        names: the tensors to read; None: all.

    Raises:
        ConfigError: as `open_safetensors`.
    """
    with open_safetensors(path) as tensors:
        left = deque(name for name in tensors.keys() if names is None or name in names)  # noqa: SIM118
    while left:
        # The file is memory-mapped, and pages that were read stay resident until it is closed.
        with open_safetensors(path) as tensors:
            read = 0
            while left and read < _MAPPED_BYTES:
                name = left.popleft()
                tensor = tensors.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor


def _headers(files: Collection[Path]) -> Iterator[Header]:
    """The headers of all tensors of some files."""
    for file in files:
        with open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                yield Header(file, name, tuple(tensor.get_shape()), str(tensor.get_dtype()))
