"""What a running phase tells its user: notices, warnings and progress, on stderr. Results go to stdout, elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int, str], None]
"""Says that so many more units are done, with a word on how it goes (e.g. `loss 1.23`)."""


class Reporter(Protocol):
    """Where phases say what they do. Anything with these three methods will do."""

    def notice(self, text: str) -> None:
        """Something that the user may want to know."""

    def warn(self, text: str) -> None:
        """Something that the user may have to act on."""

    def progress(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Follows work of `total` units, `done` of them by an earlier run, while the block runs."""


class ConsoleReporter:
    """Writes to a terminal: a bar with the time left. To a file or pipe: a plain line now and then, no colour."""

    def __init__(self, console: "Console | None" = None, seconds_between_lines: float = 5.0) -> None:
        """Uses stderr unless given another rich console; `seconds_between_lines` is for those that aren't terminals."""
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._seconds_between_lines = seconds_between_lines

    def notice(self, text: str) -> None:
        """Prints the text."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Prints the text after `warning:`, in yellow where there is colour."""
        self._print(f"warning: {text}", style="yellow")

    def progress(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """A bar on a terminal; else a line every few seconds, and one at the end of work that took over 2 seconds."""
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
            task = bar.add_task(name, total=total, completed=done, unit=unit, detail="")
            yield lambda units, detail: bar.update(task, advance=units, detail=detail)

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
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
