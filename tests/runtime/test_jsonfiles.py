"""JSON on disk: full floats, nulls for NaN, whole documents or none, torn lines."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mars_jax.errors import DataError
from mars_jax.runtime.jsonfiles import append_jsonl, read_json, read_jsonl, write_json


def test_documents_keep_order_and_digits_and_turn_nan_into_null(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json(
        path,
        {
            "z": 0.1 + 0.2,
            "a": float("nan"),
            "b": [np.float32(0.5), np.inf, np.arange(2)],
            "p": Path("/x"),
            "t": (True, None),
        },
    )
    assert list(json.loads(path.read_text())) == ["z", "a", "b", "p", "t"]
    assert read_json(path) == {"z": 0.1 + 0.2, "a": None, "b": [0.5, None, [0, 1]], "p": "/x", "t": [True, None]}


def test_a_failed_write_keeps_the_old_document_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_a_whole_document(tmp_path):
    path = tmp_path / "a.json"
    code = (
        "import itertools, sys; from pathlib import Path; from mars_jax.runtime.jsonfiles import write_json\n"
        "for n in itertools.count(): write_json(Path(sys.argv[1]), [n] * 200_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(5):
            numbers = read_json(path)
            assert len(numbers) == 200_000
            assert len(set(numbers)) == 1
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(set(read_json(path))) == 1


def test_a_broken_or_absent_document_is_a_data_error(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match=r"can't read .*a\.json: No such file"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"a\.json is not JSON: .* Delete it, and run the command that writes it again"):
        read_json(path)


def test_records_come_back_and_an_absent_file_has_none(tmp_path):
    path = tmp_path / "sub" / "a.jsonl"
    assert read_jsonl(path, pytest.fail) == []
    append_jsonl(path, {"a": 1, "b": float("inf")})
    append_jsonl(path, {"text": "two\nlines é"})
    assert read_jsonl(path, pytest.fail) == [{"a": 1, "b": None}, {"text": "two\nlines é"}]


@pytest.mark.parametrize("torn", ['{"a": 2, "text": "é', '{"a": 2', "{"])
def test_an_incomplete_last_line_is_left_out_with_a_warning_and_cut_off_by_the_next_record(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("é") else torn.encode())
    warnings: list[str] = []
    assert read_jsonl(path, warnings.append) == [{"a": 1}]
    assert warnings == [f"{path}, line 2: incomplete, as after a kill, and left out"]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path, pytest.fail) == [{"a": 1}, {"a": 3}]


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}')
    assert read_jsonl(path, pytest.fail) == [{"a": 1}]
    append_jsonl(path, {"a": 2})
    assert read_jsonl(path, pytest.fail) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"a": '])
def test_a_bad_line_inside_is_a_data_error(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not a JSON object: .* Delete the line"):
        read_jsonl(path, pytest.fail)
