"""Keys that no format reads: which of them are refused, however they and their values are written."""

from decimal import Decimal

import pytest

from mars_jax.data.formats.base import FaultError
from mars_jax.data.formats.registry import draft
from tests.helpers.rows import fault, read

CHAT = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]}
ASKED = {"question": "what?", "answer": "a cat"}
each_kind = pytest.mark.parametrize("row", [CHAT, ASKED], ids=["chat", "asked"])

WEIGHT = "training weights are read from turns alone, as loss, weight, train. Set them there, or take the key out."
PREFERENCE = "pairs and labels of preference are not read. Keep the good answers alone, as conversations."


def refusal(row):
    """The fault of a row."""
    with pytest.raises(FaultError) as caught:
        draft(row)
    (text,) = caught.value.args
    return text


@each_kind
@pytest.mark.parametrize("key", ["weight", "loss", "train", "Weight", "LOSS", " train"])
@pytest.mark.parametrize(
    "value", ["0", "0.5", "0.0", "2", "False", " false ", "no", "high", "0,5", False, 0, 0.5, [1, 0]]
)
def test_a_weight_of_a_row_that_was_written_as_text_was_trained_all_the_same(row, key, value):
    assert refusal({**row, key: value}) == f"{key!r} is {value!r}: {WEIGHT}"


@pytest.mark.parametrize(("key", "cell"), [("weight", "0"), ("weight", "0.5"), ("loss", "False"), ("train", "0")])
def test_a_weight_in_a_cell_of_a_table_was_trained_all_the_same(tmp_path, key, cell):
    message = fault(tmp_path, f"id,question,answer,{key}\n7,what?,a cat,{cell}\n", "d.csv")
    assert f"d.csv:2 (id '7'): {key!r} is {cell!r}: {WEIGHT}" in message


@each_kind
@pytest.mark.parametrize("key", ["weight", "loss", "train", "Loss"])
@pytest.mark.parametrize(
    "value", ["1", "1.0", "True", " yes", True, 1, 1.0, None, "", " ", float("nan"), "nan", "null"]
)
def test_a_row_that_is_trained_on_is_no_fault(row, key, value):
    assert draft({**row, key: value}).turns == draft(row).turns


@each_kind
@pytest.mark.parametrize(
    ("key", "value", "harmless"),
    [
        ("supervised", False, True),
        ("calculate_loss", "0", "1"),
        ("is_target", "false", "a cat"),
        ("shouldTrain", "no", "yes"),
        ("skip", "True", "False"),
        ("Ignore", 1, 0),
        ("mask", True, "oval"),
    ],
)
def test_a_mark_of_a_row_under_another_name_was_trained_all_the_same(row, key, value, harmless):
    assert refusal({**row, key: value}) == f"{key!r} is {value!r}: {WEIGHT}"
    assert draft({**row, key: harmless}).unread == (key,)


@each_kind
@pytest.mark.parametrize("key", ["is_correct", "isCorrect", "desirable"])
@pytest.mark.parametrize("value", [False, "False", 0, "0"])
def test_an_answer_that_is_marked_as_wrong_was_trained(row, key, value):
    assert refusal({**row, key: value}) == f"{key!r} is {value!r}: {PREFERENCE}"
    assert draft({**row, key: True}).unread == (key,)


@pytest.mark.parametrize("value", [True, False, 0, 1, 0.0, "0", "1", "0.0", "True", "FALSE", " false"])
def test_a_label_of_preference_beside_a_conversation_was_missed_as_text(value):
    assert refusal(CHAT | {"label": value}) == f"'label' is {value!r}: {PREFERENCE}"


@pytest.mark.parametrize("value", ["yes", "cat", 2, "3", 0.5, "0.25"])
def test_a_label_that_is_a_class_is_no_preference(value):
    assert draft(CHAT | {"label": value}).unread == ("label",)


@pytest.mark.parametrize("more", [{}, {"choices": ["a cat", "a dog"]}, {"A": "a cat", "B": "a dog"}])
def test_a_label_beside_a_question_is_a_class_unless_it_is_true_or_false(more):
    for value in (True, False, "True", "false"):
        assert refusal(ASKED | more | {"label": value}) == f"'label' is {value!r}: {PREFERENCE}"
    for value in (0, 1, "0", "1", "cat", "yes"):
        assert draft(ASKED | more | {"label": value}).unread == ("label",)


