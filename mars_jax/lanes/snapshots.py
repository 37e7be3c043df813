"""Adapters of every lane at every eval point, on disk: which of them module swaps need is known only at the end.

A file of fixed places, so that a run that goes on from a checkpoint writes what it repeats to where it was.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mars_jax.errors import DataError
from mars_jax.runtime.durable import naming


def snapshot_bytes(lanes: int, points: int, parameters: int) -> int:
    """Size of the file of K lanes at N eval points, with P padded parameters each."""
    return 4 * lanes * points * parameters


class Snapshots:
    """Vectors [P] of K lanes at N eval points, float32; a context manager that closes the file, which stays."""

    def __init__(self, path: Path, eval_steps: Sequence[int], lanes: int, size: int) -> None:
        """Opens or makes the file.

        Args:
            path: of the file.
            eval_steps: steps of the eval points.
            lanes: K.
            size: P.
        """
        self.path = path
        self._places = {step: i for i, step in enumerate(eval_steps)}
        self._lanes, self._size = lanes, size
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def write(self, step: int, lane: int, vector: np.ndarray) -> None:
        """Keeps the adapters [P] of a lane at the eval point of a step."""
        content = np.ascontiguousarray(vector, np.float32).tobytes()
        place = self._place(step, lane)
        with naming(self.path):
            while content:
                written = os.pwrite(self._file, content, place)
                content, place = content[written:], place + written

    def flush(self) -> None:
        """Has what was written on the disk, before a checkpoint says that these eval points are done."""
        with naming(self.path):
            os.fsync(self._file)

    def read(self, step: int, lane: int) -> np.ndarray:
        """The adapters [P] of a lane at the eval point of a step.

        Raises:
            DataError: they were never written: the file is not the one that the checkpoints beside it were saved with.
        """
        content = os.pread(self._file, 4 * self._size, self._place(step, lane))
        if len(content) == 4 * self._size and (vector := np.frombuffer(content, np.float32)).any():
            return vector
        raise DataError(
            f"{self.path} doesn't hold the adapters of lane {lane} at step {step}. Delete {self.path.parent} and run "
            "the same command again: the lanes of this group start anew."
        )

    def _place(self, step: int, lane: int) -> int:
        return snapshot_bytes(1, self._places[step] * self._lanes + lane, self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
