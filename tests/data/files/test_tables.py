"""CSV, TSV, parquet and Arrow files, and what is refused of them."""

import base64

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mars_jax.data.images import PictureBytes
from tests.helpers.rows import arrow, fault, read, table
from tests.helpers.tiny_data import save_picture

CHAT = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]


def test_csv_and_tsv_were_refused_as_broken_json(tmp_path):
    content = 'id,image,question,answer,note\n7,a.png,"what, and\nwhere?",a cat,\n8,,why?,so,\n'
    records, notes = read(tmp_path, content, "d.csv")
    assert [(record.id, record.turns[0].text, record.turns[1].text) for record in records] == [
        ("7", "<image>\nwhat, and\nwhere?", "a cat"),
        ("8", "why?", "so"),
    ]
    assert (records[0].source, notes) == ("d.csv:3", [])
    again, _ = read(tmp_path, content.replace('"what, and\nwhere?"', "what?").replace(",", "\t"), "d.TSV")
    assert [record.id for record in again] == ["7", "8"]


def test_pictures_in_tables_of_vlmevalkit_are_base64_or_another_row_s(tmp_path):
    picture = base64.b64encode(save_picture(tmp_path / "a.png", 300, 300).read_bytes()).decode()
    assert len(picture) > 131_072  # Python's own limit of a cell
    rows = f"index\tquestion\tA\tB\tanswer\timage\n10\twhat?\tx\ty\tA\t{picture}\n11\twhy?\tx\ty\tB\t10\n"
    records, _ = read(tmp_path, rows, "MMBench.tsv")
    assert [(record.id, record.format) for record in records] == [("10", "mmbench"), ("11", "mmbench")]
    assert records[0].images == records[1].images
    assert isinstance(records[0].images[0], PictureBytes)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("id,question,answer\n1,what?\n", "d.csv:2: 2 cells, but the first line names 3. Mend the line"),
        (
            "id;image;question;answer\n7;a.png;what, or who?;a cat\n",
            "the first line is 'id;image;question;answer', a single name: it has ';' and no ','. A .csv file is read "
            "with commas, a .tsv file with tabs. Save it so.",
        ),
        ('"id";"question"\n7;"what?"\n', "a single name: it has ';' and no ','"),
        ("sep=;\nid;question\n7;what?\n", "the first line is 'sep=;', a single name: it has ';' and no ','"),
        ("id\tquestion\n7\twhat?\n", "a single name: it has tabs and no ','"),
        ("id|question\n7|what?\n", "a single name: it has '|' and no ','"),
        (
            '"id,question,answer"\n"7,what?,a cat"\n',
            "the first line is 'id,question,answer', a single name: its quotes stand around the whole line. Write them "
            "around single cells, or leave them out.",
        ),
        ("id,id\n1,2\n", "the first line has 'id' twice"),
        ("id,question,answer\n", "no records in the file"),
        ("", "no records in the file"),
        ("id,question,answer\n1,what?,\n", "d.csv:2 (id '1'): 'answer' is None (null); a text is expected"),
        ("id,image,question,answer\n1,iVBORw0KGgo=,what?,x\n", "d.csv:2 (id '1'): image in the file cannot be decoded"),
        ("id,conversations\n1,[]\n", "'conversations' is '[]'; a list of {'from', 'value'} turns is expected"),
    ],
)
def test_faults_of_a_table_name_the_line(tmp_path, content, text):
    assert text in fault(tmp_path, content, "d.csv")


def test_a_table_with_commas_that_is_named_tsv_is_refused_with_the_cause(tmp_path):
    assert "a single name: it has ',' and no tabs" in fault(tmp_path, "id,question\n7,what?\n", "d.tsv")


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_are_read(tmp_path, stream):
    from mars_jax.data.records import load_records

    picture = save_picture(tmp_path / "a.png").read_bytes()
    first, second = load_records(arrow(tmp_path / "d.arrow", table(picture), stream))
    assert (first.id, second.turns[0].text, first.images) == ("0", "<image>\n1?", (PictureBytes(picture),))
    assert second.source == "d.arrow item 1"


@pytest.mark.parametrize("name", ["d.arrow", "d.parquet"])
@pytest.mark.parametrize("content", [b"", b"PAR1 no", b"ARROW1", b"\xff\xff\xff\xff\x10\x00\x00\x00"])
def test_broken_tables_are_refused(tmp_path, name, content):
    assert "cannot be read as" in fault(tmp_path, content, name)


def test_a_parquet_file_that_grows_without_bound_is_refused_before_memory_is_out(tmp_path):
    text = "x" * 50_000
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(200_000, np.int32), [text])
    parquet.write_table(pyarrow.table({"question": column, "answer": column}), tmp_path / "d.parquet")
    size = (tmp_path / "d.parquet").stat().st_size
    assert size < 100_000  # for 20 GB
    message = fault(tmp_path, (tmp_path / "d.parquet").read_bytes(), "d.parquet")
    assert f"its {size:,} bytes hold more than 1,073,741,824 in memory. Give the pictures as files" in message


def test_a_parquet_file_of_empty_rows_without_end_is_refused(tmp_path):
    nothing = pyarrow.table({"id": pyarrow.nulls(3_000_000)})
    parquet.write_table(nothing, tmp_path / "d.parquet")
    assert "more than 2,000,000 rows" in fault(tmp_path, (tmp_path / "d.parquet").read_bytes(), "d.parquet")


def test_rows_of_parquet_have_null_keys_of_other_rows(tmp_path):
    rows = [
        {"conversations": CHAT, "question": None, "answer": None, "videos": None, "tools": []},
        {"conversations": None, "question": "what?", "answer": "x", "videos": None, "tools": []},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    records, notes = read(tmp_path, (tmp_path / "d.parquet").read_bytes(), "d.parquet")
    assert [record.format for record in records] == ["llava", "vqa"]
    assert notes == [
        "d.parquet: rows of different formats: llava 1x, vqa 1x; their answers are scored by the exact text"
    ]
