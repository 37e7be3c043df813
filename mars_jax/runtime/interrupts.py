"""SIGINT and SIGTERM as a request that work looks at between chunks, when its state is whole. It saves nothing itself.

with Interrupts() as interrupts:
    for chunk in chunks:
        work(chunk)
        if interrupts.requested:
            save()
            raise Interrupted("checkpoint at step 40; run the same command again to go on")
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mars_jax.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Takes over both signals while the block runs, in the main thread only (in others it does nothing).

    The first one sets `requested`; the next raises `Interrupted` at once. Python handles signals between two of its own
    instructions, so one that comes in a running program of the device waits for it, and two of a kind then count once.
    A signal that this process was started to ignore (`nohup`, `&` in a script) stays ignored.

    When the block ends, the former handlers are back. If it ended without an exception though a signal had come, that
    signal is raised again for them: a request that came too late for the block isn't lost.

    Attributes:
        requested: the signal that came, if one did.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                former = signal.getsignal(number)
                # None: a handler not set by Python, which Python couldn't put back.
                if former not in (signal.SIG_IGN, None):
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            signal.raise_signal(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Interrupted(
                "stopped at once: what was done since the last checkpoint is lost; run the same command again to go on"
            )
        self.requested = signal.Signals(number)
