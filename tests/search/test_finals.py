"""The final run that a strategy leaves for the finetune phase."""

import numpy as np
import pytest

from mars_jax.config.load import load_config
from mars_jax.job.job import make_job
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.runtime.progress import ConsoleReporter
from mars_jax.search.finals import leave_final_run, left_final_run
from mars_jax.search.trainer import Configuration, Curve
from tests.helpers import tiny_job

RANKS = {"vision": 2, "projector": 2, "llm": 4}


def job(folder, *overrides):
    path = tiny_job.config(folder / "a.yaml", folder / "base", folder / "train.json", folder / "run")
    config = load_config(path, ["selection.target_num_samples=32", *overrides])
    return make_job(config, ConsoleReporter())


def left(folder):
    """Leaves a run, and returns it and its adapters."""
    adapters = {"head": {"a": np.ones((2, 3), np.float32)}}
    points = EvalPoint(0, 3.0), EvalPoint(16, 1.0, train_loss=1.5)
    leave_final_run(job(folder), Curve(Configuration(RANKS, {"vision": 3.0}), points, lambda: adapters))
    return points, adapters


def test_what_a_strategy_leaves_is_read_back_whole(tmp_path):
    points, adapters = left(tmp_path)
    run, read = left_final_run(job(tmp_path), Configuration(RANKS, {"vision": 3.0}))
    assert [point.to_json() for point in run.points] == [point.to_json() for point in points]
    assert (run.ranks, run.num_samples, run.warm_start) == (RANKS, 32, None)
    assert run.learning_rate == {"vision": pytest.approx(0.09), "projector": 0.03, "llm": 0.03}
    np.testing.assert_array_equal(read["head"]["a"], adapters["head"]["a"])


@pytest.mark.parametrize("override", ["finetune.steps=12", "optimizer.b2=0.9", "seed=5"])
def test_a_final_run_of_other_settings_passed_for_one_of_these(tmp_path, override):
    left(tmp_path)
    assert left_final_run(job(tmp_path, override), Configuration(RANKS, {"vision": 3.0})) is None


def test_a_final_run_of_other_ranks_is_not_taken(tmp_path):
    left(tmp_path)
    assert left_final_run(job(tmp_path), Configuration(RANKS | {"llm": 1}, {"vision": 3.0})) is None
    assert left_final_run(job(tmp_path), Configuration(RANKS)) is None
