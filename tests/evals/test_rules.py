"""Rules that read answers out of text, the statistics of right and wrong, and the tables that an evaluation makes."""

import time
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
        ("b", None, None, "B", "B"),
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
        ("The correct answer is B.", None, None, None, "B"),
        ("G. none", None, None, None, None),
        ("The answer is G.", None, None, None, None),
        ("", None, None, None, None),
        ("7", None, None, None, None),
    ],
)
def test_each_rule_reads_what_its_benchmark_reads(text, lmms, llava, mmstar, letter):
    found = {rule: read_answer(rule, text, LETTERS) for rule in ("lmms", "llava", "mmstar", "letter")}
    assert found == {"lmms": lmms, "llava": llava, "mmstar": mmstar, "letter": letter}


def test_a_letter_beyond_the_options_is_unread_and_not_a_wrong_letter():
    for rule, text in [("lmms", "E. a fox"), ("llava", "The answer is E."), ("mmstar", "Every"), ("letter", "(E)")]:
        assert read_answer(rule, text, "ABC") is None
        assert not is_right(rule, text, "A", "ABC")
        assert read_answer(rule, text, LETTERS) == "E"


WRAPPINGS = [
    *(
        "{}",
        "({})",
        "[{}]",
        "{{{}}}",
        "<{}>",
        "'{}'",
        '"{}"',
        "\u201c{}\u201d",
        "\u2018{}\u2019",
        "\u00ab{}\u00bb",
        "\u300c{}\u300d",
    ),
    *(
        "*{}*",
        "**{}**",
        "***{}***",
        "_{}_",
        "__{}__",
        "`{}`",
        "```{}```",
        "**({})**",
        "**{}.**",
        "({}).",
        "{}.",
        "{})",
        "~~{}~~",
    ),
    *(
        "${}$",
        "$${}$$",
        "\\({}\\)",
        "\\[{}\\]",
        "\\boxed{{{}}}",
        "$\\boxed{{{}}}$",
        "\\boxed{{\\text{{{}}}}}",
        "\\mathbf{{{}}}",
    ),
    *(
        "<answer>{}</answer>",
        "<answer>\n({})\n</answer>",
        "<b>{}</b>",
        "<option>{}</option>",
        "Option {}",
        "option ({})",
    ),
]
PLACES = [
    *(
        "{}",
        " {}\n",
        "Answer: {}",
        "answer:{}",
        "**Answer: {}**",
        "**Answer:** {}",
        "The answer is {}",
        "The answer is {}.",
    ),
    *("The correct answer is {}.", "The correct option is: {}", "Final answer: {}", "### Answer\n{}", "I'd choose {}"),
    *(
        "{}\n\nThe fish lives in water.",
        "{}\nBecause it swims.",
        "It lives in water.\n\n{}",
        "My answer is {} because it swims.",
    ),
    *(
        "<think>A or C? Not (D).</think>\n{}",
        "A dog runs on land, so the answer is {}.",
        "\u7b54\u6848\uff1a{}",
        "Answer: {}\n\nA is a bird.",
    ),
]


