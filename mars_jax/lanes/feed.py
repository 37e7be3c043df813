"""Which calls of the compiled chunk a group of lanes needs, and their batches, made while the call before runs.

It holds no state of a lane and does not decide which lanes run: `loop` does.
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


class Call(NamedTuple):
    """One call of the chunk: steps `start` to `stop`, then perhaps an eval point."""

    start: int
    stop: int
    evaluate: bool


def chunk_calls(eval_steps: Sequence[int], chunk_steps: int, done: int) -> Iterator[Call]:
    """The calls up to each eval point that remains after `done` steps, of at most `chunk_steps` steps each."""
    for step in eval_steps:
        start = max(done, 0)
        while done < step:
            stop = min(start + chunk_steps, step)
            yield Call(start, stop, stop == step)
            done = start = stop


def feed(stream: Stream, calls: Iterator[Call], length: int, mesh: Mesh) -> Iterator[tuple[Call, Batch]]:
    """Calls with their batches [length, B, ...] on the devices, made in threads while the call before runs."""

    def load(call: Call) -> Batch:
        # An eval point without steps still needs batches of the right shape; so do places past the last step.
        steps = [min(step, max(call.stop - 1, 0)) for step in range(call.start, call.start + length)]
        different = list(dict.fromkeys(steps))
        rows = dict(zip(different, readers.map(stream.__getitem__, different), strict=True))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[rows[step] for step in steps])
        return place_batches(stacked, mesh)

    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as thread:
        waiting = None
        for call in calls:
            loading = call, thread.submit(load, call)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = loading
        if waiting:
            yield waiting[0], waiting[1].result()
