"""The command `mars`: parses arguments, runs a pipeline of `mars_jax.pipeline` and prints its result.

Heavy imports are inside functions, so that `mars --help` and errors of the config are quick.
"""

import ctypes
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

import mars_jax
from mars_jax.errors import ConfigError, DoesNotFitError, MarsError
from mars_jax.runtime.environment import cpu_device_for_each_core

if TYPE_CHECKING:
    from rich.table import Table

    from mars_jax.config.load import Config
    from mars_jax.runtime.jsonfiles import Document
    from mars_jax.runtime.progress import Reporter

BUG, INTERRUPTED, NO_READER = 1, 130, 141  # the last as shells have it for SIGPIPE
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_FILE_WIDTH = 200  # characters: a table in a file or pipe has no window to fit

app = typer.Typer(
    name="mars",
    help=(
        "Finds the LoRA ranks of a multimodal LLM's modules from short probes, then fine-tunes with them. "
        "Every command may be run again: finished work is skipped, interrupted work goes on. "
        "Exit codes: 0 done, 2 config, 3 data, 4 does not fit, 5 no valid result, 130 interrupted."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Source = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config, or the run directory made with one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.SUB=VALUE",
        help="Settings that replace those of the config. Relative paths: from the config's folder; run_dir: from here.",
    ),
]
Tables = Callable[["Document"], Iterable["Table"]]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, human text on stderr.")]


def main() -> None:
    """Entry point of the command."""
    # transformers advises installing PyTorch, which isn't needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # XLA logs a false error for each program that it loads from the compile cache on a CPU with AVX-512
    # (openxla/xla#44565). Its true errors also raise exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ |= cpu_device_for_each_core()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the stream's encoding lacks is written as an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            _flush()
    except OSError as error:
        sys.exit(_without_stdout(error))


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mars_jax {mars_jax.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def _pipeline(name: str, help: str) -> None:
    """Adds the command of a pipeline of `pipeline.PIPELINES`."""

    def command(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
        def work(config: "Config", reporter: "Reporter") -> "Document":
            from mars_jax.pipeline import run_pipeline

            return run_pipeline(name, config, reporter)

        _execute_job(work, config, overrides, json_output)

    app.command(name, help=help)(command)


_pipeline("run", "All phases, from plan to report.")


@app.command()
def check(
    config: Source,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="Samples to show as the model sees them.")] = 3,
    json_output: Json = False,
) -> None:
    """Check config, data and LoRA targets first."""
    from mars_jax.runtime.tables import check_tables

    def work(config: "Config", reporter: "Reporter") -> "Document":
        from mars_jax import pipeline

        return pipeline.check(config, reporter, show=show)

    _execute_job(work, config, overrides, json_output, check_tables)


_pipeline("plan", "List the lanes, their cost, and if they fit.")
_pipeline("probe", "Run the short LoRA runs that the laws need.")
_pipeline("fit", "Fit both scaling laws to the finished lanes.")
_pipeline("select", "Pick the ranks by the config's strategy.")
_pipeline("finetune", "Train once with the picked ranks.")
_pipeline("evaluate", "Measure the base and the result on test data.")


@app.command()
def export(
    config: Source,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load it in PyTorch and compare logits and answers.")
    ] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Also write the merged checkpoint.")] = False,
    json_output: Json = False,
) -> None:
    """Write the PEFT adapter for other tools."""

    def work(config: "Config", reporter: "Reporter") -> "Document":
        from mars_jax import pipeline

        return pipeline.export(config, reporter, verify=verify, merged=merged)

    _execute_job(work, config, overrides, json_output)


_pipeline("compare", "Train the pick and its alternatives side by side.")


@app.command()
def diff(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that is evaluated.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another, on the same test samples.")],
    json_output: Json = False,
) -> None:
    """Compare two evaluated runs sample by sample."""

    def work(reporter: "Reporter") -> "Document":
        from mars_jax.evals.paired import difference
        from mars_jax.job import files
        from mars_jax.job.directory import RunDirectory

        for directory in (run, other):
            RunDirectory(directory).book.check(files.SAMPLES)
        return difference(run / files.SAMPLES, other / files.SAMPLES, reporter.warn)

    execute(work, json_output=json_output)


_pipeline("report", "Write the HTML page on what the run found.")