@given(st.sampled_from(WRAPPINGS), st.sampled_from(PLACES), st.sampled_from("ABCD"))
def test_a_letter_is_read_in_every_wrapping_and_place(wrapping, place, letter):
    text = place.format(wrapping.format(letter))
    assert read_answer("letter", text, "ABCD") == letter, text
    assert read_answer("letter", text, "ABCD".replace(letter, "")) is None, text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "B because it swims",
            "B, because it swims",
            "B - a fish",
            "B/ a fish",
            "**B. a fish**",
            "\\boxed{B. a fish}",
        ),
        *(
            "Answer: (B) a fish",
            "**B)** a fish",
            "[B] a fish",
            "b) a fish",
            "(b)",
            "b.",
            "answer: b",
            "the correct answer is b.",
        ),
        *(
            "\uff22",
            "B\u3002",
            "B\u3001\u9c7c",
            "B\uff0e\u9c7c",
            "\u7b54\u6848\u662fB\u3002",
            "\u9009B",
            "\u00a0B\u200b",
            "\u24b7",
        ),
        *(
            "B is correct",
            "B is the best answer.",
            "option B is correct",
            "The answer is B, not A.",
            "answer=B",
            '{"answer": "B"}',
        ),
        *(
            "It is not A. It is B.",
            "I think it's B",
            "The picture shows a fish. B",
            "B<|im_end|>",
            "A cat is left, so answer: B",
        ),
    ],
)
def test_other_forms_that_models_write_are_read(text):
    assert read_answer("letter", text, "ABCD") == "B"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "not A, but B",
            "It isn't A, C or D, so it is B.",
            "B rather than A.",
            "B instead of A",
            "A is wrong, B is correct",
        ),
        *("B, not A or C", "Neither A nor C fits. B", "A is not shown. It must be B.", "**A** is incorrect. Answer: B"),
        *("B (a fish)", "\u6b63\u89e3\u306fB\u3067\u3059", "\u4e0d\u9009A\uff0c\u9009B"),
    ],
)
def test_letters_that_an_answer_denies_are_no_answer(text):
    assert read_answer("letter", text, "ABCD") == "B"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "A/B",
            "(A) and (B)",
            "A, B",
            "A & B",
            "A, B, C, D",
            "A B C D",
            "A and B.",
            "The answer is A, B and C.",
            "<answer>A, C</answer>",
        ),
        *(
            "Neither A nor B",
            "The answer isn't A",
            "The answer cannot be A.",
            "Anything but A",
            "Option B is wrong.",
            "(B) is wrong",
        ),
        *("A. a bird\nB. a fish", "A) a bird B) a fish C) a cat D) a dog", "N/A", "n/a"),
        *("A dog is at B.", "vitamin C", "hepatitis B.", "Figure A", "It lies near D.", "A (cat\nor so)"),
    ],
)
def test_lists_denials_and_names_of_other_things_are_unread(text):
    assert read_answer("letter", text, "ABCD") is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "A dog runs.",
            "a dog",
            "The answer is a dog",
            "The answer is A dog",
            "I",
            "Blue",
            "Because",
            "AB",
            "BB",
            "Vitamin B is good",
        ),
        *(
            "A or B",
            "Answer: A or B",
            "The answer is A. No: The answer is B.",
            "B\n\nC",
            "A: a bird\nB: a fish\nC: a cat\nD: a dog",
        ),
        *("The answer is E, not (B).", "\\boxed{A} or \\boxed{B}", "C++ and D's B-movie", "", "7", "None of them"),
    ],
)
def test_words_and_contradictions_are_unread(text):
    assert read_answer("letter", text, "ABCD") is None


@given(st.sampled_from(["lmms", "llava", "mmstar", "letter"]), st.text() | st.text("ABCXYZabc .:()*\n"))
def test_no_text_is_read_as_a_letter_beyond_the_options(rule, text):
    assert read_answer(rule, text, "AB") in ("A", "B", None)


def test_long_texts_are_read_in_no_time():
    for text in (
        "*" * 20_000,
        "(" * 20_000 + "B",
        "the answer is " * 5000,
        "<answer>" * 5000,
        "\\boxed{" * 5000,
        "B " * 20_000,
        "A" + " " * 20_000,
        "not A, " * 5000 + "!",
        "A, B or " * 5000,
        "not the " * 5000,
    ):
        start = time.perf_counter()
        read_answer("letter", text, "AB")
        assert time.perf_counter() - start < 1.0


def test_exact_answers_differ_neither_by_case_nor_by_white_space():
    assert is_right("exact", " a  Red\nsquare", "A red square", ())
    assert not is_right("exact", "a red squares", "a red square", ())


@pytest.mark.parametrize(
    ("text", "target"),
    [
        *(
            ("caf\u00e9", "cafe\u0301"),
            ("\uff13", "3"),
            ("\u00a0yes", "yes"),
            ("yes\u200b", "yes"),
            ("stra\u00dfe", "STRASSE"),
        ),
        *(
            ("a\u3000cat", "a cat"),
            ("\ufb01sh", "fish"),
            ("\uac00", "\u1100\u1161"),
            ("\u1e9e", "ss"),
            ("\u0390", "\u03b9\u0308\u0301"),
        ),
    ],
)
def test_exact_answers_of_two_unicode_forms_are_equal(text, target):
    assert is_right("exact", text, target, ())
    assert is_right("exact", target, text, ())


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
        ("base", "lmms"): (0.25, 2),
        ("base", "llava"): (0.25, 2),
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
