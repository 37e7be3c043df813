"""Options of the benchmarks, the demo's config, fresh processes, and publishing a result.

It measures nothing, and imports neither JAX nor torch: a child process should hold only what it measures.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib.results import RESULTS, write_result
from mars_jax.runtime.environment import cpu_device_for_each_core
from mars_jax.runtime.jsonfiles import dump_json

if TYPE_CHECKING:
    from mars_jax.config.load import Config
    from mars_jax.runtime.progress import Advance

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"

Document = dict[str, Any]


def arguments(document: str | None) -> argparse.Namespace:
    """The options of a benchmark that has no others."""
    return argument_parser(document).parse_args()


def argument_parser(document: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small form that is only printed")
    parser.add_argument("--anyway", action="store_true", help="run on a busy machine too")
    parser.add_argument("--out", type=Path, help="write the result to this folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def publish(
    options: argparse.Namespace, name: str, figure: float, unit: str, goal: str, detail: Mapping[str, Any]
) -> None:
    """Prints the result; the full form, or one with `--out`, is written as well."""
    module = module_of(sys.modules["__main__"].__file__ or "")
    # Where the result is written is no part of how it was made.
    place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    place.add_argument("--out")
    command = shlex.join(["python", "-m", module, *place.parse_known_args()[1]])
    form = "short" if options.short else "full"
    folder = options.out or (None if options.short else RESULTS)
    write_result(name, figure, unit, goal, command, {"form": form, **detail}, folder)


def module_of(script: str | Path) -> str:
    """The name by which `python -m` runs a script of this repository, from its root."""
    return ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)


def run_child(script: str, spec: Mapping[str, Any], **environment: str) -> Document:
    """Runs `script --child SPEC` in a fresh process; returns the document that `answer` printed there.

    Raises:
        RuntimeError: the process failed; its messages are on stderr.
    """
    with start_child(script, spec, **environment) as process:
        return read_answer(process)


def start_child(script: str, spec: Mapping[str, Any], **environment: str) -> subprocess.Popen[str]:
    """Starts such a process, with pipes to its stdin and from its stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", module_of(script), "--child", dump_json(spec)],
        cwd=ROOT,
        env={**quiet_environment(), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def quiet_environment() -> dict[str, str]:
    """Environment of a child on the CPU, with a device for each core as in `mars`, and without XLA's false errors."""
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    return {**os.environ, **cpu_device_for_each_core(), **quiet}


def read_answer(process: subprocess.Popen[str]) -> Document:
    """What a child printed, once it has ended."""
    lines = process.communicate()[0].splitlines()
    if process.returncode or not lines:
        raise RuntimeError(f"{shlex.join(map(str, process.args))} ended with {process.returncode}")  # type: ignore[arg-type]
    return json.loads(lines[-1])


def answer(spec: str, work: Callable[..., Document]) -> None:
    """In the child: calls `work` with the spec's fields and prints its document, on the last line of stdout."""
    print(dump_json(work(**json.loads(spec))), flush=True)


# A run for each D, in place of the demo's single passes: what the published numbers were measured on.
SEPARATE = ("probe.sampling=separate", "probe.num_samples=[256,2048]", "probe.steps=80", "selection.method=laws")


# Probes of pairs of ranks at one learning rate: what the benchmarks of probes measure.
PROBED = (
    "lora.modules.vision.rates=[1]",
    "lora.modules.llm.rates=[1]",
    "probe.num_samples=[256,512,1024]",
    "convergence.rule=null",
    "selection.method=best_probes",
)


def demo_config(run_dir: Path | str, overrides: Sequence[str] = (), config: Path | str = DEMO) -> "Config":
    """The demo's config with probes of pairs of ranks, or another, with changes and another run directory."""
    from mars_jax.config.load import load_config

    return load_config(config, [f"run_dir={run_dir}", *(PROBED if config == DEMO else ()), *overrides])


class Warnings:
    """A reporter that prints warnings only, on stderr."""

    def notice(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Prints it."""
        print(f"warning: {text}", file=sys.stderr)

    def progress(self, name: str, total: int, unit: str, done: int = 0) -> "nullcontext[Advance]":
        """Nothing."""
        return nullcontext(lambda units, detail: None)
