"""Reads YAML of a config under limits: size, depth, aliases, tags and digits, each refused at its line.

PyYAML alone builds whatever a text asks for: ten lines of aliases make a billion values, and a tag may raise any error.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from mars_jax.runtime.faults import Location
from mars_jax.runtime.text import short

MAX_CHARACTERS = 2**20
MAX_DEPTH = 20
MAX_VALUES = 20_000  # after aliases are filled in
MAX_DIGITS = 40

_INT, _FLOAT, _MERGE, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge", "str"))


class YamlError(ValueError):
    """A text that is not read."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line

    def at(self, origin: str) -> str:
        """The message, with the name of the text and the line in it."""
        return f"{origin}: {self}" if self.line is None else f"{origin}, line {self.line}: {self}"


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that reads `1e-3` as a number, and no dates, which no setting is."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# In YAML 1.1, and so in PyYAML, it is text.
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


@dataclass(frozen=True)
class YamlText:
    """What a text holds.

    Attributes:
        value: of the whole text; None where it is empty.
        lines: the line of each key of its mappings, from 1.
    """

    value: Any
    lines: dict[Location, int]


def read_yaml(text: str) -> YamlText:
    """Reads one YAML document.

    Raises:
        YamlError: it is not YAML, or beyond the limits of this module.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"the text is not read: it has more than {MAX_CHARACTERS} characters")
    try:
        _check_events(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlText(None, {})
        _check_size(node)
        lines = dict(_key_lines(node, ()))
        return YamlText(_unshared(loader.construct_document(node)), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(f"the text is not YAML: {reason}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise YamlError(f"the text is not YAML: {' '.join(str(error).split())}") from None


def _check_events(text: str) -> None:
    """Refuses depth, numbers of values and explicit tags before anything is built."""
    depth, values = 0, 0
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        values += isinstance(event, yaml.NodeEvent)
        if values > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES} keys and values", line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise YamlError(f"more than {MAX_DEPTH} lists and mappings within each other", line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise YamlError(
                f"the tag {_written(tag)!r} is not read. Write the value without a tag; in quotes it is text.", line
            )


def _check_size(root: yaml.Node) -> None:
    """Refuses aliases within themselves or to more values than are read, and numbers of too many digits."""
    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}

    def visit(node: yaml.Node) -> None:
        line = node.start_mark.line + 1
        key = id(node)
        if key in sizes:
            if not sizes[key]:
                raise YamlError("the value holds itself, by an alias. Write it out.", line)
            return
        sizes[key] = 0  # being visited
        children = list(_children(node))
        for child in children:
            visit(child)
        sizes[key] = 1 + sum(sizes[id(child)] for child in children)
        depths[key] = 1 + max((depths[id(child)] for child in children), default=0)
        if sizes[key] > MAX_VALUES or depths[key] > MAX_DEPTH + 1:
            raise YamlError(
                f"with its aliases this holds {short(sizes[key])} values, {depths[key]} deep; at most {MAX_VALUES} "
                f"values, {MAX_DEPTH} deep, are read.",
                line,
            )
        if node.tag in (_INT, _FLOAT):
            _check_number(node.value, line)

    visit(root)


def _check_number(text: str, line: int) -> None:
    if len(text) > MAX_DIGITS:
        raise YamlError(f"a number of {len(text)} characters; at most {MAX_DIGITS} are read.", line)
    if ":" in text or re.match(r"[-+]?0[0-9_xb]", text):
        raise YamlError(
            f"{text!r} has a colon or begins with 0, for which YAML may read it to another base than ten. Write it to "
            "base ten, without them.",
            line,
        )


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise YamlError(f"a key is {_kind(key)}; keys are text. Put it in quotes.", key.start_mark.line + 1)
            if not key.value.isprintable():
                raise YamlError(
                    f"the key {short(key.value)} has characters that no setting has.", key.start_mark.line + 1
                )
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _key_lines(node: yaml.Node, location: Location) -> Iterator[tuple[Location, int]]:
    """Each key with its line.

    Raises:
        YamlError: a key is there twice.
    """
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            child = (*location, key.value)
            if key.value in seen:
                name = ".".join(map(str, child))
                raise YamlError(f"{name} is set twice, first at line {seen[key.value]}. Keep one.", line)
            seen[key.value] = line
            yield child, line
            yield from _key_lines(value, child)
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            yield from _key_lines(value, (*location, place))


def _unshared(value: Any) -> Any:
    """The same value, in which what an alias repeats is a copy: an override of one place must not change the other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _kind(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list or mapping"
    return f"{short(node.value)}, which YAML reads as {_written(node.tag)[2:]}"


def _written(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")[:80]
