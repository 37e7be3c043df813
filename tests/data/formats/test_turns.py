"""Which answers are trained on, system texts, and the parts of messages."""

import pytest

from mars_jax.data.formats.base import FaultError, Turn
from mars_jax.data.formats.registry import draft
from tests.helpers.rows import fault, read

SHAPES = {
    "conversations": lambda role, text: {"from": {"user": "human", "assistant": "gpt"}[role], "value": text},
    "messages": lambda role, text: {"role": role, "content": text},
}
each_shape = pytest.mark.parametrize("column", SHAPES)


def chat(column, *marks):
    """A row of as many questions and answers; each answer has a mark, an object of more keys."""
    turn = SHAPES[column]
    turns = [
        part
        for number, mark in enumerate(marks)
        for part in (turn("user", f"what {number}?"), turn("assistant", f"that {number}") | mark)
    ]
    return {column: turns}


@each_shape
@pytest.mark.parametrize(
    ("key", "no", "yes"), [("loss", False, True), ("weight", 0, 1), ("train", False, True), ("weight", 0.0, 1.0)]
)
def test_a_turn_that_its_row_excludes_from_training_was_trained(tmp_path, column, key, no, yes):
    (record,), notes = read(tmp_path, [chat(column, {key: no}, {key: yes}, {key: None}, {})])
    assert [turn.learn for turn in record.turns if turn.role == "assistant"] == [False, True, True, True]
    assert notes == []


@each_shape
def test_a_conversation_is_cut_after_the_last_answer_that_is_trained_on(tmp_path, column):
    row = chat(column, {"loss": True}, {"loss": False}) | {"images": ["a.png", "b.png"]}
    key = "value" if column == "conversations" else "content"
    for turn in row[column][::2]:
        turn[key] = f"<image>{turn[key]}"
    (record,), notes = read(tmp_path, [row])
    assert record.turns == (Turn("user", "<image>what 0?"), Turn("assistant", "that 0"))
    assert record.images == (tmp_path / "a.png",)
    (note,) = notes
    assert note.startswith("data.json: 1 of 1 rows: turns after the last answer that is trained on; they were left out")


@each_shape
def test_a_row_without_an_answer_that_is_trained_on_is_refused(tmp_path, column):
    message = fault(tmp_path, [chat(column, {"loss": False}, {"weight": 0})])
    assert "item 0 (id 'item-0'): no answer is trained on: all are excluded" in message


@each_shape
@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ({"weight": 0.5}, r"turn 1: 'weight' is 0.5 \(number\); true or 1 \(trained on\) and false or 0"),
        ({"weight": 2}, r"turn 1: 'weight' is 2 \(number\)"),
        ({"weight": float("inf")}, r"turn 1: 'weight' is inf \(number\)"),
        ({"loss": "false"}, r"turn 1: 'loss' is 'false' \(text\)"),
        ({"loss": [1]}, r"turn 1: 'loss' is \[1\] \(list\)"),
        ({"loss": False, "weight": 1}, "turn 1: 'loss' and 'weight' contradict each other"),
        ({"loss_scale": 1.0}, "turn 1: 'loss_scale' is 1.0: training weights are read from turns alone"),
        ({"training": False}, "turn 1: 'training' is False: training weights are read from turns alone"),
        ({"supervised": False}, "turn 1: 'supervised' is False: training weights are read from turns alone"),
        ({"calculate_loss": 0}, "turn 1: 'calculate_loss' is 0: training weights are read from turns alone"),
        ({"is_target": False}, "turn 1: 'is_target' is False: training weights are read from turns alone"),
        ({"Loss": False}, "turn 1: 'Loss' is False: it is read as 'loss' alone. Rename it"),
        ({"WEIGHT": "0"}, "turn 1: 'WEIGHT' is '0': it is read as 'weight' alone. Rename it"),
        ({"Thinking": "hm"}, "turn 1: 'Thinking' is 'hm': reasoning is not read"),
        ({"System": "Be short."}, "turn 1: 'System' is 'Be short.': system texts are read from the row's system, "),
        ({"masked": True}, "turn 1: 'masked' is True: training weights are read from turns alone"),
        (
            {"bounding_boxes_sequence": [[0]]},
            r"turn 1: 'bounding_boxes_sequence' is \[\[0\]\]: coordinates are not put",
        ),
        ({"thinking": "hm"}, "turn 1: 'thinking' is 'hm': reasoning is not read"),
        ({"images": ["a.png"]}, r"turn 1: 'images' is \['a.png'\]: pictures are read from 'image' and 'images'"),
    ],
)
def test_marks_that_cannot_be_honoured_are_refused(column, mark, text):
    with pytest.raises(FaultError, match=text):
        draft(chat(column, mark, {}))


@each_shape
def test_a_question_that_is_to_be_trained_on_is_refused(column):
    row = chat(column, {})
    row[column][0]["train"] = True
    with pytest.raises(FaultError, match="turn 0: 'train' is True in a turn of the user; only answers are trained on"):
        draft(row)
    row[column][0]["train"] = False
    assert draft(row).turns[0].role == "user"


