"""progress.json and events.jsonl of a run: true while it runs, when it ends, and after it was stopped and went on."""

import json
import re
import signal
import time

import pytest
from killable_job import LANES, STEPS, Job, lines, wait_for

from mars_jax.jsonfiles import write_json
from mars_jax.rundir import RunDirectory


def test_progress_of_a_process_that_is_gone_is_not_shown(tmp_path):
    run = RunDirectory(tmp_path)
    write_json(run.state_file, {"phases": {"probe": {"status": "running", "inputs_hash": "h", "started": "now"}}})
    write_json(run.progress_file, {"phase": "probe", "lanes": {"done": 0, "running": 6, "queued": 12}})
    status = run.status(json.loads)
    assert status["progress"] is None
    assert status["phases"]["probe"]["status"] == "interrupted"


def test_what_is_told_of_a_run_that_goes_on_is_true(tmp_path):
    job = Job.make(tmp_path / "job")
    run = RunDirectory(tmp_path / "run")
    group = LANES // 2
    process = job.start("probe", run.path)
    wait_for(process, lambda: len(lines(run.lanes_file)) == group)
    process.send_signal(signal.SIGTERM)  # as the second group begins
    process.communicate()
    code, out, err = job.stop("probe", run.path, signal.SIGTERM)
    assert code == 130, err
    stopped_at = int(re.search(r"a checkpoint of step (\d+)", out)[1])
    assert 0 < stopped_at < STEPS
    run.progress_file.unlink()

    told = []
    process = job.start("probe", run.path)
    while process.poll() is None:
        text = run.progress_file.read_text() if run.progress_file.exists() else None
        if text and (not told or json.loads(text) != told[-1]):
            told.append(json.loads(text))
            assert run.status(pytest.fail)["process"] in (process.pid, None)
        time.sleep(0.002)
    _, err = process.communicate()
    assert process.returncode == 0, err
    for progress in told:
        lanes, step = progress["lanes"], progress["step"]
        assert lanes in (
            {"done": group, "running": group, "queued": 0},
            {"done": LANES, "running": 0, "queued": 0},
        )
        assert stopped_at <= step <= STEPS
        steps = lanes["done"] * STEPS + lanes["running"] * step
        assert progress["lane_steps"] == {"done": steps, "total": LANES * STEPS}
        assert progress["memory_bytes"] > 2**26
    assert (told[-1]["lanes"]["done"], told[-1]["step"]) == (LANES, STEPS)
    best = {json.loads(line)["lane"]: json.loads(line)["validation_loss"] for line in lines(run.curves_file)}
    assert told[-1]["validation_loss"] == min(list(best.values())[group:])

    events = [json.loads(line) for line in lines(run.events_file)]
    groups = [event for event in events if event["event"] == "group"]
    recorded = [json.loads(line)["lane"] for line in lines(run.lanes_file)]
    assert [lane for event in groups for lane in event["lanes"]] == recorded
    assert len(set(recorded)) == LANES
    for event in groups:
        assert event["steps"] == [STEPS] * group
        assert event["useful_lane_steps"] == event["executed_lane_steps"] == group * STEPS
    assert [event["status"] for event in events if event.get("phase") == "probe"] == [
        "running", "interrupted", "running", "interrupted", "running", "done",
    ]  # fmt: skip
    assert sum(event["event"] == "opened" for event in events) == 3
