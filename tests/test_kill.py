"""The real command, killed, signalled and out of room at any moment: run again, it ends as if nothing had been."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_job
from killable_job import LANES, PROBES, RESULTS, Job, lines, wait_for

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
# Root writes where the mode says no, unless it gives up that right.
AS_ANYBODY = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return Job.make(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def alone(job) -> Path:
    """A run that nobody stopped."""
    run = job.folder / "run"
    code, _, err = job.end("run", run)
    assert code == 0, err
    assert len(lines(run / "probes" / "lanes.jsonl")) == LANES
    return run


def assert_ends_alike(job: Job, command: str, run: Path, alone: Path) -> None:
    code, _, err = job.end(command, run)
    assert code == 0, err
    for name in {"run": RESULTS, "probe": PROBES}[command]:
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name


def error_of(out: str, err: str) -> str:
    """The message, which is the same on both streams."""
    message = json.loads(out)["error"]["message"]
    assert err.endswith(f"mars: {message}\n")
    return message


def test_a_run_killed_three_times_ends_as_one_that_was_not(job, alone, tmp_path):
    run, seed = tmp_path / "run", random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    events = run / "events.jsonl"
    # Each life ends at a random moment after its n-th event: the first one's in the probes, the others' anywhere.
    for first, last in ((6, 8), (2, 4), (2, 5)):
        target = len(lines(events)) + rng.randint(first, last)
        process = job.start("run", run)
        wait_for(process, lambda target=target: len(lines(events)) >= target)
        time.sleep(rng.uniform(0, 0.7))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert_ends_alike(job, "run", run, alone)


def test_a_signal_leaves_a_checkpoint_and_a_word_on_how_to_go_on(job, alone, tmp_path):
    run = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        code, out, err = job.stop("probe", run, number)
        assert code == 130, err
        said = re.fullmatch(
            rf"stopped by {number.name}: a checkpoint of step (\d+) was saved; run the same command again to go on",
            error_of(out, err),
        )
        assert json.loads((run / "state.json").read_text())["phases"]["probe"]["status"] == "interrupted"
        (group,) = (run / "probes" / "checkpoints").iterdir()
        assert max(int(path.name) for path in group.iterdir()) == int(said[1])
    assert int(said[1]) > 0
    assert_ends_alike(job, "probe", run, alone)


def test_a_full_disk_is_said_and_costs_no_finished_lane(job, alone, tmp_path):
    run = tmp_path / "run"
    code, out, err = job.stop("probe", run, signal.SIGTERM, LIMIT.format(5000))  # less than a checkpoint needs
    assert code == 4, err
    message = error_of(out, err)
    assert message.startswith(f"can't write checkpoints to {run / 'probes' / 'checkpoints'}")
    assert message.endswith("Make room there, or make it writable, and run the same command again to go on.")
    room = int(0.75 * (alone / "probes" / "curves.jsonl").stat().st_size)  # for the curves of one group of the two
    code, out, err = job.end("probe", run, LIMIT.format(room))
    assert code == 4, err
    assert error_of(out, err) == (
        f"can't write {run / 'probes' / 'curves.jsonl'}: File too large. Finished work is kept. Make room there and "
        "run the same command again to go on."
    )
    assert lines(run / "probes" / "lanes.jsonl") == lines(alone / "probes" / "lanes.jsonl")[: LANES // 2]
    assert_ends_alike(job, "probe", run, alone)


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_directory_that_cannot_be_written_is_refused(job, alone, tmp_path, existing):
    # One that was there and had become read-only ended in a traceback.
    place = tmp_path / "place"
    place.mkdir()
    run = Path(shutil.copytree(alone, place / "run")) if existing else place / "run"
    config = job.config(run).rename(tmp_path / "a.yaml")
    closed = run if existing else place
    closed.chmod(0o555)
    command = tiny_job.command("fit", config)
    if os.geteuid() == 0:
        command = [sys.executable, "-c", AS_ANYBODY, *command]
    done = subprocess.run(command, capture_output=True, text=True, env=tiny_job.environment(tmp_path / "programs"))
    closed.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(
        f"mars: can't write the run directory {run}: Permission denied. Set run_dir to a folder that you can write.\n"
    )
