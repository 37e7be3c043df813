"""The run directory: who may write, with which config, and the books of the phases."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mars_jax.config.load import load_config
from mars_jax.errors import ConfigError
from mars_jax.job import files
from mars_jax.job.book import hash_inputs
from mars_jax.job.directory import RunDirectory
from mars_jax.job.lock import Holder, holder
from mars_jax.job.status import run_status
from mars_jax.runtime.jsonfiles import append_jsonl, read_jsonl, write_json
from tests.helpers.lane_record import LANE


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{checkpoint: base}}\ndata: {{train: t.json}}\n")
    return path


@pytest.fixture
def config(config_file):
    return load_config(config_file)


def run_and_hold(config_file: Path) -> subprocess.Popen[str]:
    """Another process that holds the run directory, in the middle of a phase."""
    code = (
        "import sys, time; from mars_jax.config.load import load_config\n"
        "from mars_jax.job.directory import RunDirectory\n"
        "with RunDirectory.open(load_config(sys.argv[1])) as run, run.book.phase('probe', {'data': 'h'}):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(config_file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_opening_writes_the_config_the_versions_and_an_event(config):
    with RunDirectory.open(config) as run:
        assert load_config(run.path) == config
        assert {"python", "mars_jax", "jax", "flax", "optax", "transformers"} == set(run.book.state()["versions"])
        assert holder(run.path) == Holder(os.getpid())
    assert holder(run.path) is None
    assert [event["event"] for event in read_jsonl((run / files.EVENTS), pytest.fail)] == ["opened"]


def test_a_phase_is_noted_with_its_inputs_and_outputs(config):
    with RunDirectory.open(config) as run:
        assert run.book.phases() == {}
        with run.book.phase("probe", {"data": "h1"}, [files.LANES, files.CURVES]):
            assert run.book.phases()["probe"]["status"] == "running"
            append_jsonl(run / files.LANES, LANE)
        record = run.book.phases()["probe"]
        assert (record["status"], record["inputs"]) == ("done", {"data": "h1"})
        assert [*record["outputs"]] == ["probes/lanes.jsonl"]
    record = run.book.state()["phases"]["probe"]
    assert record["seconds"] >= 0
    assert record["started"] <= record["finished"]
    assert run.book.state()["peak_memory_bytes"] > 10 * 2**20


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("odd"), "failed")])
def test_a_broken_phase_is_recorded_and_its_seconds_are_kept(config, error, status):
    with RunDirectory.open(config) as run:
        with pytest.raises(type(error)), run.book.phase("probe", {"data": "h"}):
            raise error
        record = run.book.state()["phases"]["probe"]
        assert record["status"] == status
        assert record.get("error") == ("ValueError: odd" if status == "failed" else None)
        write_json((run / files.STATE), {**run.book.state(), "phases": {"probe": {**record, "seconds": 100.0}}})
        with run.book.phase("probe", {"data": "h"}):
            pass
        assert 100 <= run.book.state()["phases"]["probe"]["seconds"] < 110
        assert "error" not in run.book.state()["phases"]["probe"]
        with run.book.phase("probe", {"data": "h"}):
            pass
        assert run.book.state()["phases"]["probe"]["seconds"] < 10
    events = [event.get("status") for event in read_jsonl((run / files.EVENTS), pytest.fail)]
    assert events == [None, "running", status, "running", "done", "running", "done"]


def test_another_config_is_refused_with_the_difference(config_file, config):
    with RunDirectory.open(config):
        pass
    other = load_config(config_file, ["probe.batch_size=64", "lora.modules={llm: {ranks: [8]}}"])
    with pytest.raises(ConfigError) as error, RunDirectory.open(other):
        pass
    lines = str(error.value).splitlines()
    assert lines[0] == f"run directory {config.run_dir} was made with another config (there -> here):"
    assert "  probe.batch_size: 16 -> 64" in lines
    assert "  lora.modules.llm.ranks: [4, 8, 16, 32, 64] -> [8]" in lines
    assert "  lora.modules.projector.ranks: [16] -> (absent)" in lines
    assert lines[-1] == f"Set another run_dir, take the settings back, or delete {config.run_dir} to start again."
    assert load_config(config.run_dir) == config


def test_a_moved_run_directory_opens(config, tmp_path):
    with RunDirectory.open(config) as run, run.book.phase("probe", {"data": "h"}):
        pass
    moved = run.path.rename(tmp_path / "moved")
    with RunDirectory.open(load_config(moved)) as run:
        assert run.path == moved
        assert run.book.phases()["probe"]["status"] == "done"


def test_a_folder_that_is_no_run_is_left_alone(config):
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds files but no config\.resolved\.yaml, so it isn't a run directory"):
        RunDirectory.open(config).__enter__()
    assert [entry.name for entry in config.run_dir.iterdir()] == ["thesis.tex"]


def test_what_a_killed_first_opening_leaves_is_taken_over(config):
    config.run_dir.mkdir()
    (config.run_dir / "lock").write_text("1")
    (config.run_dir / "config.resolved.yaml.1.tmp").write_text("run_d")
    with RunDirectory.open(config) as run:
        assert load_config(run.path) == config


def test_a_run_directory_that_cannot_be_made_is_refused(config):
    config.run_dir.touch()
    with pytest.raises(ConfigError, match=r"can't write the run directory .*run: File exists\. Set run_dir"):
        RunDirectory.open(config).__enter__()


def test_one_process_at_a_time_and_a_killed_one_leaves_an_interrupted_phase(config_file, config):
    process = run_and_hold(config_file)
    try:
        run = RunDirectory(config.run_dir)
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid}\. Wait for it, stop it, or"):
            RunDirectory.open(config).__enter__()
        status = run_status(run, pytest.fail)
        assert status["process"] == process.pid
        assert status["phases"]["probe"]["status"] == "running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    status = run_status(run, pytest.fail)
    assert status["process"] is None
    assert status["phases"]["probe"]["status"] == "interrupted"
    with RunDirectory.open(config), run.book.phase("probe", {"data": "h"}):
        pass
    assert run.book.phases()["probe"]["status"] == "done"


def test_status_counts_lanes(config):
    with RunDirectory.open(config) as run:
        assert run_status(run, pytest.fail)["lanes_planned"] is None
        write_json((run / files.PLAN), {"lanes": 3})
        append_jsonl((run / files.LANES), LANE)
        for number in range(9):
            run.book.append_event("look", number=number)
    status = run_status(run, pytest.fail)
    assert (status["lanes_done"], status["lanes_planned"]) == (1, 3)
    assert [event["number"] for event in status["last_events"]] == [4, 5, 6, 7, 8]


def test_status_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no run in .* Start one with `mars run CONFIG`"):
        run_status(RunDirectory(tmp_path), pytest.fail)


def test_every_place_is_inside_and_has_its_own_name(tmp_path):
    run = RunDirectory(tmp_path)
    places = [run / file for file in files.EVERY]
    places.append(run / files.probe_adapters("vision8-llm2-D256-s0"))
    assert len({*places}) == len(places) == 30 + 1
    assert all(tmp_path in place.parents for place in places)


def test_the_hash_follows_contents_and_their_borders(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    before = hash_inputs(path, "y")
    assert hash_inputs(path, "y") == before
    assert hash_inputs("xy", "") != hash_inputs("x", "y")
    path.write_text("z")
    assert hash_inputs(path, "y") != before
