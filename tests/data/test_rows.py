"""Folders of samples, what is not a regular file, and paths that no file can have."""

import json
import os
import socket

import pyarrow
import pytest
from pyarrow import parquet

from mars_jax.data.records import load_records
from mars_jax.data.rows import read_rows, source_files
from mars_jax.errors import DataError
from tests.helpers.rows import arrow, table
from tests.helpers.tiny_data import save_picture


def saved(folder, numbers):
    """A folder as `datasets.Dataset.save_to_disk` writes it, in two files."""
    picture = save_picture(folder.parent / "picture.png").read_bytes()
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for name, part in zip(names, (numbers[:1], numbers[1:]), strict=True):
        arrow(folder / name, table(picture, part))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_data_set_saved_by_datasets_was_refused_as_one_without_samples(tmp_path):
    folder = saved(tmp_path / "set", (5, 6, 7))
    records = load_records(folder)
    assert [(record.id, record.format, len(record.images)) for record in records] == [
        (name, "vqa", 1) for name in ("5", "6", "7")
    ]
    assert [file.name for file in source_files(folder)] == [
        "state.json", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"is a saved data set without splits. Leave out `#train`"):
        load_records(tmp_path / "set#train")


def test_the_splits_of_a_data_set_saved_by_datasets(tmp_path):
    saved(tmp_path / "set" / "train", (5, 6)), saved(tmp_path / "set" / "test", (7, 8))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [record.id for record in load_records(tmp_path / "set#test")] == ["7", "8"]
    assert len(source_files(tmp_path / "set#test")) == 4
    with pytest.raises(DataError, match=r"the split is not given\. Write one of set#test, set#train\."):
        load_records(tmp_path / "set")
    with pytest.raises(DataError, match=r"no such file"):
        load_records(tmp_path / "set#../set/test")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, r"state.json: '_data_files' is None; a list of files is expected\. Save it again"),
        ({"_data_files": []}, r"'_data_files' is \[\]; a list of files is expected\. Save it again"),
        (
            {"_data_files": [{"filename": "../x.arrow"}]},
            r"'_data_files' is \[.*x.arrow'.*\]; a list of files is expected",
        ),
        ({"_data_files": [3]}, r"'_data_files' is \[3\]; a list of files is expected\. Save it again"),
        (
            {"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_indices_data_files": [{"filename": "i"}]},
            r"state.json: the data set was saved with an order or a choice of its own \('_indices_data_files'\), which "
            r"is not read\. Save it again with a newer version of datasets, which writes the rows themselves\.",
        ),
        ([], r"state.json: the file holds a JSON list; an object is expected\. Fetch the file again\.$"),
    ],
)
def test_a_saved_data_set_with_a_broken_list_of_files_is_refused(tmp_path, state, text):
    (tmp_path / "state.json").write_text(json.dumps(state))
    for reads in (load_records, source_files):
        with pytest.raises(DataError, match=text):
            reads(tmp_path)


def bench(folder, questions="questions.jsonl", answers="answers_gpt4.jsonl"):
    """A folder as LLaVA-Bench has it, with one question and a file that is no part of it."""
    save_picture(folder / "images" / "a.png")
    (folder / questions).write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "what?"}))
    (folder / answers).write_text(json.dumps({"question_id": 1, "text": "a cat"}))
    return folder


@pytest.mark.parametrize("other", ["saved", "parquet", "coco"])
def test_the_files_noted_as_the_source_of_a_folder_were_not_those_that_are_read(tmp_path, other):
    folder = bench(tmp_path / "set")
    if other == "saved":
        saved(folder, (5, 6))
    elif other == "parquet":
        parquet.write_table(pyarrow.table({"id": [1]}), folder / "train-0.parquet")
    else:
        bench(folder, "qa90_questions.jsonl", "qa90_gpt4_answer.jsonl")
    assert [record.turns[1].text for record in load_records(folder)] == ["a cat"]
    assert source_files(folder) == [folder / "questions.jsonl", folder / "answers_gpt4.jsonl"]


def test_a_split_of_llava_bench_was_read_as_the_whole(tmp_path):
    bench(tmp_path / "set")
    with pytest.raises(DataError, match=r"set: is LLaVA-Bench, which has no splits\. Leave out `#train`\."):
        load_records(tmp_path / "set#train")


def test_a_question_of_llava_bench_that_is_no_text_is_a_fault_of_one_file(tmp_path):
    (bench(tmp_path) / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": "a.png", "text": 3}))
    with pytest.raises(DataError, match=r"questions.jsonl:1 \(id '1'\): 'text' is no text\. Fetch the file again\."):
        load_records(tmp_path)


def test_a_folder_above_the_samples_names_those_below_it(tmp_path):
    (tmp_path / "ScienceQA-IMG").mkdir()
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "ScienceQA-IMG" / "train-0.parquet")
    with pytest.raises(DataError, match=r"folders that may have some. Give one of ScienceQA-IMG\."):
        load_records(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "test.csv").write_text("")
    with pytest.raises(DataError, match=r"a folder whose samples are in files. Give one of test.csv, train.json\."):
        load_records(tmp_path)


@pytest.fixture
def special(tmp_path):
    """Files that are none: a named pipe, a socket, and a link to a device."""
    os.mkfifo(tmp_path / "pipe.json")
    listening = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # names of sockets are short
    listening.bind("socket.json")
    os.chdir(here)
    (tmp_path / "device.json").symlink_to("/dev/zero")
    yield tmp_path
    listening.close()


@pytest.mark.parametrize(
    ("name", "kind"), [("pipe.json", "a named pipe"), ("socket.json", "a socket"), ("device.json", "a device")]
)
def test_data_that_is_no_regular_file_hung_for_ever(special, name, kind):
    for reads in (load_records, source_files):
        with pytest.raises(DataError, match=f"{name}: is {kind}, not a file. Give the file with the samples"):
            reads(special / name)
    (special / "train.json").write_text(
        json.dumps([{"image": name, "question": "what?", "answer": "x"}, {"question": "what?", "answer": "x"}])
    )
    with pytest.raises(DataError, match=f"image '{name}' is {kind}, not a file. Give the picture's file"):
        load_records(special / "train.json")


@pytest.mark.parametrize(
    ("name", "text"), [("x" * 10_000 + ".json", "File name too long"), ("a\0b.json", "embedded null byte")]
)
def test_paths_that_no_file_can_have_ended_in_tracebacks(tmp_path, name, text):
    for reads in (read_rows, source_files):
        with pytest.raises(DataError, match=rf"cannot be read \({text}\)\. Check the path") as caught:
            reads(tmp_path / name)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["~nosuchuser/a.json", "a/b/c", "d.json/e.json"])
def test_paths_of_no_file_are_faults_of_reading_alone(tmp_path, name):
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(DataError, match=r"no such file\. Check the path in the configuration"):
        read_rows(tmp_path / name)
    assert source_files(tmp_path / name) == []


def test_a_name_of_the_hub_without_its_scheme_is_hinted_at(tmp_path):
    with pytest.raises(DataError, match=r"A data set on the hub is written hf://datasets/OWNER/NAME"):
        read_rows(tmp_path / "lmms-lab" / "ScienceQA")
