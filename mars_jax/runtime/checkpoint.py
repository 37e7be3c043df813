"""Checkpoints of a training state and of a JSON document beside it, written with orbax.

No other file imports orbax. The base is never saved: a checkpoint holds what trains, and is restored onto the shapes
and shardings that the caller gives, so it may come from another mesh. orbax detects most damage by a bad disk, but not
a changed number: checksums do.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import jax
import numpy as np

from mars_jax.errors import DoesNotFitError
from mars_jax.runtime.durable import make_folder, remove_leftovers, sync_tree
from mars_jax.runtime.jsonfiles import Document

State = TypeVar("State")
"""A pytree of arrays, such as a named tuple of them."""

Item = TypeVar("Item")


class Checkpoints:
    """The last two checkpoints of one run of lanes; a context manager that waits for pending writes at exit."""

    def __init__(self, directory: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        """Opens or makes a folder.

        Args:
            directory: the folder.
            warn: called with a message for each checkpoint that can't be read.
        """
        import orbax.checkpoint as ocp

        self.directory = directory
        self._warn = warn
        self._ocp = ocp
        self._unsynced: int | None = None
        with self._writing():
            make_folder(directory)
            options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: object, document: Mapping[str, object]) -> None:
        """Writes a checkpoint in the background; a second save waits for the first, and has it on the disk.

        So of the two that are kept the older one, at least, outlasts a power cut.

        Args:
            step: optimizer step, or another number that rises from one checkpoint to the next.
            state: pytree of arrays.
            document: what JSON can hold; it is copied at once.

        Raises:
            DoesNotFitError: this checkpoint, or the one before it, can't be written.
        """
        args = self._ocp.args
        # As text: the caller may change its document while this one is being written.
        text = json.dumps(dict(document))
        record = {"text": text, "text_checksum": zlib.crc32(text.encode()), "state_checksum": _checksum(state)}
        with self._writing():
            self._finish()
            self._manager.save(
                step, args=args.Composite(state=args.StandardSave(state), document=args.JsonSave(record))
            )
            self._unsynced = step

    def restore(
        self, abstract_state: State, accept: Callable[[Document], None] = lambda document: None
    ) -> tuple[int, State, Document] | None:
        """Restores the newest checkpoint that can be read; those that can't are deleted, with a warning.

        Args:
            abstract_state: the state's pytree, of arrays or `ShapeDtypeStruct`s with shardings.
            accept: raises if the document belongs to other work than the caller's.

        Returns:
            (step, state, document), or None where there is no checkpoint.
        """
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, abstract_state)
        for step in sorted(self._manager.all_steps(), reverse=True):
            record = self._read(step, "document", args.JsonRestore(), _document_is_intact)
            if record is None:
                continue
            document = json.loads(record["text"])
            accept(document)
            has_checksum: Callable[[State], bool] = partial(_has_checksum, record["state_checksum"])
            state = self._read(step, "state", args.StandardRestore(abstract), has_checksum)
            if state is not None:
                return step, state, document
        return None

    def _read(self, step: int, item: str, restore_args: object, is_intact: Callable[[Item], bool]) -> Item | None:
        """Reads an item of a checkpoint; deletes the checkpoint and returns None if that fails."""
        try:
            value: Item = self._manager.restore(step, args=self._ocp.args.Composite(**{item: restore_args}))[item]
            if not is_intact(value):
                raise ValueError(f"its {item} isn't what was saved")
            return value
        except Exception as error:  # orbax, tensorstore and the file system raise different types
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
        except Exception as error:  # as above; an error of a background save is raised by the next call
            remove_leftovers(self.directory)
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
                self._finish()
        self._manager.close()

    def _finish(self) -> None:
        """Waits for the checkpoint that is being written, and has it on the disk."""
        self._manager.wait_until_finished()
        if self._unsynced is not None:
            sync_tree(self.directory / str(self._unsynced))
            self._unsynced = None


def _document_is_intact(record: Document) -> bool:
    return bool(zlib.crc32(record["text"].encode()) == record["text_checksum"]) and "state_checksum" in record


def _has_checksum(expected: int, state: object) -> bool:
    return _checksum(state) == expected


def _checksum(state: object) -> int:
    """CRC-32 of the bytes of all leaves, the same on every mesh."""
    checksum = 0
    for leaf in jax.tree.leaves(state):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, checksum)
    return checksum
