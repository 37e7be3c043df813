"""Regular expressions over the names of linears, from configs and adapter files, matched in linear time.

The engine is RE2: Python's own can take for ever on a pattern such as `(a+)+$`, and what a stranger's file holds must
not decide how long a command takes. Python's parser reads the pattern first, because its errors have positions.
"""

import re
import warnings
from functools import lru_cache
from typing import Protocol

MAX_PATTERN = 10_000  # characters


class Pattern(Protocol):
    """A compiled expression."""

    def fullmatch(self, text: str) -> object | None:
        """What the whole text is to the expression; None: no match."""


@lru_cache(maxsize=1024)
def compile_pattern(expression: str) -> Pattern:
    """Compiles an expression.

    Raises:
        ValueError: it is no regular expression, or one that RE2 can't match in linear time; says where.
    """
    import re2

    if len(expression) > MAX_PATTERN:
        raise ValueError(f"has {len(expression)} characters; allowed are {MAX_PATTERN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            re.compile(expression)
        if short := re.search(r"(?<!\\)\{,\d+\}", expression):
            raise ValueError(f"has a repetition without a lower bound at position {short.start()}: write {{0,N}}")
        options = re2.Options()
        options.log_errors = False
        compiled: Pattern = re2.compile(expression, options)
    except FutureWarning as warning:  # of sets such as [[:alpha:]], in which the engines differ
        raise ValueError(f"has a set that can be read in two ways: {warning}") from None
    except (re.error, OverflowError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    except RecursionError:
        raise ValueError("is not a regular expression: its brackets nest too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"is not text: lone surrogate at position {error.start}") from None
    except re2.error as error:
        raise ValueError(_beyond_re2(expression, error)) from None
    return compiled


def _beyond_re2(expression: str, error: Exception) -> str:
    """What RE2 refuses, with the position of the part that it names."""
    reason = error.args[0].decode(errors="replace") if error.args else "no reason given"
    part = reason.rpartition(": ")[2]
    place = f" at position {expression.index(part)}" if part and part in expression else ""
    return (
        f"can't be matched in linear time: {reason}{place}. Backreferences, (?=...), (?!...), (?<...) and repetitions "
        "beyond 1,000 are not read; write the names out as alternatives, such as (q|v)_proj"
    )
