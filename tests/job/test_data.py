"""The data of a job."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from mars_jax.cli import app
from mars_jax.config.load import load_config
from mars_jax.job.job import make_job
from mars_jax.runtime.progress import ConsoleReporter
from tests.helpers import tiny_job


def test_validation_pictures_were_decoded_again_for_every_group_of_lanes(tmp_path):
    train = tiny_job.records(tmp_path, 60)
    path = tiny_job.config(tmp_path / "a.yaml", tiny_job.checkpoint(tmp_path / "base"), train, tmp_path / "run")
    data = make_job(load_config(path), ConsoleReporter()).data
    first = data.validation_batches(4)
    for picture in (tmp_path / "images").iterdir():
        picture.unlink()
    second = data.validation_batches(4)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


def as_people_have_them(folder, number):
    """The records of a tiny job with a repeated id, a key that is not read, and an answer that is not trained on."""
    path = tiny_job.records(folder, number)
    rows = json.loads(path.read_text())
    for row in rows:
        row["data_source"] = "web"
    rows[1]["id"] = rows[0]["id"]
    rows[1]["conversations"][1]["loss"] = False
    path.write_text(json.dumps(rows))
    return path


def test_notes_on_data_are_warnings_in_data_json_and_in_mars_check(tmp_path):
    train = as_people_have_them(tmp_path, 60)
    path = tiny_job.config(tmp_path / "a.yaml", tiny_job.checkpoint(tmp_path / "base"), train, tmp_path / "run")
    notes = [
        "train.json: keys not read: data_source 60x",
        "train.json: 1 of 60 rows: an id that an earlier row has; the second row with an id ID is called ID#2, and so "
        "on (the first: 'train0')",
    ]
    result = CliRunner().invoke(app, ["check", str(path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["data"]["notes"] == notes
    for note in notes:
        assert result.stderr.count(f"warning: {note}\n") == 1
    shown = CliRunner().invoke(app, ["check", str(path)]).stdout
    assert "data.notes" in shown
    assert all(note in shown for note in notes)
    assert CliRunner().invoke(app, ["plan", str(path)]).exit_code == 0
    assert json.loads((tmp_path / "run" / "data.json").read_text())["notes"] == notes


def test_answers_end_with_a_token_at_which_no_engine_stops(tmp_path):
    base, train = tiny_job.checkpoint(tmp_path / "base"), tiny_job.records(tmp_path, 60)
    path = tiny_job.config(tmp_path / "a.yaml", base, train, tmp_path / "run")
    assert json.loads(CliRunner().invoke(app, ["check", str(path), "--json"]).stdout)["data"]["notes"] == []
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<pad>"}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert json.loads(CliRunner().invoke(app, ["check", str(path), "--json"]).stdout)["data"]["notes"] == [
        "the chat template ends answers with '<|im_end|>' (token 2), which neither generation_config.json nor the "
        "tokenizer names as an end: it is trained, and our evaluation stops there, but inference engines would go on. "
        "Add 2 to eos_token_id in the checkpoint's generation_config.json."
    ]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert json.loads(CliRunner().invoke(app, ["check", str(path), "--json"]).stdout)["data"]["notes"] == []


@pytest.mark.parametrize("learn", ["all", "last"])
def test_the_last_answers_alone_are_learned_where_the_config_asks_for_it(tmp_path, learn):
    train = tiny_job.records(tmp_path, 60)
    base = tiny_job.checkpoint(tmp_path / "base")
    path = tiny_job.config(tmp_path / "a.yaml", base, train, tmp_path / "run", data={"learn": learn})
    records = make_job(load_config(path), ConsoleReporter()).data.search.train
    excluded = [turn for record in records for turn in record.turns if turn.role == "assistant" and not turn.learn]
    assert bool(excluded) == (learn == "last")
    assert all(record.turns[-1].learn for record in records)
