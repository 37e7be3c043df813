"""Kills that a running job survives with results that are the same to the last bit.

A job on a cluster can end at any moment, and `mars run` promises to go on as if nothing had happened. A small job with
every phase is killed (SIGKILL) at random moments and started again until it is done. A kill is survived if every later
process ends well, and if records, curves, laws, selection and metrics are byte for byte those of an undisturbed run.

    python -m benchmarks.compat.kills [--short] [--anyway] [--out FOLDER]

Definitions. The job is that of the end-to-end tests (tests/helpers/tiny_job.py: a random checkpoint, programs compiled
without optimizations), with lanes and a final run long enough for the checkpoints that users have, one in ten seconds.
Moments are drawn evenly from `BEFORE` to `AFTER` of the time that a whole run takes (seed printed). A process that ends
before its kill finishes its run directory; the last one is not killed. The compared files are `COMPARED`.

figure = kills survived.
"""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.lib.child import Document, arguments, publish
from mars_jax.runtime.jsonfiles import read_jsonl
from tests.helpers import tiny_job

COMPARED = (
    "probes/lanes.jsonl",
    "probes/curves.jsonl",
    "laws.json",
    "selection.json",
    "finetune/metrics.jsonl",
)
JOB = {
    "probe": {"num_samples": [8, 32], "steps": 384, "patience": None},
    "finetune": {"steps": 2048, "warmup_steps": 2, "look_every": 256},
}
SEED = 0
KILLS, SHORT_KILLS = 30, 3
BEFORE, AFTER = 0.05, 0.6  # shares of the time of a run that finds its programs on disk


def main() -> None:
    """Writes results/kills.json; about twelve minutes."""
    options = arguments(__doc__)
    sections, wanted = ({}, SHORT_KILLS) if options.short else (JOB, KILLS)
    rng = random.Random(SEED)
    print(f"seed {SEED}", file=sys.stderr)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        base, train = tiny_job.checkpoint(place / "base"), tiny_job.records(place, 60)

        def life(name: str, moment: float | None = None) -> Document:
            config = tiny_job.config(place / f"{name}.yaml", base, train, place / name, **sections)
            return run(config, place / name, place / "cache", moment)

        expected, again = place / "alone", place / "again"
        compiling = life("alone")["seconds"]
        seconds = life("again")["seconds"]
        if different(expected, again):
            sys.exit(f"two runs that nobody killed differ in {', '.join(different(expected, again))}")
        runs: list[Document] = []
        while (done := sum(len(run["kills"]) for run in runs)) < wanted:
            name = f"run{len(runs)}"
            moments = (seconds * rng.uniform(BEFORE, AFTER) for _ in range(wanted - done))
            kills: list[Document] = []
            failed = None
            try:
                for moment in moments:
                    ended = life(name, moment)
                    if not ended["killed"]:
                        break
                    kills.append(ended)
                    print(f"killed after {moment:.2f} s, in {ended['during']}", file=sys.stderr)
                else:
                    life(name)
            except RuntimeError as error:
                failed = str(error)
                if not kills:
                    raise
            runs.append({"kills": kills, "failed": failed, "differ": different(expected, place / name)})
    survived = sum(len(run["kills"]) for run in runs if not (run["failed"] or run["differ"]))
    during = Counter(kill["during"] for run in runs for kill in run["kills"])
    publish(
        options,
        "kills",
        survived,
        "kills survived with bit-identical results",
        f"at least {wanted}",
        {
            "seed": SEED,
            "job": sections,
            "compared": list(COMPARED),
            "kills": done,
            "seconds_of_a_run": {"compiling": compiling, "programs from disk": seconds},
            "runs": runs,
            "tables": {
                "": [
                    {
                        "kills": done,
                        "survived": survived,
                        "with a checkpoint to go on from": sum(k["checkpoints"] > 0 for r in runs for k in r["kills"]),
                        "run directories": len(runs),
                    }
                ],
                "What was going on when the process was killed": [
                    {"phase": phase, "kills": count} for phase, count in during.most_common()
                ],
            },
        },
    )


def run(config: Path, run_dir: Path, cache: Path, moment: float | None) -> Document:
    """One process of `mars run`: killed after `moment` seconds unless it ends before, or never for None.

    Raises:
        RuntimeError: it failed by itself.
    """
    log, start = config.with_suffix(".log"), time.perf_counter()
    command, environment = tiny_job.command("run", config), tiny_job.environment(cache)
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            # Folders of checkpoints are renamed to their step when they are whole.
            saved = [folder for folder in run_dir.rglob("*") if folder.is_dir() and folder.name.isdigit()]
            return {
                "killed": True,
                "after_seconds": moment,
                "during": phase_of(run_dir, start),
                "checkpoints": len(saved),
            }
    if code:
        raise RuntimeError(f"mars run {config} ended with {code}:\n{log.read_text()[-3000:]}")
    return {"killed": False, "seconds": time.perf_counter() - start}


def phase_of(run_dir: Path, start: float) -> str:
    """The phase that the newest event speaks of; before the run directory is opened, the process is starting."""
    file = run_dir / "events.jsonl"
    events = read_jsonl(file, lambda text: None) if file.exists() else []
    opened = file.exists() and file.stat().st_mtime > time.time() - (time.perf_counter() - start)
    if not opened:
        return "start of the process"
    last = next((event for event in reversed(events) if event["event"] in ("phase", "opened")), None)
    if last is None or last["event"] == "opened" or last["status"] == "done":
        return "between phases"
    return str(last["phase"])


def different(expected: Path, found: Path) -> list[str]:
    """Files that aren't the same, byte for byte."""
    return [name for name in COMPARED if content(expected / name) != content(found / name)]


def content(file: Path) -> bytes | None:
    """Of a file, if it is there."""
    return file.read_bytes() if file.exists() else None


if __name__ == "__main__":
    main()
