"""The formats of samples: files with exactly the schemas that people have, nasty rows included."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mars_jax.data.formats.base import Turn
from mars_jax.data.images import PictureBytes, image_size, load_rgb
from mars_jax.data.records import load_records
from mars_jax.data.rows import source_files
from mars_jax.errors import DataError
from tests.helpers.tiny_data import save_picture

LETTER = "Answer with the option's letter from the given choices directly."


def png(height: int, width: int, seed: int = 0) -> bytes:
    """An encoded picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, items: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, items)) if lines else json.dumps(items))
    return path


def write_parquet(path: Path, rows: list[dict], image: str = "image") -> Path:
    """A file as the `datasets` library writes it: pictures are structs of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    features = {name: {"_type": "Image"} if name == image else {"_type": "Value"} for name in table.column_names}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def science(number: int, image: bytes | None, **changes) -> dict:
    """A row of ScienceQA on the hub, which has no id."""
    return {
        "image": None if image is None else {"bytes": image, "path": f"{number}.png"},
        "question": "Which is a mineral?",
        "choices": ["granite", "quartz", "limestone"],
        "answer": 1,
        "hint": "",
        "task": "closed choice",
        "grade": "grade4",
        "subject": "natural science",
        "topic": "earth-science",
        "category": "Rocks",
        "skill": "Identify minerals",
        "lecture": "",
        "solution": "Quartz is.",
    } | changes


def test_messages_with_typed_parts_take_their_pictures_from_the_part_or_the_row(tmp_path):
    for number in range(3):
        save_picture(tmp_path / f"{number}.png", seed=number)
    uri = f"data:image/png;base64,{base64.b64encode(png(5, 7)).decode()}"
    items = [
        {
            "id": "typed",
            "messages": [
                {"role": "system", "content": "Be short."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image"},
                        {"type": "text", "text": "first, and "},
                        {"type": "image", "image": "1.png"},
                        {"type": "image_url", "image_url": {"url": uri}},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ],
            "images": ["0.png"],
        },
        {
            "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a"}],
            "images": ["2.png"],
        },
    ]
    typed, plain = load_records(write(tmp_path / "train.json", items))
    assert typed.turns == (
        Turn("system", "Be short."),
        Turn("user", "<image>first, and <image><image>", parts=("<image>", "first, and ", "<image>", "<image>")),
        Turn("assistant", "yes", parts=("yes",)),
    )
    assert typed.images[:2] == (tmp_path / "0.png", tmp_path / "1.png")
    assert image_size(typed.images[2]) == (5, 7)
    assert (plain.images, plain.turns[0].text, plain.format) == ((tmp_path / "2.png",), "<image>what?", "messages")


def test_sharegpt_has_images_and_a_system_text_beside_the_conversation(tmp_path):
    for number in range(2):
        save_picture(tmp_path / "images" / f"{number}.png", seed=number)
    item = {
        "conversations": [{"from": "human", "value": "<image><image>same?"}, {"from": "gpt", "value": "no"}],
        "images": ["0.png", "1.png"],
        "system": "Compare.",
    }
    (record,) = load_records(write(tmp_path / "train.jsonl", [item]), tmp_path / "images")
    assert [turn.role for turn in record.turns] == ["system", "user", "assistant"]
    assert len(set(record.digests)) == 2


def test_scienceqa_parquet_is_asked_by_letters(tmp_path):
    rows = [
        science(0, png(9, 11)),
        science(1, None, hint="Rocks are made of minerals.", choices=["a", "b"], answer=0),
        science(2, png(9, 11)),
    ]
    folder = write_parquet(tmp_path / "ScienceQA" / "data" / "train-00000-of-00001.parquet", rows).parents[1]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows[1:2])
    seen, hinted, again = load_records(folder.with_name("ScienceQA#train"))
    options = "A. granite\nB. quartz\nC. limestone"
    assert seen.turns[0].text == f"<image>\nWhich is a mineral?\n{options}\n{LETTER}"
    assert seen.turns[1].text == "B"
    assert hinted.turns[0].text == f"Context: Rocks are made of minerals.\nWhich is a mineral?\nA. a\nB. b\n{LETTER}"
    assert (hinted.images, hinted.turns[1].text, hinted.group) == ((), "A", "text:item-1")
    assert isinstance(seen.images[0], PictureBytes)
    assert load_rgb(seen.images[0]).size == (11, 9)
    assert seen.group == again.group  # the same bytes
    with pytest.raises(DataError, match=r"the split is not given. Write one of ScienceQA#test, ScienceQA#train"):
        load_records(folder)
    with pytest.raises(DataError, match=r"there is no split 'val'"):
        load_records(folder.with_name("ScienceQA#val"))
    assert source_files(folder.with_name("ScienceQA#test")) == [folder / "data" / "test-00000-of-00001.parquet"]


def test_the_original_folder_of_scienceqa(tmp_path):
    folder = tmp_path / "ScienceQA"
    problem = science(0, None) | {"split": "train", "image": "image.png"}
    problems = {
        "3": problem,
        "17": problem | {"image": None, "split": "val"},
        "5": problem | {"hint": None, "image": None},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["3", "5"], "val": ["17"], "trainval": ["3", "5", "17"]})
    save_picture(folder / "images" / "train" / "3" / "image.png", 12, 20)
    first, second = load_records(tmp_path / "ScienceQA#train")
    assert (first.id, second.id, first.source) == ("3", "5", "problems.json 3")
    assert (image_size(first.images[0]), second.images) == ((12, 20), ())
    (validation,) = load_records(tmp_path / "ScienceQA#val")
    assert validation.id == "17"
    write(folder / "pid_splits.json", {"train": ["3", "99"]})
    with pytest.raises(DataError, match=r"problems.json has no 99, which pid_splits.json lists"):
        load_records(tmp_path / "ScienceQA")


def test_files_of_scienceqa_that_hold_something_else_are_faults(tmp_path):
    write(tmp_path / "problems.json", {"3": "a text"})
    write(tmp_path / "pid_splits.json", {"train": ["3"], "val": "3"})
    with pytest.raises(DataError, match=r"problems.json 3 \(id 'item-0'\): the record is a JSON text"):
        load_records(tmp_path.with_name(f"{tmp_path.name}#train"))
    with pytest.raises(DataError, match=r"a split of pid_splits.json is '3'; a list of problems' numbers is expected"):
        load_records(tmp_path.with_name(f"{tmp_path.name}#val"))
    write(tmp_path / "pid_splits.json", ["3"])
    with pytest.raises(DataError, match=r"pid_splits.json: the file holds a JSON list; an object is expected"):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("The answer is B.", ("The answer is A.", "The answer is B.", "The answer is C.")),
        ("C", ("A", "B", "C")),
        ("LECTURE: States lie on maps.\nThe answer is B.", ()),
        ("The answer is D.", ()),
    ],
)
def test_scienceqa_as_llava_writes_it_lists_its_options(tmp_path, answer, options):
    save_picture(tmp_path / "1" / "image.png", 4, 4)
    question = "Which state is north?\nContext: N/A\nOptions: (A) Ohio (B) see (A) and (B) (C) Iowa\n<image>"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    path = write(tmp_path / "train.json", [{"id": "1", "image": "1/image.png", "conversations": turns}])
    (record,) = load_records(path, tmp_path)
    assert record.options == options
    assert record.format == ("llava_scienceqa" if options else "llava")
    assert record.turns[0].text == question


def test_mmstar_parquet(tmp_path):
    row = {
        "index": 7,
        "question": "What is it?\nOptions: A: a cat, B: a dog, C: a cow, D: a pig",
        "image": {"bytes": png(8, 8), "path": "7.png"},
        "answer": "C",
        "category": "coarse perception",
        "l2_category": "image scene",
        "meta_info": {"source": "MMBench"},
    }
    (record,) = load_records(write_parquet(tmp_path / "mmstar.parquet", [row]))
    assert (record.id, record.turns[1].text, record.format) == ("7", "C", "mmstar")
    assert record.turns[0].text == f"<image>\n{row['question']}\n{LETTER}"


@pytest.mark.parametrize(
    ("questions", "answers"),
    [("questions.jsonl", "answers_gpt4.jsonl"), ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl")],
)
def test_llava_bench_joins_questions_and_answers(tmp_path, questions, answers):
    save_picture(tmp_path / "images" / "001.jpg")
    asked = [{"question_id": n, "image": "001.jpg", "text": f"what {n}?", "category": "conv"} for n in range(2)]
    write(tmp_path / questions, asked)
    write(tmp_path / answers, [{"question_id": n, "text": f"that {n}", "category": "conv"} for n in (1, 0)])
    first, second = load_records(tmp_path)
    assert (first.turns, second.id) == ((Turn("user", "<image>\nwhat 0?"), Turn("assistant", "that 0")), "1")
    assert source_files(tmp_path) == [tmp_path / questions, tmp_path / answers]
    write(tmp_path / answers, [{"question_id": 0, "text": "that"}])
    with pytest.raises(DataError, match=rf"{questions}:2 \(id '1'\): {answers} has no answer to it"):
        load_records(tmp_path)


ASKED = {"role": "user", "content": "what?"}
ANSWERED = {"role": "assistant", "content": "that"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": "hello"}, "'messages' is 'hello'; a list of {'role', 'content'} turns is expected"),
        ({"messages": [ASKED, {"role": "tool", "content": "x"}]}, "turn 1 is from 'tool'; allowed: human, user"),
        (
            {"messages": [{"role": "user", "content": None}, ANSWERED]},
            "turn 0 is {'content': None, 'role': 'user'}; an obj",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, ANSWERED]},
            "turn 0, a part: 'video' is 'a.mp4': video is not read.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "an <image>"}]}, ANSWERED]},
            "turn 0: <image> in the text of a typed part",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWERED]},
            "more pictures in 'messages' than the 0 of 'images'",
        ),
        (
            {"messages": [ASKED, ANSWERED], "images": ["https://x.org/0.png"]},
            "'https://x.org/0.png' is an address. Download",
        ),
        ({"messages": [ASKED, ANSWERED], "images": ["data:image/png;base64,?"]}, "is no base64"),
        (
            {"messages": [ASKED, ANSWERED], "images": [{"bytes": None, "path": "../a.png"}]},
            "points outside the image folder",
        ),
        (
            {"messages": [{"role": "user", "content": "<image>"}, ANSWERED], "images": ["data:;base64,aGVsbG8="]},
            "image in the file cannot be decoded",
        ),
        (science(0, None, choices=["one"]), "'choices' is ['one']; a list of 2 to 26 texts is expected"),
        (science(0, None, answer=3), "'answer' is 3; the number of one of the 3 choices, from 0, is expected"),
        (science(0, None, answer=True), "'answer' is True; the number of one of the 3 choices"),
        (science(0, None, answer="E"), "'answer' is 'E', none of the 3 options; a letter A to C or the text of one of"),
    ],
)
def test_every_fault_of_a_row_is_named(tmp_path, row, text):
    save_picture(tmp_path / "0.png")
    with pytest.raises(DataError) as caught:
        load_records(write(tmp_path / "train.json", [{"id": "bad", **row}]))
    assert text in str(caught.value)
    assert "train.json item 0 (id 'bad')" in str(caught.value)


def test_folders_and_files_that_hold_no_samples(tmp_path):
    with pytest.raises(DataError, match="a folder with neither parquet files nor those of ScienceQA"):
        load_records(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_records(tmp_path)
    write(tmp_path / "train.json", [])
    with pytest.raises(DataError, match="is no folder, so it has no split 'train'"):
        load_records(tmp_path / "train.json#train")
