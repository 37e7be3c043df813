"""Which calls of the compiled chunk a group of lanes needs, and their batches, made while the call before runs.

No state of a lane is here, and no decision on who runs: that is `lanes.loop`.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from mars_jax.data.batches import Batch
from mars_jax.runtime.sharding import place_batches

# Threads that read and decode batches.
_READERS = 4


class Stream(Protocol):
    """Batches as a function of the step."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, numpy arrays [B, ...]; or a packed one."""
        ...


class Piece(NamedTuple):
    """One call of the chunk: steps `start` to `stop`, then perhaps a look."""

    start: int
    stop: int
    look: bool


def pieces(looks: Sequence[int], chunk_steps: int, done: int) -> Iterator[Piece]:
    """The calls up to each of the looks that remain after `done` steps, of at most `chunk_steps` steps each."""
    for look in looks:
        start = max(done, 0)
        while done < look:
            stop = min(start + chunk_steps, look)
            yield Piece(start, stop, stop == look)
            done = start = stop


def feed(stream: Stream, calls: Iterator[Piece], length: int, mesh: Mesh) -> Iterator[tuple[Piece, Batch]]:
    """Pieces with their batches [length, B, ...] on the devices, made in threads while the piece before runs."""

    def load(piece: Piece) -> Batch:
        # A look without steps still needs batches of the right shape; so do places past the last step.
        steps = [min(step, max(piece.stop - 1, 0)) for step in range(piece.start, piece.start + length)]
        different = list(dict.fromkeys(steps))
        rows = dict(zip(different, readers.map(stream.__getitem__, different), strict=True))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[rows[step] for step in steps])
        return place_batches(stacked, mesh)

    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as thread:
        waiting = None
        for piece in calls:
            loading = piece, thread.submit(load, piece)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = loading
        if waiting:
            yield waiting[0], waiting[1].result()
