"""The figure of Law-P in step sizes, of runs that were written by hand."""

from dataclasses import replace

import pytest

from mars_jax.report.collect import read_run
from mars_jax.report.figures_steps import step_law
from tests.helpers.report_run import make_run

LAW = {"c": 0.0, "A": {"llm": 0.1}, "C": {"llm": 0.1}, "unit": {"llm": 8e-3}}


def final_run(rank, loss, steps=16):
    return {
        "ranks": {"llm": rank},
        "factors": {},
        "learning_rate": {"llm": 1e-3},
        "looks": [[0, 2.0], [8, loss and loss + 0.1], [steps, loss]],
    }


@pytest.fixture
def record(tmp_path):
    return read_run(make_run(tmp_path / "run"))


def drawn(record, runs, law=LAW, rank=8):
    selection = {"pick": {"llm": rank}, "step_law": law}
    return step_law(replace(record, selection=selection, sweep={"runs": runs}))


def test_runs_stand_above_the_lowest_at_their_last_step(record):
    (axes,) = drawn(record, [final_run(2, 1.2), final_run(8, 1.0), final_run(32, 1.5)]).axes
    points = sorted(
        tuple(map(float, (line.get_xdata()[0], line.get_ydata()[0]))) for line in axes.lines if line.get_marker() == "o"
    )
    assert points == [pytest.approx(point) for point in [(2e-3, 0.2), (8e-3, 0.0), (32e-3, 0.5)]]


def test_a_run_that_diverged_took_the_whole_figure_with_it(record):
    (axes,) = drawn(record, [final_run(2, 1.2), final_run(8, 1.0), final_run(32, None)]).axes
    assert sum(line.get_marker() == "o" for line in axes.lines) == 2


def test_without_a_law_or_runs_there_is_no_figure(record):
    assert drawn(record, [final_run(8, 1.0)], law=None) is None
    assert drawn(record, []) is None
    assert drawn(record, [final_run(0, 1.0)]) is None
