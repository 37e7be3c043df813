"""Reading LLaVA files: what is accepted, and the text of every fault."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mars_jax.data.formats.base import Turn
from mars_jax.data.records import load_records
from mars_jax.errors import DataError
from tests.helpers.tiny_data import save_picture

HUMAN = {"from": "human", "value": "what?"}
LOOK = {"from": "human", "value": "<image>\nwhat?"}
GPT = {"from": "gpt", "value": "a square"}


def write(folder: Path, items: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(items) if name.endswith(".json") else "\n".join(json.dumps(item) for item in items))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    save_picture(tmp_path / "pictures/a.png", seed=1)
    save_picture(tmp_path / "pictures/sub/b.jpg", seed=2)
    return tmp_path / "pictures"


def test_reads_pictures_text_speakers_and_default_ids(tmp_path: Path, pictures: Path) -> None:
    items = [
        {"id": 7, "image": "a.png", "conversations": [LOOK, GPT]},
        {"image": ["sub/b.jpg"], "conversations": [{"from": "system", "value": "Be short."}, LOOK, GPT, HUMAN, GPT]},
        {
            "id": "t",
            "conversations": [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": "2 \u00e9\u4e2d"}],
        },
    ]
    first, second, text = load_records(write(tmp_path, items), pictures)
    assert (first.id, first.images, first.source) == ("7", (pictures / "a.png",), "data.json item 0")
    assert first.turns == (Turn("user", "<image>\nwhat?"), Turn("assistant", "a square"))
    assert second.id == "item-1"
    assert [turn.role for turn in second.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert (text.images, text.group, text.turns[1].text) == ((), "text:t", "2 é中")


def test_json_lines_name_the_line_and_keep_unusual_line_ends_in_strings(tmp_path: Path, pictures: Path) -> None:
    path = tmp_path / "data.jsonl"
    odd = json.dumps({"conversations": [{"from": "user", "value": "a\u2028b"}, GPT]}, ensure_ascii=False)
    path.write_text("\n" + odd + "\n", encoding="utf-8")
    (record,) = load_records(path, pictures)
    assert record.source == "data.jsonl:2"
    assert record.turns[0].text == "a\u2028b"


def test_copies_of_a_picture_are_one_group(tmp_path: Path, pictures: Path) -> None:
    (pictures / "copy.png").write_bytes((pictures / "a.png").read_bytes())
    items = [{"image": name, "conversations": [LOOK, GPT]} for name in ("a.png", "copy.png", "sub/b.jpg")]
    a, copy, b = load_records(write(tmp_path, items), pictures)
    assert a.group == copy.group != b.group


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("words", "the record is a JSON text; an object with 'conversations' is expected"),
        ({"id": "x"}, "the row has no conversation: 'conversations', 'messages', or 'question' and 'answer' are"),
        ({"conversations": []}, "'conversations' is []; a list of"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "turn 1 is {'from': 'gpt'}; an object with the strings"),
        (
            {"conversations": [HUMAN, {"from": "bot", "value": "a"}]},
            "from 'bot'; allowed: human, user, gpt, assistant, s",
        ),
        ({"conversations": [GPT, HUMAN]}, "starts with 'assistant'; after an optional system turn the user must start"),
        (
            {"conversations": [HUMAN, HUMAN, GPT]},
            "the speakers are user, user, assistant; user and assistant must alter",
        ),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "the last user turn has no answer. Add it, or remove the turn"),
        ({"conversations": [HUMAN]}, "no assistant turn, so nothing to learn. Add the answer"),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]},
            "turn 1: the answer is empty. Write it, or remove",
        ),
        ({"conversations": [LOOK, GPT]}, "1 <image> in the user turns but 0 images. Write <image> once"),
        (
            {"image": "a.png", "conversations": [LOOK, {"from": "gpt", "value": "an <image>"}]},
            "turn 1: <image> in a turn of the assistant; only user turns may hold it",
        ),
        (
            {"image": ["a.png", "sub/b.jpg"], "conversations": [LOOK, GPT]},
            "1 <image> in the user turns but 2 images. Write <image> once",
        ),
        ({"image": "/etc/a.png", "conversations": [LOOK, GPT]}, "image '/etc/a.png' points outside the image folder"),
        ({"image": "C:\\a.png", "conversations": [LOOK, GPT]}, "points outside the image folder"),
        (
            {"image": "sub/../../a.png", "conversations": [LOOK, GPT]},
            "points outside the image folder",
        ),
        (
            {"image": 3, "conversations": [LOOK, GPT]},
            "image is 3 (number); a path relative to the image folder is expected",
        ),
        ({"image": "none.png", "conversations": [LOOK, GPT]}, "image 'none.png' does not exist in"),
        ({"image": "broken.png", "conversations": [LOOK, GPT]}, "image 'broken.png' cannot be decoded"),
        ({"image": "cut.jpg", "conversations": [LOOK, GPT]}, "image 'cut.jpg' cannot be decoded"),
        ({"image": "float.tiff", "conversations": [LOOK, GPT]}, "floating-point pixels, which have no defined range"),
    ],
)
def test_every_fault_is_named_with_item_and_id(tmp_path: Path, pictures: Path, item: object, text: str) -> None:
    (pictures / "broken.png").write_bytes(b"not a picture")
    (pictures / "cut.jpg").write_bytes((pictures / "sub/b.jpg").read_bytes()[:-400])
    Image.new("F", (4, 4)).save(pictures / "float.tiff")
    good = {"id": "good", "conversations": [HUMAN, GPT]}
    with pytest.raises(DataError) as caught:
        load_records(write(tmp_path, [good, item]), pictures)
    message = str(caught.value)
    assert text in message
    assert "data.json item 1 (id " in message
    assert "item 0" not in message


def test_all_faults_of_a_jsonl_file_are_listed_with_lines(tmp_path: Path, pictures: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"conversations": [}\n' + json.dumps({"id": "b", "conversations": [HUMAN]}) + "\n")
    with pytest.raises(DataError, match="2 faults") as caught:
        load_records(path, pictures)
    assert "data.jsonl:1: not valid JSON at column 20" in str(caught.value)
    assert "data.jsonl:2 (id 'b'): no assistant turn" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'[{"id": 1,\n oops', "data.json:2: not valid JSON at column 2"),
        (b'{\n"id": 1}\n{\n"id": 2}', "Write one object on each line (JSON lines), or a list of them"),
        (b'{"id": 1}', "the file holds a JSON object; a list of records is expected"),
        (b"[]", "no records in the file"),
        (b'["\xff"]', "byte 2 is not UTF-8"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_records(path, tmp_path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file. Check the path"):
        load_records(tmp_path / "absent.json", tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_records(tmp_path, tmp_path)


def test_records_that_share_a_picture_through_others_are_one_group(tmp_path: Path, pictures: Path) -> None:
    images = [["a.png", "sub/b.jpg"], ["sub/b.jpg", "grey.png"], ["grey.png"], ["other.png"]]
    for number, name in enumerate(("grey.png", "other.png")):
        save_picture(pictures / name, seed=7 + number)
    items = [
        {"id": str(i), "image": names, "conversations": [{"from": "human", "value": "<image>" * len(names)}, GPT]}
        for i, names in enumerate(images)
    ]
    path = tmp_path / "several.json"
    path.write_text(json.dumps(items))
    *tied, alone = load_records(path, pictures)
    assert len({record.group for record in tied}) == 1
    assert alone.group not in {record.group for record in tied}
    assert tied[0].group == f"image:{min(digest for record in tied for digest in record.digests)}"
    assert [len(record.digests) for record in (*tied, alone)] == [2, 2, 1, 1]
