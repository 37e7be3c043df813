"""Checkpoints of a training state and of a JSON document beside it, with orbax: the only file that knows orbax.

The base is never saved: a checkpoint holds what trains, and is restored onto the shapes and shardings that the caller
gives, so it may come from another mesh.
"""

import copy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

Tree = Any


class Checkpoints:
    """The checkpoints of one run of lanes, newest kept with the one before it; a context manager that waits at exit."""

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp

        self.directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: Tree, document: dict[str, Any]) -> None:
        """Writes a checkpoint in the background; a second save waits for the first."""
        args = self._ocp.args
        # The caller goes on to change its document while it is being written.
        document = copy.deepcopy(document)
        self._manager.save(step, args=args.Composite(state=args.StandardSave(state), document=args.JsonSave(document)))

    def document(self) -> dict[str, Any] | None:
        """The document of the newest checkpoint, or None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(document=args.JsonRestore()))["document"]

    def restore(self, abstract_state: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
            abstract_state: the state's tree, of arrays or `ShapeDtypeStruct`s with shardings.

        Returns:
            (step, state, document), or None where there is no checkpoint.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, abstract_state)
        restored = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(abstract), document=args.JsonRestore())
        )
        return step, restored["state"], restored["document"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
