"""Placeholders, coordinates, sizes and ids of conversations."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mars_jax.data.conversations import MAX_CHARACTERS, MAX_TURNS, has_boxes
from mars_jax.data.files.row import MAX_ID
from mars_jax.data.formats.base import Turn
from tests.helpers.rows import fault, read


def row(question, answer="a cat", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def test_pictures_without_placeholders_are_put_first_with_a_note(tmp_path):
    typed = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}, {"role": "assistant", "content": "x"}]
    rows = [row("what?", image=["a.png", "b.png"]), {"messages": typed, "images": ["a.png"]}]
    rows.append(row("<image>?", image="a.png"))
    (plain, parts, _), notes = read(tmp_path, rows)
    assert plain.turns[0].text == "<image>\n<image>\nwhat?"
    assert (parts.turns[0].text, parts.turns[0].parts) == ("<image>what?", ("<image>", "what?"))
    assert notes[-1] == (
        "data.json: 2 of 3 rows: pictures without <image>; they were put at the start of the first question (the "
        "first: 'item-0')"
    )


@pytest.mark.parametrize(
    ("question", "images", "text"),
    [
        ("<image>\nwhat?", ["a.png", "b.png"], "1 <image> in the user turns but 2 images"),
        ("<image><image>?", ["a.png"], "2 <image> in the user turns but 1 images"),
        ("Is <image 1> red?", ["a.png"], "0 <image> in the user turns but 1 images. Write <image> once for each image. "
         "The text has '<image 1>', which is not read"),
        ("<|image_1|>what?", ["a.png"], "The text has '<|image_1|>', which is not read"),
        ("1: <img>a.png</img> what?", [], "the text has '<img>a.png</img>', which is not read. Give it as 'image'"),
        ("<IMAGE>what?", ["a.png"], "The text has '<IMAGE>', which is not read"),
        ("<ImageHere>what?", ["a.png"], "The text has '<ImageHere>', which is not read"),
        ("<|image_pad|>what?", ["a.png"], "The text has '<|image_pad|>', which is not read"),
        ("[IMG] what?", ["a.png"], "The text has '[IMG]', which is not read"),
        ("<image>Is <image1> red?", ["a.png"], "the text has '<image1>', which is not read. Write <image> where a"),
        ("<image>What is <bbox0>?", ["a.png"], "turn 0: <bbox0> stands for something that is not read (bbox0)"),
        ("<image>What is <region1>?", ["a.png"], "turn 0: <region1> stands for something that is not read (region1)"),
        ("<image>What is <mask>?", ["a.png"], "turn 0: <mask> stands for something that is not read (mask)"),
        ("<video>what?", [], "turn 0: <video> stands for something that is not read (video). Write what it stands for"),
        ("<audio>what?", [], "turn 0: <audio> stands for something that is not read (audio)"),
        ("Find <ref-object>", [], "turn 0: <ref-object> stands for something that is not read (ref-object)"),
    ],
)  # fmt: skip
def test_placeholders_that_would_stay_in_the_text_are_refused(tmp_path, question, images, text):
    assert text in fault(tmp_path, [row(question, images=images)])


def test_a_numbered_placeholder_of_a_question_got_a_second_one(tmp_path):
    asked = {"image": "a.png", "question": "Is <image1> red?", "answer": "yes"}
    assert "the text has '<image1>', which is not read" in fault(tmp_path, [asked])


def test_words_that_stand_for_parts_of_a_picture_are_text_without_one(tmp_path):
    (record,), _ = read(tmp_path, [row("Fill in <mask>.", "the <region> is <img> in HTML")])
    assert record.turns[0].text == "Fill in <mask>."


def test_a_box_to_fill_in_was_learned_as_text(tmp_path):
    assert "turn 1: <bbox> stands for something that is not read (bbox)" in fault(
        tmp_path, [row("Where?", "<bbox><bbox>")]
    )


def test_html_with_closing_tags_is_text(tmp_path):
    (record,), _ = read(tmp_path, [row("What is it?", "<video><source src=x></video>, or <audio></audio>")])
    assert record.turns[1].text.startswith("<video>")


def test_a_windows_line_end_after_a_picture_is_set_off_like_any_other(tmp_path):
    (record,), _ = read(tmp_path, [row("<image>\r\nwhat?\r\nwhy?", image="a.png")])
    assert record.turns[0].text == "<image>\nwhat?\r\nwhy?"


@pytest.mark.parametrize(
    "text",
    [
        "[500, 300, 590, 390]",
        '[{"bbox_2d": [500, 300, 590, 390], "label": "sheep"}]',
        '[{"bbox_2d":[0,1,590,390]}]',
        "<|box_start|>(500,300),(590,390)<|box_end|>",
        "(500, 300), (590, 390)",
        "<box>[[500, 300, 590, 390]]</box>",
        '{"point_2d": [500, 300]}',
        '{"bbox_2d": [\n            500,\n            300,\n            590,\n            390\n        ]}',
        "click(500, 300)",
        "Left_Click(500,300)",
        "click(start_box='(500,300)')",
        "start_box='(500,300)'",
        "pyautogui.click(x=500, y=300)",
        "pyautogui.moveTo(500, 300, duration=1)",
        "swipe(100, 200, 300, 400)",
        "tap [500, 300]",
        "click at (500, 300)",
        '{"x": 500, "y": 300}',
        "{'x1': 5, 'y1': 6, 'x2': 7, 'y2': 8}",
        '{"xmin": 5, "ymin": 6}',
        '{"left": 5, "top": 6}',
        '{"action": "click", "coordinate": [500, 300]}',
        '{"start_coordinate": "(500, 300)"}',
        '<point x="12" y="34">',
        '<points x1="10.5" y1="20.3" alt="a sheep">sheep</points>',
        '<point alt="a sheep" x="12" y="34"/>',
        "<bbox>1, 2, 3, 4</bbox>",
        "[[10, 20], [30, 40]]",
        "[[10, 20], [30, 40], [50, 60]]",
        # Whose first numbers are 0, as at a corner of the picture.
        "swipe(0, 0, 300, 400)",
        '{"x1": 0, "y1": 0, "x2": 300, "y2": 400}',
        '{"x": 0, "y": 0, "width": 300, "height": 400}',
        '<point x="0" y="300">',
        '<points x1="0" y1="0" x2="300" y2="400">',
        "drag([0,0],[500,300])",
        "<box>0, 0, 300, 400</box>",
        "(0, 0), (300, 400)",
        # Long fractions, negative numbers, y before x.
        "[213.33333333333334, 5.0, 10.0, 20.0]",
        "[-5, 10, 20, 30]",
        "scroll(0, -300)",
        '{"y": 500, "x": 300}',
    ],
)
def test_boxes_stayed_as_they_were_while_pictures_were_scaled(tmp_path, text):
    rows = [row("<image>\nfind the sheep", text, image="a.png", id="s"), row("find", text)]
    _, (note,) = read(tmp_path, rows)
    assert note.startswith(
        "data.json: 1 of 2 rows: coordinates in the texts; they are not scaled where pictures are, by "
        "data.max_pixels or the image processor (the first: 's' has "
    )


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.25, 0.5, 0.75]",
        "It has 3, 4, 5 or 6 legs (or 7).",
        "[1, 2]",
        "10 20 30 40",
        "(12, 34)",
        "the point (3, 4), where x=3, y=4",
        "f(1, 2) + add(10, 20) + compress(10, 20) + tapped(10, 20)",
        "2024-01-15, 12/03/2024, datetime(2024, 1, 15)",
        "as in [1, 2], [3]; the intervals [10, 20] and [30, 40]",
        "click(button, 2), then click the button (1, 2 or 3)",
        "click(0.5, 0.25)",
        '{"x": 0.5, "y": 0.25}',
        '{"page": 10, "line": 20, "size": [10, 20]}',
        '<point x="0.5" y="0.25">',
        '<rect x="10" y="20">',
        "<box>0.1, 0.2, 0.3, 0.4</box>",
        "<|box_start|>(0.1,0.2),(0.3,0.4)<|box_end|>",
        "Draw a `<box>` element and 10 others.",
        "the drag [12, 13], air drag (2, 3), scroll [1, 3], retouch(1,2)",
        '"breakpoints": [480, 768], "endpoints": [2, 3], "checkbox": [1, 2]',
    ],
)
def test_numbers_that_are_no_boxes_in_pixels_are_not_noted(tmp_path, text):
    assert read(tmp_path, [row("<image>\nfind the sheep", text, image="a.png")])[1] == []


@pytest.mark.parametrize(
    "start", ['"', "[ ", "[[1,", "((1", "click(", "click at (1,", '"x": 1', "<point x", '"point":[[', '"' + "a" * 20]
)
def test_a_million_characters_are_searched_for_boxes_at_once(start):
    turn = Turn("assistant", start * (MAX_CHARACTERS // len(start)))
    began = time.process_time()
    has_boxes([turn])
    assert time.process_time() - began < 5  # some 0.4 s; a second repetition without limit takes hours


def test_texts_and_conversations_without_end_are_one_fault(tmp_path):
    long = row("x" * (MAX_CHARACTERS + 1), id="long")
    many = {"id": "many", "conversations": row("what?")["conversations"] * (MAX_TURNS // 2 + 1)}
    message = fault(tmp_path, [long, many])
    assert "2 faults." in message
    assert "item 0 (id 'long'): its texts have 1,000,006 characters, more than 1,000,000. Split or shorten" in message
    assert "item 1 (id 'many'): 1,002 turns, more than 1,000. Split the conversation" in message
    assert len(message) < 500


def test_more_pictures_than_any_context_are_one_fault(tmp_path):
    assert "1,001 pictures, more than 1,000. Split the record" in fault(
        tmp_path, [row("what?", images=["a.png"] * 1_001)]
    )


# Ids.


def test_repeated_ids_of_a_published_file_were_refused(tmp_path):
    ids = ["000000000009", "9", 9, "000000000009", "x#2", "x", "x", "x"]
    records, notes = read(tmp_path, [row("what?", id=id) for id in ids])
    assert [record.id for record in records] == ["000000000009", "9", "9#2", "000000000009#2", "x#2", "x", "x#3", "x#4"]
    assert len({record.group for record in records}) == len(ids)
    assert notes == [
        "data.json: 4 of 8 rows: an id that an earlier row has; the second row with an id ID is called ID#2, and so on "
        "(the first: '9')"
    ]


@pytest.mark.parametrize("empty", ["null", "NaN", '""'])
def test_empty_ids_counted_as_one_id_that_is_used_twice(tmp_path, empty):
    text = json.dumps([row("what?", id="ID"), row("why?", id="ID"), row("who?")]).replace('"ID"', empty)
    records, notes = read(tmp_path, text)
    assert [record.id for record in records] == ["item-0", "item-1", "item-2"]
    (note,) = notes
    assert note.startswith("data.json: 2 of 3 rows: an empty id; the row is called item-N, from its place in the file")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ('"%s"' % ("x" * (MAX_ID + 1)), f"the id is no text or number of at most {MAX_ID} characters"),
        ("[1]", f"the id is no text or number of at most {MAX_ID} characters"),
        ('{"a": 1}', f"the id is no text or number of at most {MAX_ID} characters"),
        ("true", f"the id is no text or number of at most {MAX_ID} characters"),
        ("Infinity", f"the id is no text or number of at most {MAX_ID} characters"),
        ('"cut\\ud83d"', "id: character 3 is '\\ud83d', half of a surrogate pair"),
    ],
)
def test_ids_that_are_no_names_are_faults_with_short_messages(tmp_path, bad, text):
    message = fault(tmp_path, json.dumps([row("what?", id="ID")]).replace('"ID"', bad))
    assert text in message
    assert len(message) < 500
    message.encode()


def test_a_thousand_rows_of_one_id_are_named_at_once(tmp_path):
    records, _ = read(tmp_path, [row("what?", id="same")] * 1_000)
    assert records[-1].id == "same#1000"


@pytest.mark.parametrize("nothing", ['""', "[null]", "NaN", "null", "[]", '[""]', '{"bytes": null, "path": null}'])
@pytest.mark.parametrize("column", ["image", "images"])
def test_absent_pictures_of_tables_were_refused(tmp_path, nothing, column):
    text = json.dumps([row("what?", **{column: "NOTHING"})]).replace('"NOTHING"', nothing)
    (record,), _ = read(tmp_path, text)
    assert record.images == ()


def test_keys_that_are_not_read_are_counted_once_a_file(tmp_path):
    rows = [row("what?", data_source="web", width=3) for _ in range(4)] + [row("what?", data_source="web", odd=None)]
    rows[0]["conversations"][0]["name"] = "Ann"
    _, notes = read(tmp_path, rows)
    assert notes == ["data.json: keys not read: data_source 5x, width 4x, conversations.name 1x"]
    _, notes = read(tmp_path, [row("what?", **{f"k{n}": n for n in range(30)}, **{"\x1b[31m": 1})])
    assert notes[0].endswith(", and 11 others")
    assert "\x1b" not in notes[0]


def test_keys_that_are_not_read_are_named_in_the_order_of_the_row_in_every_process(tmp_path):
    keys = [f"key{number * 7919 % 101}" for number in range(20)]
    _, notes = read(tmp_path, [row("what?", **dict.fromkeys(keys, "x"))])
    assert notes == ["data.json: keys not read: " + ", ".join(f"{key} 1x" for key in keys)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("img_name", "x1/source.jpg"), ("imageId", "2370799"), ("image_filename", "a.png"), ("Image", "a.png"),
     ("Figure_path", "a"), ("left", "dev/0.png"), ("image_base64_str", ["iVBOR"]), ("image_id", 7)],
)  # fmt: skip
def test_a_row_whose_picture_is_under_another_name_was_read_without_it(tmp_path, key, value):
    asked = {"question": "what?", "answer": "a cat", key: value}
    assert f"{key!r} is {value!r}: pictures are read from 'image' and 'images'" in fault(tmp_path, [asked])
    (record,), notes = read(tmp_path, [asked | {"image": "a.png"}])  # beside a picture it is no more than a fact
    assert (len(record.images), notes) == (1, [f"data.json: keys not read: {key} 1x"])


ASKED = {"question": "q", "answer": "a"}
NESTED = {
    "id": (row("what?"), "the id is no text or number of at most 500 characters"),
    "image": (row("what?"), "; a path relative to the image folder is expected"),
    "conversations": (row("what?"), " is expected."),
    "messages": (row("what?"), "the row has two conversations. Take one of them out"),
    "system": (row("what?"), "; a text is expected"),
    "question": (ASKED, "; a text is expected. Write it as text, or leave the row out"),
    "answer": (ASKED, "; a text is expected. Write it as text, or leave the row out"),
    "A": (ASKED, "the row has the options A; two or more from A on without a gap are expected"),
    "B": (ASKED | {"A": "x"}, "'B' is "),
    "hint": (ASKED, "only 'question' is asked, with its options. Write it in there"),
}


def deep(content, key, brackets, depth):
    """A file with a row of this content, whose key holds a value nested so deep."""
    value = (brackets[0] if brackets == "[]" else '{"a":') * depth + "1" + brackets[1] * depth
    return json.dumps([content | {key: "DEEP"}]).replace('"DEEP"', value)


@pytest.mark.parametrize("depth", [5, 100, 400, 900, 950])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
@pytest.mark.parametrize("key", NESTED)
def test_values_nested_deep_are_faults(tmp_path, key, brackets, depth):
    content, text = NESTED[key]
    with ThreadPoolExecutor(1) as pool:  # with a stack of its own, so that the depth is the same in every runner
        message = pool.submit(fault, tmp_path, deep(content, key, brackets, depth)).result()
    assert "1 fault." in message
    assert text in message
    assert len(message) < 1_000


@pytest.mark.parametrize("depth", [5, 100, 400, 900, 950])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_values_nested_deep_that_are_not_read_are_a_note(tmp_path, brackets, depth):
    with ThreadPoolExecutor(1) as pool:
        _, notes = pool.submit(read, tmp_path, deep(row("what?"), "other", brackets, depth)).result()
    assert notes == ["data.json: keys not read: other 1x"]


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_values_nested_deeper_than_json_is_read_are_a_fault(tmp_path, brackets):
    message = fault(tmp_path, deep(row("what?"), "other", brackets, 100_000))
    assert "not readable JSON (lists or objects nested too deep). Mend it." in message
