"""Checkpoints of a training state and of a JSON document beside it, with orbax: the only file that knows orbax.

The base is never saved: a checkpoint holds what trains, and is restored onto the shapes and shardings that the caller
gives, so it may come from another mesh. orbax notices most of what a bad disk does to it, but not a changed number:
checksums do.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from mars_jax.errors import DoesNotFitError

Tree = Any


class Checkpoints:
    """The checkpoints of one run of lanes, newest kept with the one before it; a context manager that waits at exit."""

    def __init__(self, directory: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        """Opens or makes a folder; `warn` is told of checkpoints that can't be read."""
        import orbax.checkpoint as ocp

        self.directory = directory
        self._warn = warn
        self._ocp = ocp
        with self._writing():
            options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: Tree, document: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background; a second save waits for the first.

        Raises:
            DoesNotFitError: this checkpoint, or the one before it, can't be written.
        """
        args = self._ocp.args
        # Text, because the caller goes on to change its document while it is being written.
        text = json.dumps(dict(document))
        record = {"text": text, "text_checksum": zlib.crc32(text.encode()), "state_checksum": _checksum(state)}
        with self._writing():
            self._manager.save(
                step, args=args.Composite(state=args.StandardSave(state), document=args.JsonSave(record))
            )

    def restore(
        self, abstract_state: Tree, accept: Callable[[dict[str, Any]], None] = lambda document: None
    ) -> tuple[int, Tree, dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read; those that can't are deleted, with a warning.

        Args:
            abstract_state: the state's tree, of arrays or `ShapeDtypeStruct`s with shardings.
            accept: raises if the document is not the caller's.

        Returns:
            (step, state, document), or None where there is no checkpoint.
        """
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, abstract_state)
        for step in sorted(self._manager.all_steps(), reverse=True):
            record = self._read(step, "document", args.JsonRestore(), _is_sound)
            if record is None:
                continue
            document = json.loads(record["text"])
            accept(document)
            as_saved = partial(_has_checksum, record["state_checksum"])
            state = self._read(step, "state", args.StandardRestore(abstract), as_saved)
            if state is not None:
                return step, state, document
        return None

    def _read(self, step: int, item: str, how: Any, as_saved: Callable[[Any], bool]) -> Any:
        """Reads an item of a checkpoint; deletes the checkpoint and returns None if that fails."""
        try:
            value = self._manager.restore(step, args=self._ocp.args.Composite(**{item: how}))[item]
            if not as_saved(value):
                raise ValueError(f"its {item} isn't what was saved")
            return value
        except Exception as error:  # orbax, tensorstore and the file system each have their own kinds
            reason = (str(error).splitlines() or [""])[0][:200]
            self._warn(
                f"the checkpoint of step {step} in {self.directory} can't be read ({type(error).__name__}: {reason}); "
                "it is deleted, and the run goes on from the one before it, if there is one"
            )
            self._manager.delete(step)
            return None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above; what a save in the background met is raised by the next call
            raise DoesNotFitError(
                f"can't write checkpoints to {self.directory}: {error}. Finished work is kept. Make room there, or "
                "make it writable, and run the same command again to go on."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            with self._writing():
                self._manager.wait_until_finished()
        self._manager.close()


def _is_sound(record: Mapping[str, Any]) -> bool:
    return bool(zlib.crc32(record["text"].encode()) == record["text_checksum"]) and "state_checksum" in record


def _has_checksum(expected: int, state: Tree) -> bool:
    return _checksum(state) == expected


def _checksum(state: Tree) -> int:
    """CRC-32 of the bytes of all leaves, the same on every mesh."""
    checksum = 0
    for leaf in jax.tree.leaves(state):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, checksum)
    return checksum
