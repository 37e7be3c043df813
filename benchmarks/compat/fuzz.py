"""Damaged inputs of every kind that end in a clear message, or are read as they stand.

People's files are cut, edited by hand, written by other versions, or hostile. Rows of data, configs, files of a
checkpoint, adapters and finished run directories are damaged at random and given to the commands that read them. What
counts is every input that ends in a traceback, takes more than its time or memory, or is taken although it isn't what
it was, without a word.

    python -m benchmarks.compat.fuzz [--short] [--anyway] [--out FOLDER] [--work FOLDER]

Definitions. Input N of a kind follows from (seed, kind, N) alone; `fuzz_mutations` has the damages, `fuzz_trials` the
calls. A silent damage is, by kind: a row accepted although a text of it is not in what the model reads, and no warning
or note was printed; a setting that is read as another value than the file has; a checkpoint accepted by `mars check`
whose safetensors header names other tensors, types, shapes or places than the sound one; an adapter read with NaN,
infinity, a scale of 0 or less, or another number of values than are stored; a command on a damaged run directory whose
result is another than on the sound one, without a warning. Every input has `SECONDS` and `GIB` in a process that is
started again where it dies or is late. With `--work` a stopped run goes on.

figure = tracebacks, silent damages, and inputs beyond time or memory.
"""

import argparse
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from benchmarks.lib.child import ROOT, Document, argument_parser, module_of, publish, quiet_environment
from mars_jax.runtime.jsonfiles import append_jsonl, dump_json, read_jsonl
from tests.helpers import tiny_job

# Of each kind; more of those that take little time.
INPUTS = {"rows": 1600, "config": 1200, "checkpoint": 1200, "adapter": 700, "run": 500}
SHORT_INPUTS = dict.fromkeys(INPUTS, 6)
SEED = 0
SECONDS, GIB = 30, 8
PER_PROCESS = 200  # inputs, so that what one leaves in memory doesn't count against the next
BAD = ("traceback", "silent", "late", "memory")


def main() -> None:
    """Writes results/fuzz.json; about half an hour."""
    parser = argument_parser(__doc__)
    parser.add_argument("--work", type=Path, help="keep the inputs' base and the outcomes in this folder, and go on")
    options = parser.parse_args()
    if options.child:
        work(json.loads(options.child))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        wanted = SHORT_INPUTS if options.short else INPUTS
        log = folder / "trials.jsonl"
        done = {(trial["kind"], trial["number"]): trial for trial in read_jsonl(log, lambda text: None)}
        left = [(kind, n) for kind, count in wanted.items() for n in range(count) if (kind, n) not in done]
        for trial in tried(folder, left):
            append_jsonl(log, trial)
            done[trial["kind"], trial["number"]] = trial
            if trial["outcome"] in BAD:
                print(f"{trial['kind']} {trial['number']}: {trial['outcome']}, {trial['damage']}", file=sys.stderr)
        publish_trials(options, [done[kind, n] for kind, count in wanted.items() for n in range(count)])


def publish_trials(options: argparse.Namespace, trials: list[Document]) -> None:
    """Writes the result."""
    outcomes = Counter((trial["kind"], trial["outcome"]) for trial in trials)
    bad = [trial for trial in trials if trial["outcome"] in BAD]
    slowest = [
        {name: trial[name] for name in ("kind", "number", "damage", "seconds")}
        for trial in sorted(trials, key=lambda trial: -trial["seconds"])[:5]
    ]
    names = {"accepted": "read as it stands", "refused": "clear message", "traceback": "traceback", "silent": "silent"}
    publish(
        options,
        "fuzz",
        len(bad),
        f"of {len(trials)} damaged inputs end in a traceback, a silent damage, or beyond their time or memory",
        "at most 0",
        {
            "seed": SEED,
            "inputs": len(trials),
            "limits": {"seconds": SECONDS, "GiB": GIB},
            "bad": bad,
            "slowest": slowest,
            "tables": {
                "": [
                    {
                        "input": kind,
                        "tried": sum(count for (of, _), count in outcomes.items() if of == kind),
                        **{name: outcomes[kind, outcome] for outcome, name in names.items()},
                        "too slow or large": outcomes[kind, "late"] + outcomes[kind, "memory"],
                    }
                    for kind in INPUTS
                ],
            },
        },
    )


def prepare(folder: Path) -> None:
    """A run that nobody damaged, in `folder / "run"`."""
    if (folder / "run" / "report" / "index.html").exists():
        return
    base, train = tiny_job.checkpoint(folder / "base"), tiny_job.records(folder / "data", 60)
    config = tiny_job.config(folder / "run.yaml", base, train, folder / "run")
    done = tiny_job.mars("run", config, cache=folder / "cache", timeout=1800)
    if done.returncode:
        sys.exit(f"the run to damage ended with {done.returncode}:\n{done.stderr[-3000:]}")


def tried(folder: Path, inputs: list[tuple[str, int]]) -> Iterator[Document]:
    """The outcome of each input, in order; a process that dies or is late costs the one that it was at."""
    waiting = list(inputs)
    while waiting:
        # As the run was made: programs that are compiled otherwise round otherwise.
        environment = {**quiet_environment(), **tiny_job.environment(folder / "cache")}
        command = [sys.executable, "-m", module_of(__file__), "--child", dump_json({"folder": str(folder)})]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for kind, number in waiting[:PER_PROCESS]:
                start = time.monotonic()
                process.stdin.write(f"{kind} {number}\n".encode())
                process.stdin.flush()
                # The first input waits for the imports too.
                limit = SECONDS + (120 if (kind, number) == waiting[0] else 0)
                ready = select.select([process.stdout], [], [], limit)[0]
                line = process.stdout.readline() if ready else b""
                waiting = waiting[1:]
                if line:
                    yield {**json.loads(line), "seconds": round(time.monotonic() - start, 3)}
                    continue
                outcome = "memory" if ready else "late"
                yield {
                    **{"kind": kind, "number": number, "outcome": outcome, "damage": "", "detail": "the process ended"},
                    "seconds": round(time.monotonic() - start, 3),
                }
                break
            process.kill()


def work(spec: Document) -> None:
    """In the child: tries the inputs that stdin names, a line each, and prints their outcomes."""
    from benchmarks.compat.fuzz_trials import Trials

    resource.setrlimit(resource.RLIMIT_DATA, (GIB * 2**30, GIB * 2**30))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print past sys.stdout is no answer
    with redirect_stdout(sys.stderr):
        folder = Path(spec["folder"])
        os.chdir(folder)  # a damaged config may name any run directory
        trials = Trials(folder / f"inputs{os.getpid()}", finished=folder / "run")
        for line in sys.stdin:
            kind, number = line.split()
            trial = trials.run(kind, int(number), SEED)
            print(dump_json(asdict(trial), ascii=True), file=answers, flush=True)


if __name__ == "__main__":
    main()
