"""SIGINT and SIGTERM as a request that work checks between chunks, when its state is consistent. Saves nothing itself.

with Interrupts() as interrupts:
    for chunk in chunks:
        work(chunk)
        if interrupts.requested:
            save()
            raise Interrupted("checkpoint at step 40; run the same command again to go on")
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from mars_jax.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupts:
    """Handles both signals while the block runs, in the main thread only (in other threads it does nothing).

    The first signal sets `requested`; the next raises `Interrupted` at once. Python handles signals between two of its
    own instructions, so a signal during a running device program waits for its end, and two of one kind count once.
    A signal that this process was started to ignore (`nohup`, `&` in a script) stays ignored.

    When the block ends, the previous handlers are restored. If it ends without an exception after a signal, that signal
    is raised again for them, so that a request too late for the block isn't lost.

    Attributes:
        requested: the signal received, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # None: a handler not set by Python, which Python couldn't restore.
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            signal.raise_signal(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Interrupted(
                "stopped at once: what was done since the last checkpoint is lost; run the same command again to go on"
            )
        self.requested = signal.Signals(number)
