"""A final run that begins from the probe with the picked ranks, and what happens where there is none."""

import json

import least_model
import numpy as np
import pytest
from killable_job import Job, lines
from tiny_lanes import schedule

from mars_jax.probe.plan import Lane


def test_lanes_begin_from_the_adapters_that_they_are_given():
    lanes, rates = [Lane({"vision": 4, "llm": 2}, 8, 1)], {"vision": 3e-2, "llm": 3e-2}
    first = least_model.run(lanes, rates, schedule([0, 8]))
    initial = first.lane_state(0).trainable
    again = least_model.run(lanes, rates, schedule([0]), initial=initial)
    (row,) = again.rows[0]
    assert row["validation_loss"] == first.rows[0][-1]["validation_loss"] != first.rows[0][0]["validation_loss"]
    assert row["update_norm"] == first.rows[0][-1]["update_norm"]
    for name in ("trainable", "best"):
        np.testing.assert_array_equal(getattr(again.lane_state(0), name), initial)


def finetuned_with(job, run, pick):
    """Runs the final run with a pick; gives the validation loss that it began from, its summary and its warnings."""
    (run / "selection.json").write_text(json.dumps({"pick": pick}))
    code, out, err = job.end("finetune", run)
    assert code == 0, err
    first = json.loads(lines(run / "finetune" / "metrics.jsonl")[0])
    assert first["step"] == 0
    return first["validation_loss"], json.loads(out), [line for line in err.splitlines() if "warning" in line]


def test_the_final_run_starts_from_the_best_adapters_of_the_probe_if_there_is_one(tmp_path):
    job, run = Job.make(tmp_path / "job"), tmp_path / "run"
    code, _, err = job.end("probe", run)
    assert code == 0, err
    records = {record["lane"]: record for record in map(json.loads, lines(run / "probes" / "lanes.jsonl"))}
    base_loss = json.loads(lines(run / "probes" / "curves.jsonl")[0])["validation_loss"]
    name = "vision2-projector2-llm4-D16-s0"  # below the padded ranks, at the largest D
    assert records[name]["best_loss"] < base_loss - 0.1

    loss, summary, warnings = finetuned_with(job, run, records[name]["ranks"])
    assert loss == pytest.approx(records[name]["best_loss"], abs=1e-6)
    assert (summary["warm_start"], warnings) == (name, [])

    (run / "probes" / "adapters" / "vision4-projector2-llm1-D16-s0.safetensors").unlink()
    loss, summary, warnings = finetuned_with(job, run, {"vision": 4, "projector": 2, "llm": 1})
    assert loss == pytest.approx(base_loss, abs=1e-6)
    assert summary["warm_start"] is None
    assert warnings == [
        "warning: no probe has the picked ranks (vision4-projector2-llm1-D16-s0), so the final run starts from a fresh "
        "draw"
    ]