@each_kind
@pytest.mark.parametrize(
    "key", ["System", "SYSTEM", "systemPrompt", "System Message", "system_instruction", "sys_prompt"]
)
def test_a_system_text_under_a_name_in_other_letters_was_lost(row, key):
    assert refusal({**row, key: "Be short."}) == (
        f"{key!r} is 'Be short.': system texts are read from the row's system, system_prompt, system_message, or "
        "from a turn. Rename the key, or take it out."
    )


@each_kind
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("VIDEO", "video is not read"),
        ("nFrames", "video is not read"),
        ("Audio-Path", "audio is not read"),
        ("BBox", "coordinates are not put into texts"),
        ("toolCalls", "calls of tools are not read"),
        ("Tool Calls", "calls of tools are not read"),
        ("ReasoningContent", "reasoning is not read"),
        ("Rejected Response", "pairs and labels of preference"),
        ("lossMask", "training weights are read from turns"),
        ("MAX_PIXELS", "pictures have no sizes"),
        ("ChatTemplateKwargs", "what changes the chat template"),
        ("History", "earlier turns are not read"),
        ("Image_1", "pictures are read from 'image' and 'images'"),
    ],
)
def test_a_key_that_changes_the_meaning_was_missed_in_other_letters(row, key, text):
    assert refusal({**row, key: "x"}).startswith(f"{key!r} is 'x': {text}")


@pytest.mark.parametrize("key", ["Messages", "CONVERSATIONS"])
def test_a_conversation_under_a_name_in_other_letters_was_called_a_second_one(key):
    assert f"it is read as {key.lower()!r} alone. Rename it." in refusal({key: CHAT["conversations"]})
    assert refusal(CHAT | {key: "x"}) == f"{key!r} is 'x': the row has two conversations. Take one of them out."


@each_kind
@pytest.mark.parametrize("key", ["tools", "objects", "chosen", "video", "history"])
@pytest.mark.parametrize("value", ["[]", "{}", "null", "None", " ", "nan"])
def test_a_list_that_is_empty_as_text_was_refused(row, key, value):
    made = draft({**row, key: value})
    assert (made.turns, made.unread) == (draft(row).turns, ())


@pytest.mark.parametrize(
    "columns",
    [
        {"opa": "a cat", "opb": "a dog", "opc": "a cow", "opd": "a pig"},
        {"endings": ["a cat", "a dog"]},
        {"ending0": "a cat", "ending1": "a dog"},
        {"answerA": "a cat", "answerB": "a dog"},
        {"opt1": "a cat", "opt2": "a dog"},
        {"op_1": "a cat", "op_2": "a dog"},
        {"a": "a cat", "b": "a dog"},
        {"option_texts": ["a cat", "a dog"]},
        {"alternatives": ["a cat", "a dog"]},
    ],
)
def test_options_of_other_benchmarks_were_left_out_of_the_question(columns):
    with pytest.raises(FaultError) as caught:
        draft(ASKED | columns | {"label": 1, "cop": 1})
    key, value = next(iter(columns.items()))
    assert caught.value.args[0] == (
        f"{key!r} is {value!r}: options are read from 'choices' or 'options', as a list, or from columns A, B, ... "
        "Give them so."
    )


def test_a_single_letter_as_a_name_is_no_option(tmp_path):
    _, notes = read(tmp_path, [ASKED | {"a": "x", "n": 3}])
    assert notes == ["data.json: keys not read: a 1x, n 1x"]


@pytest.mark.parametrize(("key", "meant"), [("Question", "question"), ("ANSWER", "answer")])
def test_another_spelling_of_a_key_that_is_read_was_noted_and_its_text_lost(key, meant):
    row = ASKED | {"options": ["a cat", "a dog"], "hint": "h", key: "lost"}
    assert refusal(row) == f"'{key}' is 'lost': it is read as '{meant}' alone. Rename it, or take it out."


@pytest.mark.parametrize("mark", [Decimal(0), Decimal("0.5")])
def test_decimals_of_tables_were_no_numbers(mark):
    assert refusal(ASKED | {"weight": mark}).endswith(WEIGHT)
    assert draft(ASKED | {"weight": Decimal(1)}).unread == ("weight",)
