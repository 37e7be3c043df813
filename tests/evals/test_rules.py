"""Rules that read answers out of text, the statistics of right and wrong, and the tables that an evaluation makes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mars_jax.data.formats.base import Turn
from mars_jax.data.formats.registry import draft
from mars_jax.data.records import Record
from mars_jax.evals.evaluator import Outcome
from mars_jax.evals.rules import is_right, read_answer, rules_of
from mars_jax.evals.stats import macro_mean, mcnemar, wilson_interval
from mars_jax.evals.summary import samples, summary

LETTERS = "ABCDE"


@pytest.mark.parametrize(
    ("text", "lmms", "llava", "mmstar", "letter"),
    [
        ("B", "B", "B", "B", "B"),
        (" B\n", "B", "B", "B", "B"),
        ("b", None, None, "B", None),
        ("B. a cat", "B", "B", "B", "B"),
        ("B.", "B", None, "B", "B"),
        ("(B)", None, None, "B", "B"),
        ("B) a cat", None, None, "B", "B"),
        ("The answer is B.", None, "B", "B", "B"),
        ("The answer is B", None, None, "B", "B"),
        ("Option B", None, None, "B", "B"),
        ("The answer is A. No: The answer is B.", None, None, "A", None),
        ("A cat", None, None, "A", None),
        ("A cat, so answer: B", None, None, "A", "B"),
        ("Because of the hat.", None, None, "B", None),
        ("G. none", "G", None, "G", None),
        ("", None, None, None, None),
        ("7", None, None, None, None),
    ],
)
def test_each_rule_reads_what_its_benchmark_reads(text, lmms, llava, mmstar, letter):
    found = {rule: read_answer(rule, text, LETTERS) for rule in ("lmms", "llava", "mmstar", "letter")}
    assert found == {"lmms": lmms, "llava": llava, "mmstar": mmstar, "letter": letter}


def test_a_letter_beyond_the_choices_is_wrong_not_unread():
    assert read_answer("llava", "The answer is E.", "ABC") == "E"
    assert not is_right("llava", "The answer is E.", "A", "ABC")


def test_exact_answers_differ_neither_by_case_nor_by_white_space():
    assert is_right("exact", " a  Red\nsquare", "A red square", ())
    assert not is_right("exact", "a red squares", "a red square", ())


def test_answers_that_are_sentences_are_read_by_their_letters():
    options, target = ("The answer is A.", "The answer is B."), "The answer is B."
    for text, right in (("The answer is B.", "llava letter"), ("B", "llava lmms letter"), ("The answer is A.", "")):
        assert [rule for rule in ("llava", "lmms", "letter") if is_right(rule, text, target, options)] == right.split()


def test_the_rules_of_a_file_are_those_of_its_benchmark():
    assert list(rules_of(["scienceqa", "scienceqa"])) == ["lmms", "llava", "letter"]
    assert list(rules_of(["llava_scienceqa"])) == ["llava", "lmms", "letter"]
    assert list(rules_of(["mmstar"])) == ["mmstar", "letter"]
    assert list(rules_of(["mmstar", "scienceqa"])) == list(rules_of(["llava"])) == ["exact"]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_a_fair_coin_s_test_of_the_pairs_that_differ(pairs):
    first, second = np.asarray(pairs).T
    found = mcnemar(first, second)
    fewer, more = sorted((found.only_first, found.only_second))
    assert fewer + more == sum(a != b for a, b in pairs)
    assert found.p_value == pytest.approx(min(1.0, 2 * stats.binom.cdf(fewer, fewer + more, 0.5)))


def test_a_macro_mean_weighs_classes_alike():
    assert macro_mean(np.asarray([True, True, True, False]), ["many", "many", "many", "few"]) == 0.5


# Tables.


def record(number: int, row: dict) -> Record:
    made = draft(row)
    turns = (*made.turns[:-1], Turn("assistant", made.turns[-1].text))
    return Record(str(number), (), turns, "", f"text:{number}", (), made.format, made.options, made.tags)


def outcome(answers, choices=None, right=None) -> Outcome:
    count = len(answers)
    return Outcome(
        np.full(count, 2.0),
        np.full(count, 4),
        np.zeros(0, int) if choices is None else np.asarray(choices),
        np.zeros(0, bool) if right is None else np.asarray(right),
        tuple(answers),
    )


def science(number: int, **fields) -> Record:
    row = {"question": "Which?", "choices": ["a cat", "a dog", "a fox"][: fields.pop("count", 3)], "answer": 1}
    return record(number, row | fields)


@pytest.fixture
def questions():
    return [
        science(0, subject="natural science", hint="a hint", grade="grade3"),
        science(1, subject="natural science", hint="", grade="grade6"),
        replace(science(2, subject="social science", grade="grade7", hint="look"), images=()),
        science(3, subject="language science", grade="grade12", count=2),
    ]


def test_results_on_scienceqa_are_broken_down_by_its_official_columns(questions):
    outcomes = {
        "base": outcome(["C", "no idea", "B. a dog", "E"], [2, 0, 1, 0], [False, False, True, False]),
        "finetuned": outcome(["B", "The answer is B.", "(B)", "B"], [1, 1, 1, 0], [True, True, True, False]),
    }
    document = summary(questions, outcomes, LETTERS[:3])
    assert (document["split"], document["prompt"]) == ("test", "lmms-eval's of ScienceQA")
    assert document["scoring"] == "letter_loglik"
    generated = {(row["condition"], row["rule"]): (row["accuracy"], row["unread"]) for row in document["generated"]}
    assert generated == {
        ("base", "lmms"): (0.25, 1),
        ("base", "llava"): (0.25, 1),
        ("base", "letter"): (0.25, 2),
        ("finetuned", "lmms"): (0.5, 2),
        ("finetuned", "llava"): (0.75, 1),
        ("finetuned", "letter"): (1.0, 0),
    }
    rows = {
        (row["tag"], row["value"]): (row["num_samples"], row["base"], row["finetuned"])
        for row in document["by_tag"]
        if row["rule"] == "letter_loglik"
    }
    assert rows == {
        ("subject", "natural science"): (2, 0, 1),
        ("subject", "social science"): (1, 1, 1),
        ("subject", "language science"): (1, 0, 0),
        ("context", "text"): (2, 0.5, 1),
        ("context", "none"): (2, 0, 0.5),
        ("grade", "1-6"): (2, 0, 1),
        ("grade", "7-12"): (2, 0.5, 0.5),
    }
    intervals = [row["finetuned_ci"] for row in document["by_tag"] if row["value"] == "7-12"]
    assert intervals[0] == pytest.approx(wilson_interval(1, 2))
    paired = {row["rule"]: (row["only_first"], row["only_second"], row["p_value"]) for row in document["paired"]}
    assert paired["letter_loglik"] == (0, 2, 0.5)
    assert paired["letter"] == (0, 3, 0.25)
    assert "macro_means" not in document


def test_a_picture_and_a_hint_are_two_contexts():
    made = draft({"question": "?", "choices": ["x", "y"], "answer": 0, "hint": "h", "image": "a.png"})
    assert made.tags == (("context", "text"), ("context", "image"))
    assert made.options == ("A", "B")


def test_mmstar_s_means_are_over_classes():
    def star(number, category, name):
        row = {"question": "Which? A: x, B: y", "answer": "A", "category": category, "l2_category": name}
        return replace(record(number, row | {"image": "a.png"}), images=())

    kinds = [("math", "geometry")] * 3 + [("math", "numeric"), ("logic", "common")]
    questions = [star(number, *kind) for number, kind in enumerate(kinds)]
    outcomes = {"base": outcome(["B"] * 5), "finetuned": outcome(["A", "A", "a dog", "B", "the answer is a"])}
    document = summary(questions, outcomes, ())
    means = {row["category"]: row["finetuned"] for row in document["macro_means"] if row["rule"] == "mmstar"}
    assert means == pytest.approx({"math": 0.5, "logic": 1.0, "average": 2 / 3})
    assert document["scoring"] is None
    assert {row["rule"] for row in document["by_tag"]} == {"mmstar", "letter"}


def test_a_sample_s_line_names_what_was_asked_and_what_was_right(questions):
    first, *_ = samples(questions, {"finetuned": outcome(["(B)"] * 4, [1] * 4, [True] * 4)}, LETTERS[:3])
    assert first["prompt"].startswith("Context: a hint\nWhich?\nA. a cat\nB. a dog")
    assert first["tags"] == ["subject: natural science", "context: text", "grade: 1-6"]
    assert (first["split"], first["format"], first["target"]) == ("test", "scienceqa", "B")
    assert first["finetuned"] == {
        "loss": 0.5,
        "response": "B",
        "generated": "(B)",
        "right": {"letter_loglik": True, "lmms": False, "llava": False, "letter": True},
    }
