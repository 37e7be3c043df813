"""`mars diff`: two evaluated runs on the same test samples, paired; and what it says when they aren't the same."""

import json

import pytest
from typer.testing import CliRunner

from mars_jax.cli import app
from mars_jax.evals.stats import wilson_interval
from mars_jax.runtime.jsonfiles import append_jsonl


def sample(name: str, loss: float, right: dict[str, bool], prompt: str = "Which?") -> dict:
    return {"id": name, "prompt": prompt, "target": "B", "finetuned": {"loss": loss, "right": right}}


@pytest.fixture
def runs(tmp_path):
    """Five samples in common, of which the second run has two more right, and one sample each of its own."""
    before = {"a": True, "b": False, "c": False, "d": True, "e": False, "only first": True}
    after = {"e": True, "d": True, "c": True, "b": False, "a": True, "only second": False}
    for name, right, shift in (("one", before, 0.0), ("two", after, -0.5)):
        for place, (question, is_right) in enumerate(sorted(right.items())):
            rules = {"letter_loglik": is_right} | ({"lmms": is_right} if name == "two" else {})
            append_jsonl(tmp_path / name / "samples.jsonl", sample(question, 1 + place % 2 * 0.2 + shift, rules))
    return tmp_path / "one", tmp_path / "two"


def diff(*arguments):
    done = CliRunner().invoke(app, ["diff", *map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout), done.stderr


def test_pairs_are_by_id_and_only_common_rules_are_told(runs):
    code, document, err = diff(*runs)
    assert code == 0, err
    assert document["num_samples"] == 5
    assert "1 of 6 samples of" in err
    assert document["loss"]["difference"] == pytest.approx(-0.5)
    assert document["loss"]["difference_ci"] == pytest.approx([-0.5, -0.5])
    (row,) = document["accuracy"]
    assert (row["rule"], row["first"], row["second"]) == ("letter_loglik", 0.4, 0.8)
    assert row["second_ci"] == pytest.approx(wilson_interval(4, 5))
    assert (row["only_first"], row["only_second"], row["p_value"]) == (0, 2, 0.5)


def test_other_questions_are_refused(runs, tmp_path):
    first, _ = runs
    other = tmp_path / "three"
    code, document, _ = diff(first, other)
    assert code == 2
    assert f"samples.jsonl is missing: run `mars evaluate {other}` first." in document["error"]["message"]
    append_jsonl(other / "samples.jsonl", sample("z", 1.0, {}))
    code, document, _ = diff(first, other)
    assert code == 2
    assert (
        "have no sample in common, so nothing can be compared. Evaluate both on the same"
        in document["error"]["message"]
    )
    append_jsonl(other / "samples.jsonl", sample("a", 1.0, {}, prompt="Who?"))
    code, document, _ = diff(first, other)
    assert code == 3
    assert "sample 'a' has the prompt 'Which?' in" in document["error"]["message"]
    assert "and 'Who?' in" in document["error"]["message"]
