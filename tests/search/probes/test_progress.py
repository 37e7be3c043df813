"""A run that a signal stops: how it ends, and that progress.json and events.jsonl are true once it goes on."""

import json
import re
import signal
import time

import pytest

from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.job.status import run_status
from mars_jax.runtime.jsonfiles import write_json
from tests.helpers import killable_job
from tests.helpers.killable_job import LANES, STEPS, Job, assert_alike, error_of, lines, wait_for


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return killable_job.make(tmp_path_factory.getbasetemp())


def test_progress_of_a_process_that_is_gone_is_not_shown(tmp_path):
    run = RunDirectory(tmp_path)
    write_json((run / files.STATE), {"phases": {"probe": {"status": "running", "started": "now"}}})
    write_json((run / files.PROGRESS), {"phase": "probe", "lanes": {"done": 0, "running": 6, "queued": 12}})
    status = run_status(run, json.loads)
    assert status["progress"] is None
    assert status["phases"]["probe"]["status"] == "interrupted"


def stopped_at(run: RunDirectory, number: signal.Signals, code: int, out: str, err: str) -> int:
    """The step of the checkpoint that a process left which was sent a signal."""
    assert code == 130, err
    said = re.fullmatch(
        rf"stopped by {number.name}: a checkpoint of step (\d+) was saved; run the same command again to go on",
        error_of(out, err),
    )
    assert run.book.state()["phases"]["probe"]["status"] == "interrupted"
    (group,) = (run / files.PROBE_CHECKPOINTS).iterdir()
    assert max(int(path.name) for path in group.iterdir()) == int(said[1])
    return int(said[1])


def test_a_run_that_was_told_to_stop_goes_on_bit_for_bit_and_tells_what_is_true(job, tmp_path):
    run = RunDirectory(tmp_path / "run")
    group = LANES // 2
    process = job.start("probe", run.path)
    wait_for(process, lambda: len(lines(run / files.LANES)) == group)
    process.send_signal(signal.SIGTERM)  # as the second group begins
    out, err = process.communicate()
    stopped_at(run, signal.SIGTERM, process.returncode, out, err)
    step_before = stopped_at(run, signal.SIGINT, *job.stop("probe", run.path, signal.SIGINT))
    assert 0 < step_before < STEPS
    (run / files.PROGRESS).unlink()

    told = []
    process = job.start("probe", run.path)
    while process.poll() is None:
        text = (run / files.PROGRESS).read_text() if (run / files.PROGRESS).exists() else None
        if text and (not told or json.loads(text) != told[-1]):
            told.append(json.loads(text))
            assert run_status(run, pytest.fail)["process"] in (process.pid, None)
        time.sleep(0.002)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_alike(job, "probe", run.path)

    for progress in told:
        lanes, step = progress["lanes"], progress["step"]
        assert lanes in (
            {"done": group, "running": group, "queued": 0},
            {"done": LANES, "running": 0, "queued": 0},
        )
        assert step_before <= step <= STEPS
        steps = lanes["done"] * STEPS + lanes["running"] * step
        assert progress["lane_steps"] == {"done": steps, "total": LANES * STEPS}
        assert progress["memory_bytes"] > 2**26
    assert (told[-1]["lanes"]["done"], told[-1]["step"]) == (LANES, STEPS)
    best = {json.loads(line)["lane"]: json.loads(line)["validation_loss"] for line in lines(run / files.CURVES)}
    assert told[-1]["validation_loss"] == min(list(best.values())[group:])

    events = [json.loads(line) for line in lines(run / files.EVENTS)]
    groups = [event for event in events if event["event"] == "group"]
    recorded = [json.loads(line)["lane"] for line in lines(run / files.LANES)]
    assert [lane for event in groups for lane in event["lanes"]] == recorded
    assert len(set(recorded)) == LANES
    for event in groups:
        assert event["steps"] == [STEPS] * group
        assert event["useful_lane_steps"] == event["executed_lane_steps"] == group * STEPS
    assert [event["status"] for event in events if event.get("phase") == "probe"] == [
        "running", "interrupted", "running", "interrupted", "running", "done",
    ]  # fmt: skip
    assert sum(event["event"] == "opened" for event in events) == 3
