"""Kills and power cuts that a running job survives with results that are the same to the last bit.

A job on a cluster can end at any moment, and the commands promise to go on as if nothing had happened. A small job with
every phase (`mars run`, then `mars compare`) is killed (SIGKILL) at random moments and started again until it is done.
A kill is survived if every later process ends well, and if all results are byte for byte those of an undisturbed run. A
power cut is a kill after which the run directory also loses all that was not synced, by the two models of `power`, in
turn; it is survived if, besides, no phase that state.json called done was done again.

    python -m benchmarks.compat.kills [--short] [--anyway] [--out FOLDER] [--folder FOLDER]

With `--folder` everything is kept there, a line for each run directory that came to its end in runs.jsonl: the same
command goes on where it was stopped, and publishes once there are enough of them.

Definitions. The job is that of the end-to-end tests (tests/helpers/tiny_job.py: a random checkpoint, programs compiled
without optimizations), with lanes and final runs long enough for the checkpoints that users have, one in ten seconds.
Moments are drawn evenly from `BEFORE` to `AFTER` of the time that both commands take. Lives that end before their kill
finish their run directory; the last one is not killed. Even moments hardly ever hit phases of milliseconds, so besides
three run directories, one for kills and one for each model of a power cut, are stopped once in every phase. The
compared files are `COMPARED`, without the seconds in them.

figure = kills and power cuts survived.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.compat.power import MODELS, Model, cut
from benchmarks.lib.child import Document, argument_parser, publish
from mars_jax.runtime.jsonfiles import append_jsonl, read_jsonl
from tests.helpers import tiny_job

COMPARED = (
    *("probes/lanes.jsonl", "probes/curves.jsonl", "laws.json", "selection.json", "sweep/runs.json"),
    *("finetune/metrics.jsonl", "finetune/summary.json", "finetune/adapters.safetensors"),
    *("evaluation.json", "samples.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"),
    *("adapter/mars.json", "merged/model.safetensors", "merged/config.json", "compare/trials.jsonl", "compare.json"),
)
JOB = {
    "probe": {"num_samples": [8, 32], "steps": 384, "patience": None},
    "finetune": {"steps": 2048, "warmup_steps": 2, "look_every": 256},
    "export": {"merged": True},
}
SHORT_JOB = {"probe": {"num_samples": [8, 16]}, "export": {"merged": True}}
COMMANDS = ("run", "compare")
SEED = 0
KILLS, CUTS = 200, 50
SHORT_KILLS, SHORT_CUTS = 2, 2
BEFORE, AFTER = 0.03, 0.6  # shares of the time of a job that finds its programs on disk
_RECORD = "from pathlib import Path; from benchmarks.compat.power import record; record(Path({!r}), Path({!r})); "


@dataclass(frozen=True)
class Place:
    """Where base, data, compiled programs and run directories lie."""

    folder: Path
    sections: Document

    def config(self, name: str) -> Path:
        """The config of a run directory of this name."""
        base, train = self.folder / "base", self.folder / "train.json"
        return tiny_job.config(self.folder / f"{name}.yaml", base, train, self.folder / name, **self.sections)


@dataclass(frozen=True)
class Moment:
    """When a process is stopped.

    Attributes:
        seconds: after the start of a life, or of a phase in it.
        phase: the phase.
    """

    seconds: float
    phase: str | None = None

    def wait_for(self, process: subprocess.Popen[bytes], directory: Path, start: float) -> int | None:
        """Waits for the moment of a life that began at `start`; returns the exit code of what ends before."""
        if self.phase is None:
            return _ended(process, self.seconds - (time.perf_counter() - start))
        events = directory / "events.jsonl"
        begins = f'"phase": "{self.phase}", "status": "running"'.encode()
        earlier = events.read_bytes().count(begins) if events.exists() else 0
        while process.poll() is None:
            if events.exists() and events.read_bytes().count(begins) > earlier:
                return _ended(process, self.seconds)
            time.sleep(0.001)
        return process.returncode


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process that ends within some seconds."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def main() -> None:
    """Writes results/kills.json; hours."""
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="keep everything there, and go on from what is there")
    options = parser.parse_args()
    wanted = {"kill": SHORT_KILLS if options.short else KILLS, "cut": SHORT_CUTS if options.short else CUTS}
    with ExitStack() as stack:
        folder = (options.folder or Path(stack.enter_context(TemporaryDirectory()))).absolute()
        place = Place(folder, SHORT_JOB if options.short else JOB)
        if not (folder / "train.json").exists():
            tiny_job.checkpoint(folder / "base")
            tiny_job.records(folder, 60)
        compiling = undisturbed(place, "alone")
        seconds = undisturbed(place, "again")
        if names := different(folder / "alone", folder / "again"):
            sys.exit(f"two jobs that nobody killed differ in {', '.join(names)}")
        file = folder / "runs.jsonl"
        while missing := [kind for kind, number in wanted.items() if _ends(file, kind) < number]:
            number = len(read_jsonl(file, print))
            left = wanted[missing[0]] - _ends(file, missing[0])
            append_jsonl(file, stopped_job(place, f"run{number}", missing[0], left, seconds))
        known = [run.get("rounds_of") for run in read_jsonl(file, print)]
        for model in () if options.short else (None, *MODELS):
            if (rounds_of := model or "kill") not in known:
                append_jsonl(file, stopped_in_every_phase(place, f"every-phase-{rounds_of}", model))
        runs = read_jsonl(file, print)
    _publish(options, wanted, runs, {"compiling": compiling, "programs from disk": seconds}, place.sections)


def undisturbed(place: Place, name: str) -> float:
    """Runs the job to its end, if no earlier invocation has; returns the seconds that it took."""
    note = place.folder / f"{name}.seconds"
    if not note.exists():
        ended = life(place, name)
        note.write_text(str(ended["seconds"]))
    return float(note.read_text())


def stopped_job(place: Place, name: str, kind: str, most: int, seconds: float) -> Document:
    """A job that is stopped again and again until a life ends before its moment.

    Args:
        place: where it lies.
        name: of its run directory.
        kind: "kill" or "cut".
        most: times that it is stopped.
        seconds: that an undisturbed job takes.
    """
    rng = random.Random(f"{SEED} {name}")
    models = [MODELS[number % 2] if kind == "cut" else None for number in range(most)]
    return _stopped(place, name, [(Moment(seconds * rng.uniform(BEFORE, AFTER)), model) for model in models])


def stopped_in_every_phase(place: Place, name: str, model: Model | None) -> Document:
    """A job that is stopped once in every phase, by a kill or by power cuts of a model."""
    rng = random.Random(f"{SEED} {name}")
    phases = json.loads((place.folder / "alone" / "state.json").read_text())["phases"]
    moments = [Moment(rng.uniform(0, 0.5) * record["seconds"], phase) for phase, record in phases.items()]
    return {**_stopped(place, name, [(moment, model) for moment in moments]), "rounds_of": model or "kill"}


def _stopped(place: Place, name: str, stops: Sequence[tuple[Moment, Model | None]]) -> Document:
    """A job that is stopped at moments, each in a life of its own, until a life ends before its moment."""
    ends, failed, again = list[Document](), None, list[str]()
    try:
        for moment, model in stops:
            ended = life(place, name, moment, model)
            again += ended["again"]
            if not ended["stopped"]:
                break
            ends.append(ended)
            what = f"cut off ({model})" if model else "killed"
            print(f"{name}: {what} after {ended['after_seconds']:.2f} s, in {ended['during']}", file=sys.stderr)
        else:
            again += life(place, name)["again"]
    except RuntimeError as error:
        failed = str(error)
    return {
        "kind": "cut" if any(model for _, model in stops) else "kill",
        "ends": ends,
        "failed": failed,
        "differ": [] if failed else different(place.folder / "alone", place.folder / name),
        "done_again": again,
    }


def life(place: Place, name: str, moment: Moment | None = None, model: Model | None = None) -> Document:
    """The commands one after the other, until the process at work is killed at a moment; never for None.

    Raises:
        RuntimeError: one failed by itself.
    """
    config, directory, journal = place.config(name), place.folder / name, place.folder / f"{name}.syncs"
    log, start, again = config.with_suffix(".log"), time.perf_counter(), list[str]()
    for command in COMMANDS:
        arguments = tiny_job.command(command, config)
        arguments[2] = (_RECORD.format(str(directory), str(journal)) if model else "") + arguments[2]
        environment = tiny_job.environment(place.folder / "cache")
        with log.open("w") as output:
            process = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output)
            code = process.wait() if moment is None else moment.wait_for(process, directory, start)
            if code is None:
                process.kill()
                process.wait()
                during = phase_of(directory, start) if process.returncode < 0 else "end of a process"
                if model:
                    cut(directory, journal, model)
                found = {"during": during, "checkpoints": checkpoints(directory)}
                after = time.perf_counter() - start
                return {"stopped": True, "after_seconds": after, "model": model, **found, "again": again}
        text = log.read_text()
        if code:
            raise RuntimeError(f"mars {command} {config} ended with {code}:\n{text[-3000:]}")
        again += [line for line in text.splitlines() if line.endswith(("done again", "written again"))]
    return {"stopped": False, "seconds": time.perf_counter() - start, "again": again}


def checkpoints(directory: Path) -> int:
    """Checkpoints to go on from: their folders are renamed to the step when they are whole."""
    return sum(folder.is_dir() and folder.name.isdigit() for folder in directory.rglob("*"))


def phase_of(directory: Path, start: float) -> str:
    """The phase that the newest event speaks of; before the run directory is opened, a process is starting."""
    file = directory / "events.jsonl"
    events = read_jsonl(file, lambda text: None)
    if not events or file.stat().st_mtime < time.time() - (time.perf_counter() - start):
        return "start of a process"
    last = next((event for event in reversed(events) if event["event"] in ("phase", "opened")), None)
    if last is None or last["event"] == "opened" or last["status"] == "done":
        return "between phases"
    return str(last["phase"])


def different(expected: Path, found: Path) -> list[str]:
    """Files that aren't the same, byte for byte but for the seconds that a search took."""
    return [name for name in COMPARED if content(expected / name) != content(found / name)]


