"""The real command, killed, out of room or shut out at any moment: run again, it ends as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import killable_job, tiny_job
from tests.helpers.killable_job import LANES, Job, assert_ends_alike, error_of, lines, wait_for

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
# Root writes where the mode says no, unless it gives up that right.
AS_ANYBODY = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return killable_job.make(tmp_path_factory.getbasetemp())


def test_a_run_killed_three_times_ends_as_one_that_was_not(tmp_path, tmp_path_factory):
    # By the rule that keeps the most between chunks: the adapters of every look.
    job = killable_job.make(tmp_path_factory.getbasetemp(), "splice")
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
    assert_ends_alike(job, "run", run)
    # A life that ended between a group's last record and the removal of its checkpoints had left them for good.
    assert not any((run / "probes" / "checkpoints").glob("*"))


def test_a_full_disk_is_said_and_costs_no_finished_lane(job, tmp_path):
    run = tmp_path / "run"
    lanes, curves = (Path("probes") / name for name in ("lanes.jsonl", "curves.jsonl"))
    room = int(0.75 * (job.alone / curves).stat().st_size)  # for the curves of one group of the two
    assert job.end("plan", run)[0] == 0  # sources.json is longer
    code, out, err = job.end("probe", run, LIMIT.format(room))
    assert code == 4, err
    message = error_of(out, err)
    # On a slow machine a checkpoint is due within the first group, and meets the limit before any lane is finished.
    finished = 0 if message.startswith(f"can't write checkpoints to {run}") else LANES // 2
    assert message.endswith("run the same command again to go on.")
    if finished:
        assert message.startswith(f"can't write {run / curves}: File too large. Finished work is kept. Make room there")
    assert (lines(run / lanes) if finished else []) == lines(job.alone / lanes)[:finished]
    assert_ends_alike(job, "probe", run)


def test_a_run_directory_that_became_read_only_ended_in_a_traceback(job, tmp_path):
    run = Path(shutil.copytree(job.alone, tmp_path / "run"))
    config = job.config(run)
    run.chmod(0o555)
    command = tiny_job.command("fit", config)
    if os.geteuid() == 0:
        command = [sys.executable, "-c", AS_ANYBODY, *command]
    done = subprocess.run(command, capture_output=True, text=True, env=tiny_job.environment(tmp_path / "programs"))
    run.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(
        f"mars: can't write the run directory {run}: Permission denied. Set run_dir to a folder that you can write.\n"
    )
