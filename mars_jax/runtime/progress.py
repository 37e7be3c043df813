"""Notices, warnings and progress of a running phase, on stderr. Results go to stdout and are printed elsewhere.

Control characters are shown, not sent: ids, texts and paths in messages come from files that strangers wrote.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from mars_jax.runtime.text import visible

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int, str], None]
"""(units done since the last call, a short detail such as `loss 1.23`)."""


class Reporter(Protocol):
    """Receives the notices, warnings and progress of phases."""

    def notice(self, text: str) -> None:
        """Reports something that the user may want to know."""

    def warn(self, text: str) -> None:
        """Reports something that the user may have to act on."""

    def progress(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Shows the progress of work of `total` units, `done` of them by an earlier run, while the block runs."""


def make_console(stderr: bool) -> "Console":
    """A rich console on stderr or stdout. Where its reader has left it raises `BrokenPipeError` and ends no process."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise

    return _Console(stderr=stderr)


class ConsoleReporter:
    """Prints to a terminal with a progress bar, or to a file or pipe as plain lines without colour.

    A stream that can't be written any more, as after its reader left, ends no work: the run goes on in silence.
    """

    def __init__(self, console: "Console | None" = None, seconds_between_lines: float = 5.0) -> None:
        """Makes a reporter.

        Args:
            console: a rich console; None: one on stderr.
            seconds_between_lines: least time between two lines of progress, where there is no terminal.
        """
        self._console = console or make_console(stderr=True)
        self._seconds_between_lines = seconds_between_lines

    def notice(self, text: str) -> None:
        """Prints the text."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Prints `warning:` and the text, in yellow where there is colour."""
        self._print(f"warning: {text}", style="yellow")

    def progress(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Shows a bar on a terminal; else a line every few seconds, and one after work that took over 2 seconds."""
        follow = self._bar if self._console.is_terminal else self._lines
        return follow(name, total, unit, done)

    @contextmanager
    def _bar(self, name: str, total: int, unit: str, done: int) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(visible(name), total=total, completed=done, unit=unit, detail="")
            yield lambda units, detail: bar.update(task, advance=units, detail=visible(detail))

    @contextmanager
    def _lines(self, name: str, total: int, unit: str, earlier: int) -> Iterator[Advance]:
        start = last_line = time.monotonic()
        done = earlier
        text = ""

        def advance(units: int, detail: str) -> None:
            nonlocal done, text, last_line
            done += units
            now = time.monotonic()
            rate = (done - earlier) / (now - start)
            left = f", {_clock((total - done) / rate)} left" if rate > 0 and done < total else ""
            text = f"{name}: {done}/{total} {unit}{left}" + (f", {detail}" if detail else "")
            if now - last_line >= self._seconds_between_lines:
                last_line = now
                self._print(text)
                text = ""

        yield advance
        if text and time.monotonic() - start >= 2:
            self._print(f"{text}, took {_clock(time.monotonic() - start)}")

    def _print(self, text: str, style: str | None = None) -> None:
        try:
            self._console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            self._console.quiet = True


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