@each_shape
def test_the_last_answer_alone_is_trained_on_where_the_setting_asks_for_it(tmp_path, column):
    rows = [chat(column, {}, {}), chat(column, {"loss": True}, {"loss": True}, {"loss": False})]
    records, _ = read(tmp_path, rows, learn="last")
    for record in records:
        assert [turn.learn for turn in record.turns if turn.role == "assistant"] == [False, True]


@each_shape
def test_a_system_column_beside_a_system_turn_was_refused_as_a_start_with_system(tmp_path, column):
    row = chat(column, {})
    turn = (
        {"from": "system", "value": "Be kind."}
        if column == "conversations"
        else {"role": "system", "content": "Be kind."}
    )
    row[column].insert(0, turn)
    assert "the row has 'system' and a system turn; one system text is read" in fault(tmp_path, [row | {"system": "x"}])
    row[column].insert(0, turn)
    assert "2 system turns; one is read, at the start. Join them" in fault(tmp_path, [row])
    turn["value" if column == "conversations" else "content"] = ""
    (record,), _ = read(tmp_path, [row | {"system": "Be short."}])
    assert [turn.text for turn in record.turns] == ["Be short.", "what 0?", "that 0"]


def test_two_conversations_in_a_row_are_refused():
    row = chat("conversations", {})
    assert draft(row | {"messages": []}).format == "llava"
    with pytest.raises(FaultError, match=r"'conversations' is .*: the row has two conversations. Take one of them out"):
        draft(row | chat("messages", {}))


def parts(*content, **row):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "red"}], **row}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "image", "image": "a.png"}, {"type": "text", "text": "one."}, {"type": "text", "text": "two."}],
         ("<image>", "one.", "two.")),
        ([{"type": "text", "text": "\nLook:"}, {"type": "image", "image": "a.png"}], ("\nLook:", "<image>")),
        ([{"image": "a.png"}, {"text": "what?"}], ("<image>", "what?")),
        ([{"type": "image", "text": None, "image": "a.png"}, {"type": "text", "text": "what?", "image": None}],
         ("<image>", "what?")),
    ],
)  # fmt: skip
def test_typed_parts_were_glued(content, expected):
    made = draft(parts(*content))
    assert made.turns[0] == Turn("user", "".join(expected), parts=expected)
    assert made.images == ("a.png",)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image", "image": "a.png", "text": "a caption"}, "each with a text or a picture of its own"),
        ({"type": "text", "text": "what?", "image": "a.png"}, "each with a text or a picture of its own"),
        ({"image": "a.png", "text": "what?"}, "each with a text or a picture of its own"),
        ({"type": "input_text", "text": "what?"}, "a part is {'text': 'what\\?', 'type': 'input_text'}; parts of type"),
        ("what?", "a part is 'what\\?'; parts of type 'text' and 'image' are supported"),
        (
            {"type": "image", "source": {"type": "base64", "data": "x"}},
            "a part: 'source' is .*: pictures are read from",
        ),
        ({"type": "image", "index": 2}, "a part is picture 2 of 'images', where the next is picture 0"),
        ({"type": "audio", "audio": "x.mp3"}, "a part: 'audio' is 'x.mp3': audio is not read"),
        ({"type": "thinking", "thinking": "hm"}, "a part: 'thinking' is 'hm': reasoning is not read"),
        ({"type": "image", "image": "a.png", "max_pixels": 200}, "a part: 'max_pixels' is 200: pictures have no sizes"),
        ({"type": "text", "text": "what?", "weight": 0}, "a part: 'weight' is 0: a part is trained on with its turn"),
        ({"type": "text", "text": "what?", "Loss": "False"}, "a part: 'Loss' is 'False': a part is trained on with"),
        ({"type": "text", "text": "what?", "train": 0.5}, "a part: 'train' is 0.5: a part is trained on with its turn"),
        ({"type": "image", "URL": "a.png"}, "a part: 'URL' is 'a.png': it is read as 'url' alone. Rename it"),
        ({"type": ["text"], "text": "what?"}, "parts of type 'text' and 'image' are supported"),
    ],
)
def test_parts_that_hold_more_than_is_read_are_refused(part, text):
    with pytest.raises(FaultError, match=text):
        draft(parts(part, images=["a.png"]))


@each_shape
def test_turns_in_the_column_of_others_are_refused_with_where_they_are_read(column):
    other = "messages" if column == "conversations" else "conversations"
    with pytest.raises(FaultError, match=f"are read from '{column}': rename '{other}'") as caught:
        draft({other: chat(column, {})[column]})
    assert len(caught.value.args) == 2


@each_shape
def test_an_empty_mark_of_a_turn_was_refused_where_it_is_nan(column):
    assert draft(chat(column, {"weight": float("nan")}, {"Loss": True})).turns == draft(chat(column, {}, {})).turns


def test_a_part_that_is_trained_on_is_no_fault():
    made = draft(parts({"type": "text", "text": "what?", "weight": 1, "loss": True, "train": None}))
    assert made.turns[0].text == "what?"
    assert made.unread == ("messages.content.weight", "messages.content.loss")
