"""Lists of turns: their roles and texts, and which answers are trained on."""

from collections.abc import Mapping

from mars_jax.data.formats.base import ROLES, FaultError, Turn
from mars_jax.data.formats.keys import LEARN, MOST_FAULTS, SYSTEM
from mars_jax.data.values import is_absent
from mars_jax.runtime.text import json_type, short


def read_turns(row: Mapping[str, object], key: str, speaker: str, text: str) -> tuple[Turn, ...]:
    """The turns of a row's list of messages.

    Args:
        row: the row.
        key: its column with the list.
        speaker: key of a message's role, one of `ROLES`.
        text: key of a message's text.

    Raises:
        FaultError: the column holds no list, or a message is malformed.
    """
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise FaultError(f"{key!r} is {short(messages)}; a list of {{{speaker!r}, {text!r}}} turns is expected.")
    malformed = [
        f"turn {number} is {short(turn)}; an object with the strings {speaker!r} and {text!r} is expected."
        f"{_other_column(turn, key)}"
        for number, turn in enumerate(messages)
        if not (isinstance(turn, dict) and isinstance(turn.get(speaker), str) and isinstance(turn.get(text), str))
    ] or [
        f"turn {number} is from {short(turn[speaker])}; allowed: {', '.join(ROLES)}."
        for number, turn in enumerate(messages)
        if turn[speaker] not in ROLES
    ]
    if malformed:
        raise FaultError(*malformed[:MOST_FAULTS])
    return tuple(
        Turn(ROLES[turn[speaker]], turn[text], learn=_learn(turn, ROLES[turn[speaker]], number))
        for number, turn in enumerate(messages)
    )


def _other_column(turn: object, key: str) -> str:
    """Where turns like this one are read, if it is another column, or ""."""
    for column, speaker, text in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(turn, dict) and {speaker, text} <= turn.keys() and column != key:
            return f" Turns of {speaker!r} and {text!r} are read from {column!r}: rename {key!r}."
    return ""


def _learn(turn: Mapping[str, object], role: str, number: int) -> bool:
    """Whether a turn is trained on, by its keys `LEARN`."""
    given = {key: turn[key] for key in LEARN if not is_absent(turn.get(key))}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise FaultError(
                f"turn {number}: {key!r} is {short(value)} ({json_type(value)}); true or 1 (trained on) and false or 0 "
                "(not) are read, weights between them are not. Write one of these."
            )
        if value and role != "assistant":
            raise FaultError(
                f"turn {number}: {key!r} is {short(value)} in a turn of the {role}; only answers are trained on. Take "
                "the key out of other turns."
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise FaultError(f"turn {number}: {' and '.join(map(repr, given))} contradict each other. Keep one of them.")
    return all(given.values())


def with_system(row: Mapping[str, object], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns without empty system turns, after one with the text of the row's column `SYSTEM`, if any.

    Raises:
        FaultError: the column holds no text, or there are several system texts.
    """
    given = {key: row[key] for key in SYSTEM if not is_absent(row.get(key))}
    turns = tuple(turn for turn in turns if turn.role != "system" or turn.text.strip())
    sources = [repr(key) for key in given] + ["a system turn"] * any(turn.role == "system" for turn in turns)
    for key, value in given.items():
        if not isinstance(value, str):
            raise FaultError(f"{key!r} is {short(value)} ({json_type(value)}); a text is expected.")
    if len(sources) > 1:
        raise FaultError(f"the row has {' and '.join(sources)}; one system text is read. Keep one of them.")
    text = next(iter(given.values()), "")
    return (Turn("system", str(text)), *turns) if str(text).strip() else turns
