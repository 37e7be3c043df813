"""A final run that begins from the probe with the picked ranks, and what happens where there is none."""

import json
import shutil

import numpy as np
import pytest

from mars_jax.lanes.lane import Lane
from tests.helpers import killable_job, least_model
from tests.helpers.killable_job import Job, lines
from tests.helpers.tiny_lanes import schedule


def test_lanes_begin_from_the_adapters_that_they_are_given():
    lanes, rates = [Lane({"vision": 4, "llm": 2}, 8, 1)], {"vision": 3e-2, "llm": 3e-2}
    first = least_model.run(lanes, rates, schedule([0, 8]))
    initial = first.lane_state(0).trainable
    again = least_model.run(lanes, rates, schedule([0]), initial={0: initial})
    (row,) = again.points[0]
    assert row.validation_loss == first.points[0][-1].validation_loss != first.points[0][0].validation_loss
    assert row.update_norm == first.points[0][-1].update_norm
    for name in ("trainable", "best"):
        np.testing.assert_array_equal(getattr(again.lane_state(0), name), initial)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return killable_job.make(tmp_path_factory.getbasetemp())


def records(path):
    return [json.loads(line) for line in lines(path)]


def test_the_final_run_starts_from_the_best_adapters_of_the_probe(job):
    summary = json.loads((job.alone / "finetune" / "summary.json").read_text())
    (probe,) = [lane for lane in records(job.alone / "probes" / "lanes.jsonl") if lane["lane"] == summary["warm_start"]]
    assert (probe["ranks"], probe["num_samples"], probe["seed"]) == (summary["ranks"], 16, 0)
    base = records(job.alone / "probes" / "curves.jsonl")[0]["validation_loss"]
    first = records(job.alone / "finetune" / "metrics.jsonl")[0]
    assert first["step"] == 0
    assert first["validation_loss"] == pytest.approx(probe["best_loss"], abs=1e-6)
    assert first["validation_loss"] < base - 0.1


def test_without_such_a_probe_the_final_run_starts_afresh_and_says_so(job, tmp_path):
    run = shutil.copytree(job.alone, tmp_path / "run")
    ranks = {"vision": 2, "projector": 2, "llm": 4}
    # Files of one's own: no phase of a run directory without a state made them.
    (run / "state.json").unlink()
    selection = json.loads((run / "selection.json").read_text())
    (run / "selection.json").write_text(json.dumps({**selection, "pick": ranks}))
    (run / "probes" / "adapters" / "vision2-projector2-llm4-D16-s0.safetensors").unlink()
    code, out, err = job.end("finetune", run)
    assert code == 0, err
    assert (json.loads(out)["ranks"], json.loads(out)["warm_start"]) == (ranks, None)
    base = records(run / "probes" / "curves.jsonl")[0]["validation_loss"]
    assert records(run / "finetune" / "metrics.jsonl")[0]["validation_loss"] == pytest.approx(base, abs=1e-6)
    assert [line for line in err.splitlines() if "warning" in line] == [
        "warning: no probe has the picked ranks (vision2-projector2-llm4-D16-s0), so the final run starts from a fresh "
        "draw"
    ]
