"""Where in a document the faults are that pydantic reports."""

from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]
"""Keys and list indices from the top of a document to a value in it."""


def location_of(fault: ErrorDetails, document: object) -> Location:
    """The place of a fault in a document, without pydantic's names of the branches of unions.

    A missing key's place is where it would be.
    """
    location: list[str | int] = []
    for part in fault["loc"]:
        children = dict(enumerate(document)) if isinstance(document, list) else document
        if isinstance(children, dict) and part in children:
            document = children[part]
            location.append(part)
    return (*location, fault["loc"][-1]) if fault["type"] == "missing" else tuple(location)


def innermost(locations: Iterable[Location]) -> list[Location]:
    """The places that hold no other: a union reports the whole and, in the branch that fits, the part."""
    places = list(dict.fromkeys(locations))
    return [place for place in places if not any(other != place and other[: len(place)] == place for other in places)]


def value_at(document: Any, location: Location) -> Any:
    """The value at a place of a document."""
    for part in location:
        document = document[part]
    return document
