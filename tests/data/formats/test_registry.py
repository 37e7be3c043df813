"""What holds for every data format, and a format and an answer rule that are registered from outside."""

import json

import numpy as np
import pytest

from mars_jax.data.formats.base import Conversation, Draft, Format, Keys, Turn
from mars_jax.data.formats.registry import FORMATS, detect, draft
from mars_jax.data.records import load_records
from mars_jax.errors import ConfigError
from mars_jax.evals.evaluator import Outcome
from mars_jax.evals.rules import RULES, AnswerRule, is_right, rules_of
from mars_jax.evals.summary import summary
from tests.helpers.tiny_data import save_picture

# A row of each format; pictures are called a.png.
EXAMPLES = {
    "llava": {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}],
    },
    "llava_scienceqa": {
        "id": "1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "Which is a mineral?\nContext: N/A\nOptions: (A) rock (B) quartz\n<image>"},
            {"from": "gpt", "value": "The answer is B."},
        ],
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
    },
    "scienceqa": {
        "image": "a.png",
        "question": "Which is a mineral?",
        "choices": ["granite", "quartz"],
        "answer": 1,
        "hint": "",
        "grade": "grade4",
        "subject": "natural science",
        "category": "Rocks",
    },
    "mmstar": {
        "index": 7,
        "question": "What is it?\nOptions: A: a cat, B: a dog, C: a cow, D: a pig",
        "image": "a.png",
        "answer": "C",
        "category": "coarse perception",
        "l2_category": "image scene",
    },
    "vqa": {"id": "1", "image": "a.png", "question": "Where is the lesion?", "answer": "left lung"},
    "choices": {"image": "a.png", "question": "Which colour?", "choices": ["red", "blue"], "answer": "blue"},
    "mmbench": {
        "index": 3,
        "image": "a.png",
        "question": "What is it?",
        "hint": "It lives in water.",
        "A": "fish",
        "B": "bird",
        "answer": "A",
        "category": "animals",
    },
}

every_format = pytest.mark.parametrize("name", FORMATS.names)


def load(folder, row):
    """The record of a file with one row."""
    save_picture(folder / "a.png")
    (folder / "data.json").write_text(json.dumps([row]))
    (record,) = load_records(folder / "data.json")
    return record


def test_every_format_has_an_example_here():
    assert set(EXAMPLES) == set(FORMATS.names)


@every_format
def test_a_format_is_registered_under_its_own_name(name):
    assert FORMATS[name].name == name


@every_format
def test_an_example_is_detected_as_its_format(name):
    assert detect(EXAMPLES[name]) is FORMATS[name]


@every_format
def test_no_format_claims_the_example_of_a_more_general_one(name):
    earlier = FORMATS.names[: FORMATS.names.index(name)]
    assert not any(FORMATS[name].detect(EXAMPLES[other]) for other in earlier)


@every_format
def test_no_format_but_the_fallback_claims_an_empty_row_or_fails_on_odd_values(name):
    odd = {"conversations": [None, {"from": "gpt"}]}
    assert [FORMATS[name].detect(row) for row in ({}, odd)] == [name == "llava"] * 2


@every_format
def test_an_example_becomes_a_draft_that_ends_with_the_assistant(name):
    made = draft(EXAMPLES[name])
    assert made.format == name
    assert made.images == ("a.png",)
    assert [turn.role for turn in made.turns] == ["user", "assistant"]
    assert made.turns[-1].text
    assert not made.options or made.turns[-1].text in made.options
    assert all(isinstance(text, str) for tag in made.tags for text in tag)


@every_format
def test_an_example_is_loaded_as_a_record_with_all_that_its_draft_has(name, tmp_path):
    record, made = load(tmp_path, EXAMPLES[name]), draft(EXAMPLES[name])
    assert record.images == (tmp_path / "a.png",)
    assert Draft(record.format, ("a.png",), record.turns, record.options, record.tags) == made


