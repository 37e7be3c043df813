"""What the benchmarks share: result files, interleaved timing, and the refusal of a busy machine."""

import json
import time

import jax
import pytest

from benchmarks.lib import results


def test_a_result_is_written_and_printed_as_one_document(tmp_path, capsys):
    results.write_result(
        "b0", 1.5, "ratio", "at most 2", "python -m benchmarks.speed.b0", {"rows": [1, 2]}, folder=tmp_path
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "b0.json").read_text())
    assert list(printed) == ["id", "figure", "unit", "goal", "command", "date", "versions", "detail"]
    assert (printed["id"], printed["figure"], printed["detail"]) == ("b0", 1.5, {"rows": [1, 2]})
    assert printed["versions"]["jax"] == jax.__version__
    assert printed["versions"]["cores"] >= 1


def test_two_sides_are_timed_in_turn_each_going_first_as_often():
    order = []
    first, second = results.interleave(lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.02)), 4)
    assert "".join(order) == "abbaabba"
    assert len(first.wall) == len(second.cpu) == 4
    assert min(second.wall) >= 0.02
    summary = second.summary()["wall_seconds"]
    assert summary["minimum"] <= summary["median"] <= max(summary["all"])


def test_a_busy_machine_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(results, "MAX_FOREIGN_CORES", -1.0)
    with pytest.raises(SystemExit, match=r"keep \d.* cores busy.*pass --anyway"):
        results.require_quiet(anyway=False)
    assert results.require_quiet(anyway=True) >= 0
