"""What holds for every data format, and a format and an answer rule that are registered from outside."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mars_jax.data.formats.base import Conversation, Draft, FaultError, Format, Keys, Turn
from mars_jax.data.formats.registry import FORMATS, detect, draft
from mars_jax.data.records import load_records
from mars_jax.errors import ConfigError, DataError
from mars_jax.evals.evaluator import Outcome
from mars_jax.evals.rules import RULES, AnswerRule, is_right, rules_of
from mars_jax.evals.summary import summary
from tests.helpers.tiny_data import save_picture

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
# The row of each format that the page on data shows; pictures are called a.png.
EXAMPLES = {
    name: json.loads(row)
    for name, row in re.findall(r"^### (\w+)\n[^#]*?```json\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
}

every_format = pytest.mark.parametrize("name", FORMATS.names)


def load(folder, row):
    """The record of a file with one row."""
    save_picture(folder / "a.png")
    (folder / "data.json").write_text(json.dumps([row]))
    (record,) = load_records(folder / "data.json")
    return record


def test_the_page_on_data_shows_a_row_of_every_format():
    assert list(EXAMPLES) == list(FORMATS.names)


@every_format
def test_a_format_is_registered_under_its_own_name(name):
    assert FORMATS[name].name == name


def places(name, row):
    """The objects of a row whose keys a format lists, with what messages and notes call them: row, turn and part."""
    keys = FORMATS[name].keys
    found = [(row, "", "")]
    if keys.turns:
        found.append((row[keys.turns][0], "turn 0: ", f"{keys.turns}."))
    if keys.parts:
        found.append((row[keys.turns][0][keys.parts][0], "turn 0, a part: ", f"{keys.turns}.{keys.parts}."))
    return found


CHANGES_MEANING = {
    "video": "x.mp4",
    "videos": ["x.mp4"],
    "audios": ["x.mp3"],
    "objects": {"ref": ["sheep"], "bbox": [[90, 160, 135, 212]]},
    "bbox": [1, 2, 3, 4],
    "tools": '[{"name": "zoom"}]',
    "tool_calls": [{"type": "function"}],
    "function_call": {"name": "zoom"},
    "reasoning_content": "it has whiskers",
    "rejected_response": "a dog",
    "chosen": "a cat",
    "min_pixels": 3136,
    "resized_height": 280,
    "loss_scale": 0.5,
    "history": [["q", "a"]],
    "chat_template_kwargs": {"enable_thinking": True},
}


@every_format
@pytest.mark.parametrize("key", CHANGES_MEANING)
def test_a_key_that_changes_the_meaning_was_dropped_in_silence(name, key):
    for number in range(len(places(name, EXAMPLES[name]))):
        row = copy.deepcopy(EXAMPLES[name])
        place, where, _ = places(name, row)[number]
        place[key] = CHANGES_MEANING[key]
        with pytest.raises(FaultError, match=f"^{where}{key!r} is "):
            draft(row)
        for nothing in (None, [], {}, "", float("nan"), [None], {"a": None}):
            place[key] = nothing  # tables fill absent values in
            assert draft(row) == draft(EXAMPLES[name])


@every_format
def test_other_keys_are_named_as_not_read(name):
    row = copy.deepcopy(EXAMPLES[name])
    names = []
    for place, _, column in places(name, row):
        place["data_source"] = "web"
        names.append(f"{column}data_source")
    assert draft(row).unread == tuple(names)
    assert draft(EXAMPLES[name]).unread == ()


@every_format
@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_text_was_read_from_one_key_and_format_alone(name, key):
    plain = draft(EXAMPLES[name]).turns
    assert draft(EXAMPLES[name] | {key: "Be short."}).turns == (Turn("system", "Be short."), *plain)
    for nothing in ("", " ", None):
        assert draft(EXAMPLES[name] | {key: nothing}).turns == plain
    with pytest.raises(FaultError, match=rf"{key!r} is \['x'\] \(list\); a text is expected"):
        draft(EXAMPLES[name] | {key: ["x"]})
    with pytest.raises(FaultError, match="the row has 'system' and 'system_prompt'; one system text is read"):
        draft(EXAMPLES[name] | {"system": "a", "system_prompt": "b"})


def cut_within_a_character(value):
    """A value with half a surrogate pair at the end of each text that is asked or answered."""
    if isinstance(value, list):
        return [cut_within_a_character(item) for item in value]
    if isinstance(value, dict):
        return {
            key: cut_within_a_character(item)
            if key in ("conversations", "messages", "content")
            else item + "\ud83d"
            if key in ("value", "question", "text")
            else item
            for key, item in value.items()
        }
    return value


@every_format
def test_half_a_surrogate_pair_ended_in_a_traceback_of_the_tokenizer(name, tmp_path):
    save_picture(tmp_path / "a.png")
    row = cut_within_a_character(EXAMPLES[name])
    with pytest.raises(
        DataError, match=r"data.json item 0 \(id .*turn 0: character \d+ is '.ud83d', half of a surrogate"
    ):
        load(tmp_path, row)


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