@every_format
def test_the_answer_rules_of_a_format_exist_and_find_its_own_answer_right(name):
    made = draft(EXAMPLES[name])
    assert FORMATS[name].answer_rules
    for rule in FORMATS[name].answer_rules:
        assert RULES[rule].name == rule
    # Rules of other scripts for the same benchmark may not read its answer.
    assert is_right(FORMATS[name].answer_rules[0], made.turns[-1].text, made.turns[-1].text, made.options)


@every_format
def test_a_format_s_prompt_is_recorded_by_evaluations(name, tmp_path):
    outcome = Outcome(np.ones(1), np.ones(1, int), np.zeros(0, int), np.zeros(0, bool))
    document = summary([load(tmp_path, EXAMPLES[name])], {"base": outcome, "finetuned": outcome}, ())
    assert document["prompt"] == FORMATS[name].prompt


# Registered from outside.


def read_toy(row, num_pictures):
    return Conversation((Turn("user", f"<image>\n{row['ask']}"), Turn("assistant", row["reply"])), [row["photo"]])


TOY = Format(
    name="toy",
    keys=Keys(row=frozenset({"ask", "reply", "photo"})),
    detect=lambda row: {"ask", "reply"} <= row.keys(),
    read=read_toy,
    tags=lambda row, num_pictures: [("kind", "toy")],
    prompt="the toy's own",
    answer_rules=("toy_last_word", "exact"),
)
TOY_RULE = AnswerRule(
    "toy_last_word",
    read=lambda text, options: text.split()[-1].lower() if text else None,
    target=lambda text: text.split()[-1].lower(),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(FORMATS, "_members", dict(FORMATS._members))
    monkeypatch.setattr(RULES, "_members", dict(RULES._members))
    RULES.register(TOY_RULE)
    return FORMATS.register(TOY)


def test_a_format_registered_from_outside_is_read_and_scored_by_its_own_rule(toy, tmp_path):
    record = load(tmp_path, {"id": "t", "ask": "Which colour?", "reply": "It is Red", "photo": "a.png"})
    assert (record.format, record.id, record.images) == ("toy", "t", (tmp_path / "a.png",))
    assert record.turns == (Turn("user", "<image>\nWhich colour?"), Turn("assistant", "It is Red"))

    def answered(text):
        return Outcome(np.ones(1), np.ones(1, int), np.zeros(0, int), np.zeros(0, bool), (text,))

    document = summary([record], {"base": answered(""), "finetuned": answered("clearly red")}, ())
    assert document["prompt"] == "the toy's own"
    found = {(row["condition"], row["rule"]): (row["accuracy"], row["unread"]) for row in document["generated"]}
    assert found == {
        ("base", "toy_last_word"): (0.0, 1),
        ("base", "exact"): (0.0, 0),
        ("finetuned", "toy_last_word"): (1.0, 0),
        ("finetuned", "exact"): (0.0, 0),
    }
    assert {(row["tag"], row["value"]) for row in document["by_tag"]} == {("kind", "toy")}


def test_a_format_registered_later_may_claim_rows_of_an_earlier_one(toy):
    assert detect(EXAMPLES["llava"] | {"ask": "?", "reply": "!"}) is toy
    assert detect(EXAMPLES["llava"]) is FORMATS["llava"]


def test_answers_to_several_formats_are_read_by_the_exact_text_alone(toy):
    assert list(rules_of(["toy", "toy"])) == ["toy_last_word", "exact"]
    assert list(rules_of(["toy", "llava"])) == ["exact"]


def test_a_rule_that_no_one_registered_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"answer rule is 'lmm'; allowed: lmms, llava, .*Did you mean 'lmms'"):
        is_right("lmm", "B", "B", "AB")


def test_pictures_in_a_format_s_own_column_come_before_those_of_the_common_ones(toy):
    made = draft({"ask": "Which?", "reply": "red", "photo": "a.png", "image": "b.png"})
    assert made.images == ("a.png", "b.png")
