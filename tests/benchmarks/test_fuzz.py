"""Damaged rows, configs, checkpoints, adapters and run directories: a fixed few of benchmarks/compat/fuzz.py."""

import pytest

from benchmarks.compat.fuzz_trials import KINDS, Trials
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
    document, said = trials.check(tmp_path)
    assert document["data"]["train"] == 60
    assert said == ""


def test_a_refusal_is_told_from_a_bug(trials, tmp_path):
    with pytest.raises(MarsError, match="can't read the config"):
        trials.mars("check", tmp_path / "none.yaml")
