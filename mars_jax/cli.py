"""The command `mars`: arguments in, one function of `mars_jax.pipeline` called, its result out. No work is done here.

Imports of weight are inside functions, so that `mars --help` and a mistyped config answer at once.
"""

import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mars_jax
from mars_jax.errors import ConfigError, DoesNotFitError, MarsError
from mars_jax.runtime.environment import cpu_device_for_each_core

if TYPE_CHECKING:
    from rich.table import Table

    from mars_jax.runtime.progress import Reporter

INTERRUPTED = 130
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
        help="Settings that win over the config. Relative paths: from the config's folder; run_dir: from here.",
    ),
]
Show = Callable[[Mapping[str, Any]], Iterable["Table"]]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, human text on stderr.")]


def main() -> None:
    """Entry point of the command."""
    # transformers advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # XLA logs an error, a false one, for each program for a CPU with AVX-512 that comes from the compile cache
    # (openxla/xla#44565). Its true errors are exceptions too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ |= cpu_device_for_each_core()
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mars_jax {mars_jax.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def run(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """All phases, from plan to report."""
    _call("run", config, overrides, json_output)


@app.command()
def check(
    config: Source,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="Samples to show as the model sees them.")] = 3,
    json_output: Json = False,
) -> None:
    """Check config, data and LoRA targets first."""
    from mars_jax.runtime.tables import check_tables

    _call("check", config, overrides, json_output, tables=check_tables, show=show)


@app.command()
def plan(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """List the lanes, their cost, and if they fit."""
    _call("plan", config, overrides, json_output)


@app.command()
def probe(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Run the short LoRA runs that the laws need."""
    _call("probe", config, overrides, json_output)


@app.command()
def fit(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Fit both scaling laws to the finished lanes."""
    _call("fit", config, overrides, json_output)


@app.command()
def select(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Pick the ranks by the fitted laws."""
    _call("select", config, overrides, json_output)


@app.command()
def finetune(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Train once with the picked ranks."""
    _call("finetune", config, overrides, json_output)


@app.command()
def evaluate(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Measure the base and the result on test data."""
    _call("evaluate", config, overrides, json_output)


@app.command()
def export(
    config: Source,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load it in PyTorch and compare the logits.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Also write the merged checkpoint.")] = False,
    json_output: Json = False,
) -> None:
    """Write the PEFT adapter for other tools."""
    _call("export", config, overrides, json_output, verify=verify, merged=merged)


@app.command()
def compare(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Train the pick and its alternatives side by side."""
    _call("compare", config, overrides, json_output)


@app.command()
def diff(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that is evaluated.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another, on the same test samples.")],
    json_output: Json = False,
) -> None:
    """Compare two evaluated runs sample by sample."""

    def work(reporter: "Reporter") -> Mapping[str, Any]:
        from mars_jax.evals.paired import difference
        from mars_jax.job.directory import RunDirectory

        return difference(RunDirectory(run).samples_file, RunDirectory(other).samples_file, reporter.warn)

    execute(work, json_output=json_output)


@app.command()
def report(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Write the HTML page on what the run found."""
    _call("report", config, overrides, json_output)


@app.command()
def status(config: Source, overrides: Overrides = None, json_output: Json = False) -> None:
    """Say how far a run is."""

    def work(reporter: "Reporter") -> Mapping[str, Any]:
        from mars_jax.config.load import load_config
        from mars_jax.job.directory import RunDirectory

        return RunDirectory(load_config(config, overrides or ()).run_dir).status(reporter.warn)

    execute(work, json_output=json_output)


def execute(work: Callable[["Reporter"], Mapping[str, Any]], *, json_output: bool, tables: Show | None = None) -> None:
    """Runs `work` and prints its result; ends the process with the exit code of the error that it raised, if any.

    Args:
        work: takes a reporter on stderr and returns a document that JSON can hold. What it, or a library under it,
            prints goes to stderr, so that stdout holds the result alone.
        tables: of the result, for people; None: those of any document.
        json_output: print the result as one JSON document instead of tables; so also a `MarsError` or an interrupt:
            `{"error": {"type", "message", "exit_code"}}`.

    Raises:
        typer.Exit: a `MarsError`, Ctrl-C or SIGTERM ended the work. Other exceptions pass: they are our bugs.
    """
    from mars_jax.runtime.progress import ConsoleReporter

    try:
        with _sigterm_as_interrupt(), redirect_stdout(sys.stderr):
            result = work(ConsoleReporter())
    except MarsError as error:
        _fail(type(error).__name__, str(error), error.exit_code, json_output)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        message = (
            f"can't write {error.filename or 'a file'}: {error.strerror}. Finished work is kept. Make room there and "
            "run the same command again to go on."
        )
        _fail(type(error).__name__, message, DoesNotFitError.exit_code, json_output)
    except KeyboardInterrupt as interrupt:  # an `Interrupted` says more
        message = str(interrupt) or "state saved; run the same command again to go on"
        _fail("Interrupted", message, INTERRUPTED, json_output)
    else:
        _print_result(result, json_output, tables)


def _call(
    name: str,
    source: Path,
    overrides: list[str] | None,
    json_output: bool,
    tables: Show | None = None,
    **options: Any,
) -> None:
    def work(reporter: "Reporter") -> Mapping[str, Any]:
        from mars_jax.config.load import load_config

        config = load_config(source, overrides or ())
        # Imported once the config is known to be right: they bring JAX along.
        from mars_jax.runtime import compile_cache

        try:
            compile_cache.enable()
        except ConfigError as error:
            reporter.warn(f"{error} This run goes on and compiles what it needs.")
        pipeline = importlib.import_module("mars_jax.pipeline")
        return getattr(pipeline, name)(config, reporter, **options)

    execute(work, json_output=json_output, tables=tables)


def _print_result(result: Mapping[str, Any], json_output: bool, show: Show | None) -> None:
    from rich.console import Console

    from mars_jax.runtime.jsonfiles import dump_json
    from mars_jax.runtime.tables import tables

    if json_output:
        typer.echo(dump_json(result, indent=2))
    console = Console(stderr=json_output)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for table in (show or tables)(result):
        console.print(table, "")


def _fail(kind: str, message: str, exit_code: int, json_output: bool) -> None:
    from mars_jax.runtime.jsonfiles import dump_json

    typer.echo(f"mars: {message}", err=True)
    if json_output:
        typer.echo(dump_json({"error": {"type": kind, "message": message, "exit_code": exit_code}}, indent=2))
    raise typer.Exit(exit_code)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Schedulers stop a job with SIGTERM; it must save its state as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
