"""JSON files as people have them: recognised by their content, and refused with the cause and the way out."""

import json

import pytest

from mars_jax.data.files.json_text import read_samples
from mars_jax.data.files.row import MAX_ROWS
from mars_jax.errors import DataError
from tests.helpers.rows import fault, read

ROW = {"id": "1", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]}
TWO = [ROW, {**ROW, "id": "2"}]
LINES = "\n".join(map(json.dumps, TWO))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.JSONL", "d.txt"])
@pytest.mark.parametrize(
    ("content", "note"),
    [
        (json.dumps(TWO), ""),
        (json.dumps(TWO, indent=1), ""),
        ("\ufeff" + json.dumps(TWO, indent=1).replace("\n", "\r\n"), ""),
        (LINES, ""),
        (LINES.replace("\n", "\r\n") + "\r\n", ""),
        (LINES.replace("\n", ",\n") + ",\n", "2 lines end in a comma, which is not read"),
        (json.dumps({"data": TWO}), ""),
        (json.dumps({"version": 1, "annotations": TWO}), "rows are those of 'annotations'; not read: ['version']"),
    ],
)
def test_files_were_read_by_their_names_and_not_by_what_they_hold(tmp_path, name, content, note):
    records, notes = read(tmp_path, content, name)
    assert [record.id for record in records] == ["1", "2"]
    assert notes == ([f"{name}: {note}"] if note else [])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_of_one_record_is_that_record(tmp_path, indent):
    for name in ("d.json", "d.jsonl"):
        (record,), _ = read(tmp_path, json.dumps(ROW, indent=indent), name)
        assert record.id == "1"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (json.dumps({"1": ROW, "2": ROW}), "It has an object for each key. Write a list of them, each with its key"),
        (json.dumps({"train": TWO, "test": TWO}), "It has the lists ['train', 'test']. Write the rows of one of"),
        (json.dumps({"question": ["a"], "answer": ["b"]}), "It has the lists ['question', 'answer']"),
        (json.dumps({"questions": TWO}), "It has the lists ['questions']. Write the rows of one of them to a file"),
        ('"a text"', "the file holds a JSON text; a list of records is expected"),
        ("3", "the file holds a JSON number; a list of records is expected"),
        (f"[{json.dumps(ROW)},]", "not valid JSON at column"),
        (json.dumps(ROW, indent=1) + "\n" + json.dumps(ROW, indent=1), "Write one object on each line (JSON lines)"),
        ("", "no records in the file"),
        (" \n", "no records in the file"),
        (json.dumps(TWO).encode("utf-16"), "byte 0 is not UTF-8: the file is UTF-16. Save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "the file is compressed by gzip. Unpack it"),
        (b"PK\x03\x04", "the file is a zip file (a spreadsheet, or an archive)"),
        (b"PAR1", "the file is a parquet file. Name it .parquet"),
        (b"\x80\x04\x95", "the file is a pickle, which is never opened"),
        (b"[\"\xe4\"]", "byte 2 is not UTF-8. Save the file as UTF-8"),
        ("[" * 100_000 + "]" * 100_000, "not readable JSON (lists or objects nested too deep)"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not readable JSON (lists or objects nested too deep)"),
        ('[{"question": "a?", "answer": "x", "answer": "y"}]', "an object has the key 'answer' twice. Mend it."),
        (f'[{{"id": {"1" * 5_000}}}]', "not readable JSON (a number with thousands of digits)"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_cause_and_the_way_out_in_one_message(tmp_path, content, text):
    message = fault(tmp_path, content)
    assert text in message
    assert str(tmp_path / "data.json") in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[" * 100_000, "d.jsonl:2: not readable JSON (lists or objects nested too deep). Mend or remove the line"),
        ('{"id": %s}' % ("1" * 5_000), "d.jsonl:2: not readable JSON (a number with thousands of digits)"),
        ('{"id": 1, "id": 2}', "d.jsonl:2: an object has the key 'id' twice. Mend or remove the line"),
        ('{"id": 1', "d.jsonl:2: not valid JSON at column 9"),
    ],
)
def test_a_line_of_hostile_json_is_a_fault_of_that_line(tmp_path, line, text):
    message = fault(tmp_path, f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}", "d.jsonl")
    assert "1 fault." in message
    assert text in message


@pytest.mark.parametrize("content", ["{", '{"conversations"', '{\n"conversations": [', "[\n{"])
def test_a_broken_pretty_printed_file_named_jsonl_was_a_fault_a_line(tmp_path, content):
    assert "not valid JSON at column" in fault(tmp_path, content + "\n" * 30, "d.jsonl")


def test_the_number_of_rows_has_a_limit(tmp_path):
    (tmp_path / "d.jsonl").write_text("1\n" * (MAX_ROWS + 1))
    with pytest.raises(DataError, match=r"d.jsonl: more than 2,000,000 rows. Give fewer: take a sample"):
        read_samples(tmp_path / "d.jsonl")
