"""The errors that users see, and the exit code of each. Nothing else: no handling, no formatting.

A message says what was wrong, where, the value seen, what is allowed, and what to do.
"""


class MarsError(Exception):
    """Base of every error that the command line reports without a traceback."""

    exit_code = 1


class ConfigError(MarsError):
    """The user's configuration, command, checkpoint path or run directory is wrong."""

    exit_code = 2


class DataError(MarsError):
    """A data file, image or record is wrong."""

    exit_code = 3


class DoesNotFitError(MarsError):
    """The work does not fit the machine."""

    exit_code = 4


class NoValidResultError(MarsError):
    """The runs finished but give nothing valid to go on with."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """The user or a scheduler stopped the work (exit code 130).

    Its text says what was saved and how to go on. A `KeyboardInterrupt`, so that nothing that handles errors takes it
    for one.
    """
