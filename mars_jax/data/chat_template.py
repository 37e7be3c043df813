"""Renders chat templates as transformers does, with bounds on time, memory and output.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from attributes that run code, but
not from loops without end or texts of gigabytes; the environment here refuses those too.
"""

import functools
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 2.0
"""Limit on the time of one rendering."""
MAX_CHARACTERS = 2**23
"""Limit on the length of a rendering and of every text and list on the way."""
MAX_TEMPLATE = 2**20
"""Limit on the length of a template, in characters."""

_MAX_ITEMS = 2**18  # of a list, with those of the lists in it
_MAX_DIGITS = 4096  # of whole numbers
_MULTIPLYING = ("replace", "join", "indent", "translate")  # results as long as the product of their arguments
_MAX_PRODUCT = 2**27
_WIDE_FORMAT = re.compile(r"\d{6}|\*")  # a width in a format text; a hundred thousand characters or more

Message = Mapping[str, Any]
"""A turn as in chat templates: `role`, and `content`, a text or typed parts (which transformers' types lack)."""

# Time (`time.monotonic`) at which the present rendering is stopped. Threads share environments, but not this.
_DEADLINE: ContextVar[float] = ContextVar("deadline", default=math.inf)


class TemplateFaultError(Exception):
    """A chat template fails, refuses the messages, or exceeds a limit."""


def render(template: str, messages: Sequence[Message], special: Mapping[str, Any], *, ask: bool = False) -> str:
    """Renders messages.

    Args:
        template: the text of the template.
        messages: the conversation.
        special: special tokens by name, as templates read them (`bos_token`, ...).
        ask: whether the generation prompt follows the messages (`add_generation_prompt`).

    Raises:
        TemplateFaultError: whatever goes wrong; its text is the cause.
    """
    try:
        compiled = _compiled(template)
        _DEADLINE.set(time.thread_time() + SECONDS)
        chunks, length = [], 0
        values = {**special, "messages": [dict(message) for message in messages], "tools": None, "documents": None}
        for chunk in compiled.generate(values, add_generation_prompt=ask):
            length += len(chunk)
            _limit(length)
            chunks.append(chunk)
    except TemplateFaultError:
        raise
    except RecursionError:
        raise TemplateFaultError("it calls itself without end") from None
    except Exception as error:  # templates may do anything that an expression of Python may
        raise TemplateFaultError(f"{type(error).__name__}: {error}"[:500]) from error
    return "".join(chunks)


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise TemplateFaultError(f"it has {len(template):,} characters; at most {MAX_TEMPLATE:,} are read")
    return _Bounded().from_string(template)


class _Generation(Extension):
    """`{% generation %}`, which marks answers for other tools: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counted(NodeTransformer):
    """Makes every pass of a loop and every concatenation call the environment, which checks the limits."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join_texts")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the extensions and functions that transformers gives to chat templates, and limits."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_printed,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals.pop("lipsum")  # placeholder texts of any length
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        counted: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        return counted

    def tick(self) -> None:
        """Checks the thread's processor time; on a busy machine or a suspended one the clock goes on alone."""
        if time.thread_time() > _DEADLINE.get():
            raise TemplateFaultError(f"it takes more than {SECONDS:g} seconds of processor time for one conversation")

    def join_texts(self, *values: object) -> str:
        """The texts of some values, joined: the operator `~`."""
        texts = [str(value) for value in values]
        _limit(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right`, unless the result would be too large."""
        self.tick()
        if isinstance(left, int) and isinstance(right, int):
            if operator == "**":
                _limit(abs(right) * max(left.bit_length(), 1), 3 * _MAX_DIGITS)
            _limit(left.bit_length() + right.bit_length(), 3 * _MAX_DIGITS)
        elif operator == "*":
            lengths = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
            if all(isinstance(length, int) for length in lengths):
                _limit(math.prod(lengths))
        elif operator == "%" and isinstance(left, str):
            _refuse_wide(left)
        return _limited(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method, unless its result could be too large."""
        method = inspect.unwrap(function) if callable(function) else function
        self._check(getattr(method, "__name__", ""), getattr(method, "__self__", None), args, kwargs)
        return _limited(super().call(context, function, *args, **kwargs))

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks the limits. The wrapper keeps Jinja's mark of what is passed first."""
        passed = getattr(function, "jinja_pass_arg", None) is not None

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            value, *others = args[1:] if passed else args
            self._check(name, value, others, kwargs)
            return _limited(function(*args, **kwargs))

        return guarded

    def _check(self, name: str, value: object, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Refuses a call that could make something too large."""
        self.tick()
        arguments = [*args, *kwargs.values()]
        for argument in arguments:
            if isinstance(argument, int):
                _limit(abs(argument))
        if name in _MULTIPLYING:
            factors = (abs(item) + 1 if isinstance(item, int) else _size(item) for item in (value, *arguments))
            _limit(math.prod(factors), _MAX_PRODUCT)
        if name in ("format", "format_map"):
            _refuse_wide(str(value))


def _size(value: object) -> int:
    """Characters of a text, and of all texts in a list or mapping; at least 1."""
    size, items, inside = 1, 0, [value]
    while inside:
        item = inside.pop()
        items += 1
        _limit(items, _MAX_ITEMS)
        size += len(item) if isinstance(item, str | bytes | list | tuple | Mapping) else 1
        _limit(size)
        if isinstance(item, Mapping):
            inside += item.values()
        elif isinstance(item, list | tuple):
            inside += item
    return size


def _limit(size: int, most: int = MAX_CHARACTERS) -> None:
    if size > most:
        raise TemplateFaultError("it makes a text, list or number without measure")


def _limited(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _limit(len(value))
    return value


def _printed(value: Any) -> Any:
    """Checks a value before it becomes text."""
    if isinstance(value, list | tuple | Mapping):
        _size(value)
    return _limited(value)


def _refuse_wide(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateFaultError(f"it formats a text with a width of a hundred thousand or more: {text[:60]!r}")


def _raise_exception(message: str) -> None:
    raise TemplateFaultError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
