"""Damaged rows, configs, checkpoints, adapters and run directories: a fixed few of benchmarks/compat/fuzz.py."""

import pytest

from benchmarks.compat.fuzz_trials import KINDS, Silent, Trials, _compare_settings
from mars_jax.errors import MarsError

NUMBERS = {"rows": 40, "config": 60, "checkpoint": 30, "adapter": 40, "run": 6}


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return Trials(tmp_path_factory.mktemp("fuzz") / "inputs")


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_input_ends_in_a_traceback_or_is_taken_for_another(trials, kind):
    found = [trials.run(kind, number) for number in range(NUMBERS[kind])]
    assert [trial for trial in found if trial.outcome not in ("accepted", "refused")] == []
    # Damages that are all refused for one cause would show nothing.
    assert len({trial.detail for trial in found if trial.outcome == "refused"}) > 2


def test_an_undamaged_input_is_accepted(trials, tmp_path):
    document, warned = trials.check(tmp_path)
    assert document["data"]["train"] == 60
    assert warned == ""


def test_a_refusal_is_no_bug(trials, tmp_path):
    with pytest.raises(MarsError, match="can't read the config"):
        trials.mars("check", tmp_path / "none.yaml")


def test_a_bug_counts_as_a_traceback(trials, tmp_path, monkeypatch):
    def broken(*arguments):
        raise KeyError("of ours")

    monkeypatch.setattr("mars_jax.config.load.load_config", broken)
    with pytest.raises(RuntimeError, match=r"Traceback[\s\S]*KeyError: 'of ours'"):
        trials.mars("check", tmp_path / "any.yaml")


def test_a_value_that_was_read_as_another_is_silent_damage():
    with pytest.raises(Silent, match=r"a\.0 is 1 in the file and was read as 2"):
        _compare_settings({"a": [1]}, {"a": [2]})
