"""Adapters of a run between its phases: one safetensors file of a tree in our own paths. For other tools: `hub`."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mars_jax.errors import DataError
from mars_jax.runtime.durable import replacing
from mars_jax.runtime.trees import Tree, flatten, unflatten

# safetensors reports errors of the file system in words.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_adapters(path: Path, adapters: Tree) -> None:
    """Writes the leaves of any method by path, whole or not at all, and on the disk once this returns."""
    # Not `np.ascontiguousarray`, which makes an array [1] of a number [].
    flat = {name: np.asarray(leaf, order="C") for name, leaf in jax.device_get(flatten(adapters)).items()}
    with replacing(path) as temporary:
        save_tensors(temporary, flat)


def read_adapters(path: Path) -> Tree:
    """The adapters of a file, on the host.

    Raises:
        DataError: the file is missing or broken, or a number in it is not finite.
    """
    try:
        flat = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"{path} holds no adapters ({reason}): it was damaged or deleted. Run the command that writes it again."
        ) from None
    broken = [name for name, leaf in flat.items() if leaf.dtype.kind == "f" and not np.isfinite(leaf).all()]
    if broken:
        raise DataError(f"{path}: {broken[0]} holds NaN or infinity. Run the command that writes it again.")
    return unflatten(flat)


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the file system refuses it, for example because it is full.
    """
    # safetensors lets only the owner read its files; others are to be as readable as files are here.
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=metadata)
        path.chmod(mode)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if not found:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None
