"""Adapters of a run between its phases: one safetensors file of a tree in our own paths. For other tools: `hub`."""

from pathlib import Path

import jax
import numpy as np

from mars_jax.runtime.trees import Tree, flatten, unflatten


def write_adapters(path: Path, adapters: Tree) -> None:
    """Writes the leaves of any method by path, whole or not at all."""
    from safetensors.numpy import save_file

    # Not `np.ascontiguousarray`, which makes an array [1] of a number [].
    flat = {name: np.asarray(leaf, order="C") for name, leaf in jax.device_get(flatten(adapters)).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(flat, temporary)
    temporary.replace(path)


def read_adapters(path: Path) -> Tree:
    """The adapters of a file, on the host."""
    from safetensors.numpy import load_file

    return unflatten(load_file(path))