def content(file: Path) -> object:
    """Of a file, if it is there."""
    if file.name != "compare.json" or not file.exists():
        return file.read_bytes() if file.exists() else None
    document = json.loads(file.read_text())
    return {**document, "methods": [{**row, "search_seconds": None} for row in document["methods"]]}


def _ends(file: Path, kind: str) -> int:
    return sum(len(run["ends"]) for run in read_jsonl(file, print) if run["kind"] == kind)


def _survived(runs: list[Document], kind: str) -> int:
    whole = [run for run in runs if not (run["failed"] or run["differ"] or (kind == "cut" and run["done_again"]))]
    return sum(len(run["ends"]) for run in whole if run["kind"] == kind)


def _detail(wanted: Document, runs: list[Document]) -> Document:
    """The runs, and the tables of their page."""
    ends = [(run["kind"], end) for run in runs for end in run["ends"]]
    during = Counter(end["during"] for _, end in ends)
    rows = [
        {
            "": {"kill": "kills", "cut": "power cuts"}[kind],
            "number": sum(name == kind for name, _ in ends),
            "survived": _survived(runs, kind),
            "with a checkpoint to go on from": sum(end["checkpoints"] > 0 for name, end in ends if name == kind),
            "run directories": sum(run["kind"] == kind for run in runs),
        }
        for kind in wanted
    ]
    phases = [{"phase": phase, "kills and cuts": count} for phase, count in during.most_common()]
    return {"runs": runs, "tables": {"": rows, "What was going on at the end": phases}}


def _publish(
    options: argparse.Namespace, wanted: Document, runs: list[Document], seconds: Document, sections: Document
) -> None:
    detail = _detail(wanted, runs)
    publish(
        options,
        "kills",
        sum(row["survived"] for row in detail["tables"][""]),
        "kills and power cuts survived with bit-identical results",
        f"all of {wanted['kill']} kills and {wanted['cut']} power cuts or more",
        {"seed": SEED, "job": sections, "compared": list(COMPARED), "seconds_of_a_job": seconds, **detail},
    )


if __name__ == "__main__":
    main()
