"""What the benchmarks share: result files, interleaved timing, and the refusal of a busy machine."""

import json
import time
from functools import partial

import jax
import pytest

from benchmarks.lib import results


def test_a_result_is_written_and_printed_as_one_document(tmp_path, capsys):
    command = "python -m benchmarks.speed.steps"
    results.write_result("steps", 1.5, "ratio", "at most 2", command, {"rows": [1, 2]}, folder=tmp_path)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "steps.json").read_text())
    assert list(printed) == ["id", "figure", "unit", "goal", "command", "date", "versions", "detail"]
    assert (printed["id"], printed["figure"], printed["detail"]) == ("steps", 1.5, {"rows": [1, 2]})
    assert printed["versions"]["jax"] == jax.__version__
    assert printed["versions"]["cores"] >= 1


def test_a_result_without_a_folder_is_printed_only(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = results.write_result("steps", 1.5, "ratio", "at most 2", "a command", {}, folder=None)
    assert json.loads(capsys.readouterr().out) == written
    assert list(tmp_path.iterdir()) == []


def test_two_sides_are_timed_in_turn_each_going_first_as_often():
    order = []
    sides = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.02))}
    calls = {name: partial(results.timed, side) for name, side in sides.items()}
    first, second = ([seconds for _, seconds in timed] for timed in results.rounds(calls, 4).values())
    assert "".join(order) == "abbaabba"
    assert len(first) == len(second) == 4
    assert min(seconds.wall for seconds in second) >= 0.02
    assert all(seconds.cpu >= 0 for seconds in second)
    summary = results.spread(seconds.wall for seconds in second)
    assert summary["minimum"] <= summary["median"] <= max(summary["all"])


def test_a_busy_machine_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(results, "MAX_FOREIGN_CORES", -1.0)
    with pytest.raises(SystemExit, match=r"keep \d.* cores busy.*pass --anyway"):
        results.require_quiet(anyway=False)
    assert results.require_quiet(anyway=True) >= 0
