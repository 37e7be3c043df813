"""Notes on a file of samples: what was not read, put right or may surprise, each once with its number of rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mars_jax.runtime.text import readable

CHANGES = {
    "pictures_first": "pictures without <image>; they were put at the start of the first question",
    "cut": "turns after the last answer that is trained on; they were left out",
    "no_id": "an empty id; the row is called item-N, from its place in the file",
    "repeated_id": "an id that an earlier row has; the second row with an id ID is called ID#2, and so on",
    "boxes": "coordinates in the texts; they are not scaled where pictures are, by data.max_pixels or the "
    "image processor",
}
"""Kind -> what its rows have, and what was done."""

_KEYS_SHOWN, _LONGEST_KEY = 20, 60


@dataclass(slots=True)
class Notes:
    """Counts over the rows of a file.

    Attributes:
        unread: keys that were not read, with the number of rows.
        formats: formats of the rows.
        changes: number of rows of each of `CHANGES`.
        examples: the first row of each of `CHANGES`, with what was seen there.
        others: further notes, as they are.
    """

    unread: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def change(self, kind: str, example: str) -> None:
        """Counts a row of one of `CHANGES`."""
        self.changes[kind] += 1
        self.examples.setdefault(kind, example)

    def texts(self) -> Iterator[str]:
        """The notes."""
        yield from self.others
        if self.unread:
            listed = [f"{readable(key, _LONGEST_KEY)} {count}x" for key, count in self.unread.most_common(_KEYS_SHOWN)]
            more = len(self.unread) - len(listed)
            yield f"keys not read: {', '.join(listed)}" + (f", and {more} others" if more else "")
        if len(self.formats) > 1:
            listed = [f"{name} {count}x" for name, count in self.formats.most_common()]
            yield f"rows of different formats: {', '.join(listed)}; their answers are scored by the exact text"
        for kind in CHANGES:
            if self.changes[kind]:
                count = f"{self.changes[kind]} of {self.formats.total()} rows"
                yield f"{count}: {CHANGES[kind]} (the first: {self.examples[kind]})"