@app.command()
def status(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Show how far a run is."""

    def work(reporter: "Reporter") -> "Document":
        from mars_jax.config.load import load_config
        from mars_jax.job.directory import RunDirectory
        from mars_jax.job.status import run_status

        return run_status(RunDirectory(load_config(config, overrides or ()).run_dir), reporter.warn)

    execute(work, json_output=json_output)


def execute(work: Callable[["Reporter"], "Document"], *, json_output: bool, tables: Tables | None = None) -> None:
    """Runs work and prints its result; ends the process with the exit code of the error, if work raises one.

    Args:
        work: takes a reporter on stderr and returns a JSON document. All that it prints goes to stderr, so that stdout
            has the result alone.
        json_output: print the result as one JSON document on stdout, and the tables on stderr; a `MarsError` or an
            interrupt as `{"error": {"type", "message", "exit_code"}}`.
        tables: makes the tables of the result; None: `runtime.tables.tables`.

    Raises:
        typer.Exit: the work or the print failed, or Ctrl-C or SIGTERM ended it. Exceptions that nothing expects are
            bugs; their traceback goes to a file, which the message names.
    """
    from mars_jax.runtime.progress import ConsoleReporter

    try:
        with _sigterm_as_interrupt(), _stdout_to_stderr():
            result = work(ConsoleReporter())
    except MarsError as error:
        _fail(type(error).__name__, str(error), error.exit_code, json_output)
    except OSError as error:
        _fail(type(error).__name__, *_of_files(error), json_output)
    except Exception as error:  # anything else is a bug of ours: reported as one, with its traceback in a file
        if _is_of_memory(error):
            from mars_jax.runtime.text import short

            cause = f" ({short(str(error))})" if str(error) else ""
            message = f"the memory is full{cause}. Finished work is kept. Ask for less, or take more."
            _fail(type(error).__name__, message, DoesNotFitError.exit_code, json_output)
        _fail(type(error).__name__, _bug(error), BUG, json_output)
    except KeyboardInterrupt as interrupt:  # `Interrupted` has a message
        message = str(interrupt) or "state saved; run the same command again to go on"
        _fail("Interrupted", message, INTERRUPTED, json_output)
    else:
        try:
            _print_result(result, json_output, tables)
        except OSError as error:
            raise typer.Exit(_without_stdout(error)) from None


def _execute_job(
    work: Callable[["Config", "Reporter"], "Document"],
    source: Path,
    overrides: list[str] | None,
    json_output: bool,
    tables: Tables | None = None,
) -> None:
    """Loads the config and the compile cache, then executes `work`."""

    def loaded(reporter: "Reporter") -> "Document":
        from mars_jax.config.load import load_config

        config = load_config(source, overrides or ())
        # Imported after the config is checked, because it imports JAX.
        from mars_jax.runtime import compile_cache

        try:
            compile_cache.enable()
        except ConfigError as error:
            reporter.warn(f"{error} This run goes on and compiles what it needs.")
        return work(config, reporter)

    execute(loaded, json_output=json_output, tables=tables)


def _print_result(result: "Document", json_output: bool, make_tables: Tables | None) -> None:
    from mars_jax.runtime.jsonfiles import dump_json
    from mars_jax.runtime.progress import make_console
    from mars_jax.runtime.tables import tables

    if json_output:
        print(dump_json(result, indent=2, ascii=True))
    console = make_console(stderr=json_output)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    try:
        for table in (make_tables or tables)(result):
            console.print(table, "")
    except OSError:
        if not json_output:
            raise
        # The result itself is on stdout, whole.
    _flush()


def _of_files(error: OSError) -> tuple[str, int]:
    """Message and exit code of what the file system refused."""
    if error.errno in _NO_ROOM:
        message = (
            f"can't write {error.filename or 'a file'}: {error.strerror}. Finished work is kept. Make room there and "
            "run the same command again to go on."
        )
        return message, DoesNotFitError.exit_code
    if error.filename is not None:
        message = (
            f"can't use {error.filename}: {error.strerror}. Finished work is kept. Check the path, its kind and its "
            "rights, and run the same command again to go on."
        )
        return message, ConfigError.exit_code
    return _bug(error), BUG


def _bug(error: Exception) -> str:
    """A line on an exception that nothing expects, whose traceback is kept in a file."""
    import tempfile
    import traceback

    from mars_jax.runtime.text import short

    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="mars-traceback-", suffix=".txt", delete=False
        ) as file:
            file.write(text)
        where = f"is in {file.name}"
    except OSError:
        _print_error(text)
        where = "is above"
    return (
        f"a bug of mars_jax, not of your input: {type(error).__name__}: {short(str(error))}. The traceback {where}; "
        "please report it with the command. Finished work is kept."
    )


def _fail(kind: str, message: str, exit_code: int, json_output: bool) -> None:
    from mars_jax.runtime.jsonfiles import dump_json

    _print_error(f"mars: {message}")
    if json_output:
        with suppress(OSError):
            print(
                dump_json({"error": {"type": kind, "message": message, "exit_code": exit_code}}, indent=2, ascii=True)
            )
    raise typer.Exit(exit_code)


def _print_error(text: str) -> None:
    """On stderr, if there is one that takes it; control characters are shown, not sent."""
    from mars_jax.runtime.text import visible

    if sys.stderr is not None:
        with suppress(OSError):
            print(visible(text), file=sys.stderr, flush=True)


def _flush() -> None:
    """Writes what waits for stdout now: at the end of the process a failure couldn't be reported any more."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _without_stdout(error: OSError) -> int:
    """The exit code where stdout can't be written. A reader that left, as `head` does, is worth no message."""
    # What still waits for stdout is written when the process ends; that must not fail again.
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return NO_READER
    _print_error(f"mars: can't write the result to stdout: {error.strerror}. Finished work is kept.")
    return DoesNotFitError.exit_code


def _is_of_memory(error: Exception) -> bool:
    """Whether Python's memory is full, or XLA's, which has no type of its own for it."""
    jax = sys.modules.get("jax")
    of_xla = jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError) or of_xla


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keeps stdout for the result: libraries print to it too, those in other languages past `sys.stdout`."""
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        if sys.__stdout__ and sys.__stderr__:
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            stack.callback(ctypes.CDLL(None).fflush, None)  # C has a buffer of its own for stdout
            os.dup2(2, 1)
        yield


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raises `KeyboardInterrupt` on SIGTERM, with which schedulers stop a job, so that its state is saved."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
