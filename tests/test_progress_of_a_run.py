"""progress.json and events.jsonl of a run: true while it runs, when it ends, and after it was killed and went on."""

import json

from mars_jax.jsonfiles import write_json
from mars_jax.rundir import RunDirectory


def test_progress_of_a_process_that_is_gone_is_not_shown(tmp_path):
    run = RunDirectory(tmp_path)
    write_json(run.state_file, {"phases": {"probe": {"status": "running", "inputs_hash": "h", "started": "now"}}})
    write_json(run.progress_file, {"phase": "probe", "lanes": {"done": 0, "running": 6, "queued": 12}})
    status = run.status(json.loads)
    assert status["progress"] is None
    assert status["phases"]["probe"]["status"] == "interrupted"
