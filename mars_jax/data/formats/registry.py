"""Registry of data formats, and detection of the format of a row.

How to add a format:

1. Write `formats/NAME.py` with a `Format`: `NAME = Format(name="name", keys=..., detect=..., read=...)`. `base`
   describes its fields; `turns`, `pictures` and `options` have helpers.
2. Add a line for it at the end of `FORMATS`. Code outside this package calls `FORMATS.register(NAME)` instead.
3. Add a section with an example row to docs/data.md; the tests of `tests/data/formats/test_registry.py` run over them.

Formats are tried from the last to the first, so a new format takes precedence over the more general ones before it.
The answer rule of a benchmark is an `AnswerRule` registered in `evals.rules`; its format names it.
"""

from collections.abc import Mapping

from mars_jax.data.formats.base import Draft, FaultError, Format
from mars_jax.data.formats.keys import unread_keys
from mars_jax.data.formats.pictures import column_pictures, read_picture
from mars_jax.data.formats.turns import with_system
from mars_jax.runtime.registry import Registry
from mars_jax.runtime.text import json_type

FORMATS: Registry[Format] = Registry(
    "data format",
    {
        "llava": "mars_jax.data.formats.llava:LLAVA",  # detects every row, so it is tried last
        "llava_scienceqa": "mars_jax.data.formats.llava_scienceqa:LLAVA_SCIENCEQA",
        "vqa": "mars_jax.data.formats.vqa:VQA",
        "choices": "mars_jax.data.formats.choices:CHOICES",
        "mmbench": "mars_jax.data.formats.mmbench:MMBENCH",
        "mmstar": "mars_jax.data.formats.mmstar:MMSTAR",
        "scienceqa": "mars_jax.data.formats.scienceqa:SCIENCEQA",
        "messages": "mars_jax.data.formats.messages:MESSAGES",
    },
)


def detect(row: Mapping[str, object]) -> Format:
    """The format of a row: the last of `FORMATS` that detects it, `llava` if no other does."""
    return next(FORMATS[name] for name in reversed(FORMATS.names) if FORMATS[name].detect(row))


def draft(row: object) -> Draft:
    """Reads a row in its format.

    Args:
        row: a parsed entry of a file; it must be a JSON object.

    Raises:
        FaultError: the row is malformed; its arguments are all faults. The conversation is checked in `conversations`.
    """
    if not isinstance(row, dict):
        raise FaultError(f"the record is a JSON {json_type(row)}; an object with 'conversations' is expected.")
    data_format = detect(row)
    unread = unread_keys(row, data_format.keys)
    faults: list[str] = []
    columns = tuple(column_pictures(row, faults))
    try:
        conversation = data_format.read(row, len(columns))
        turns = with_system(row, conversation.turns)
    except FaultError as error:
        raise FaultError(*faults, *error.args) from None
    remaining = iter(columns)
    images: list[str | bytes] = []
    for source in conversation.pictures:
        try:
            images.append(next(remaining) if source is None else read_picture(source))
        except StopIteration:
            if not faults:
                faults.append(f"more pictures in 'messages' than the {len(columns)} of 'images'. Add the missing ones.")
            break
        except FaultError as error:
            faults += error.args
    if faults:
        raise FaultError(*faults)
    images += remaining
    tags = tuple(data_format.tags(row, len(images)))
    return Draft(data_format.name, tuple(images), turns, conversation.options, tags, unread)
