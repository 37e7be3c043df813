"""Files on the disk: whole or not at all, synced before they take their names, known by their content."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.compat.power import MODELS, cut
from mars_jax.runtime.durable import content_of, filling, replacing

PREFIX = "from pathlib import Path; import sys; from benchmarks.compat.power import record; "
WRITE = """
folder = Path(sys.argv[1]); record(folder, Path(sys.argv[2]))
import os
from mars_jax.runtime.durable import filling, replacing
from mars_jax.runtime.jsonfiles import append_jsonl, write_json
write_json(folder / "new" / "a.json", [1])
write_json(folder / "a.json", [2])
with filling(folder / "filled") as temporary:
    (temporary / "x").write_text("x")
(folder / "unsynced").write_text("lost")
append_jsonl(folder / "lines.jsonl", {"n": 2})
os.kill(os.getpid(), 9)
"""


def after_a_cut(folder: Path, model: str) -> dict[str, str]:
    journal = folder.with_suffix(".syncs")
    subprocess.run([sys.executable, "-c", PREFIX + WRITE, folder, journal], cwd=Path(__file__).parents[2])
    cut(folder, journal, model)
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_power_cut_took_files_that_had_been_written(tmp_path, model):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_text("[1]\n")
    (folder / "lines.jsonl").write_text('{"n": 1}\n')
    left = after_a_cut(folder, model)
    # The next opening of a run directory removes these.
    left = {name: text for name, text in left.items() if ".tmp/" not in name}
    # The cut is a true one: what nobody synced is empty or gone, and a line that was added is lost.
    assert left.pop("unsynced", "") == ""
    assert left == {
        "a.json": "[\n  2\n]\n",
        "filled/x": "x",
        "lines.jsonl": '{"n": 1}\n',
        "new/a.json": "[\n  1\n]\n",
    }


def fail(at: Path) -> None:
    at.write_text("a part")
    raise OSError(28, "No space left on device", str(at))


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(OSError, match="No space") as error, replacing(path) as temporary:
        fail(temporary)
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match="No space") as error, filling(path) as temporary:
        fail(temporary / "x")
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_files_beside_those_that_are_replaced_stay(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    (folder / "x").write_text("old")
    with filling(folder) as temporary:
        (temporary / "x").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"notes": "mine", "x": "new"}
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 10**5)
    content = content_of(path)
    assert (content.sha256, content.bytes) == (hashlib.sha256(b"abc" * 10**5).hexdigest(), 3 * 10**5)


def test_a_file_was_read_for_its_checksum_again_and_again(tmp_path, monkeypatch):
    path = tmp_path / "tensors"
    path.write_bytes(b"one")
    reads = []
    file_digest, now = hashlib.file_digest, time.time_ns()

    def counted(file, name):
        reads.append(file.name)
        return file_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    # A change within the same tick of the file system's clock could pass unnoticed, so not at once.
    assert [content_of(path), content_of(path)] == [content_of(path)] * 2
    assert len(reads) == 3
    monkeypatch.setattr(time, "time_ns", lambda: now + 10 * 10**9)
    assert [content_of(path), content_of(path)] == [content_of(path)] * 2
    assert len(reads) == 4
    path.write_bytes(b"two")
    assert content_of(path).sha256 == hashlib.sha256(b"two").hexdigest()
    assert len(reads) == 5
