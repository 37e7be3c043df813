"""The tabular benchmark: files come back as they were written; replays find the best of what they see, and its cost."""

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.evidence import design, replays, table
from benchmarks.evidence.table import Cell, RecordedRun, read_cell, write_cell
from benchmarks.evidence.tasks import LONG_TASKS, TASKS
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.search.strategies.base import Budget
from mars_jax.search.strategies.registry import STRATEGIES
from mars_jax.search.trainer import Curve

STEPS = 16
MODULES = ("vision", "projector", "llm")


def end(configuration, seed):
    """Lowest at (8, 32) with the LLM at a third of its rate; seed 1 is 10 % above seed 0 throughout."""
    loss = 1.0
    for module, best, factor in (("vision", 8, 1.0), ("llm", 32, 1 / 3)):
        rank = configuration.ranks[module]
        loss += (
            0.1 * (abs(math.log2(rank / best)) + abs(math.log(configuration.factors.get(module, 1.0) / factor)))
            if rank
            else 1.0
        )
    return (loss + 0.01 * configuration.seed) * (1.1 if seed else 1.0)


def recorded(configuration, seed=0, diverged=False):
    rng = np.random.default_rng(0)
    points = []
    for step in (0, 1, 2, 4, 6, 8, 12, STEPS):
        loss = end(configuration, seed) + 2.0 * (1 - step / STEPS)
        samples = rng.exponential(1.0, table.VALIDATION) * loss
        alive = not diverged or step < STEPS
        norms = dict.fromkeys(MODULES, float(step))
        points.append(
            EvalPoint(
                step,
                loss if alive else math.inf,
                2.5 if step else None,
                norms,
                alive=alive,
                sample_losses=tuple(samples),
            )
        )
    return RecordedRun(Curve(configuration, tuple(points)), math.inf if diverged else end(configuration, seed) + 0.05)


def cell(seed=0):
    runs = [recorded(one, seed) for one in design.configurations()]
    return Cell(
        "made up", seed, STEPS, 256, dict.fromkeys(MODULES, 1e-3), {"vision": 100, "projector": 10, "llm": 1000}, runs
    )


CELLS = [cell(0), cell(1)]


def test_a_cell_comes_back_as_it_was_written(tmp_path):
    written = dataclasses.replace(
        CELLS[0], runs=[*CELLS[0].runs[:3], recorded(CELLS[0].runs[3].curve.configuration, diverged=True)]
    )
    write_cell(written, rungs=[2, STEPS], folder=tmp_path)
    found = read_cell(tmp_path / "made up-seed0-16.parquet")
    assert [run.curve.configuration for run in found.runs] == [run.curve.configuration for run in written.runs]
    assert dataclasses.replace(found, runs=()) == dataclasses.replace(written, runs=())
    for ours, theirs in zip(found.runs, written.runs, strict=True):
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-6)
        for point, expected in zip(ours.curve.points, theirs.curve.points, strict=True):
            assert (point.step, point.alive) == (expected.step, expected.alive)
            assert point.validation_loss == pytest.approx(expected.validation_loss, rel=1e-6)
            assert point.update_norm == expected.update_norm
            assert len(point.sample_losses) == (table.VALIDATION if point.step in (2, STEPS) else 0)
            if point.sample_losses:
                np.testing.assert_allclose(point.sample_losses, expected.sample_losses, rtol=1e-3, atol=1e-4)


def test_the_design_holds_each_configuration_once_and_three_factors_of_every_pair():
    every = design.configurations()
    assert len({one.name for one in every}) == len(every) == 81 + 12 + 12 + 3
    pairs = {(one.ranks["vision"], one.ranks["llm"]) for one in every}
    cross = {(v, 8) for v in (2, 4, 8, 16, 32)} | {(8, r) for r in (2, 4, 8, 16, 32)}
    assert pairs >= cross | {(2, 2), (2, 32), (32, 2), (32, 32)} | set(design.FROZEN_PAIRS)
    assert {one.name for one in design.long_configurations()} < {one.name for one in every}
    for steps in design.LENGTHS:
        kept = design.eval_steps(steps)
        assert {round(part * steps) for part in design.RUNGS} <= set(kept)


def test_tasks_differ_and_are_within_what_the_data_builder_takes():
    assert len(TASKS) >= 10
    assert len({task[1:] for task in TASKS.values()}) == len(TASKS)
    assert set(LONG_TASKS) < set(TASKS)
    assert all(0 <= amount <= 1 for task in TASKS.values() for amount in task[2:])


def test_a_replay_finds_the_best_of_what_it_sees_and_counts_its_steps():
    whole = replays.replayed(CELLS[0], STRATEGIES["random"], Budget(runs=len(CELLS[0].runs)))
    best = min(CELLS[0].runs, key=lambda run: run.curve.loss)
    assert whole.configuration == best.curve.configuration
    assert (whole.loss, whole.test_loss) == (best.curve.loss, best.test_loss)
    assert whole.runs == len(CELLS[0].runs) - len(design.RESTARTS)  # restarts are no configurations of the space
    restarts = replays.replayed(CELLS[0], STRATEGIES["restarts"])
    assert (restarts.configuration.ranks["llm"], restarts.runs) == (8, 4.0)
    raced = replays.replayed(CELLS[0], STRATEGIES["race"], Budget(6))
    assert 1.0 < raced.runs < 6.0


def test_the_truth_divides_out_what_all_runs_of_a_seed_have_in_common():
    truth = replays.truth_of(CELLS)
    best = min(CELLS[0].runs, key=lambda run: run.curve.loss)
    assert truth.effects[1] / truth.effects[0] == pytest.approx(1.1)
    for seed in (0, 1):
        assert truth.excess(seed, end(best.curve.configuration, seed)) == pytest.approx(0.0, abs=1e-9)
        assert truth.excess(seed, 1.2 * end(best.curve.configuration, seed)) == pytest.approx(0.2)
    assert min(truth.losses, key=lambda name: truth.losses[name]) == best.curve.configuration.name


def test_a_configuration_that_diverged_for_a_seed_has_no_mean():
    first = CELLS[0].runs[0].curve.configuration
    broken = dataclasses.replace(CELLS[1], runs=[recorded(first, 1, diverged=True), *CELLS[1].runs[1:]])
    truth = replays.truth_of([CELLS[0], broken])
    assert first.name not in truth.losses
    assert len(truth.losses) == len(CELLS[0].runs) - 1
