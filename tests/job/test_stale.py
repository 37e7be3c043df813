"""Files that a run is made from, changed under it: what was made from others was kept without a word."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import given_job, tiny_job
from tests.helpers.given_job import Job, changed, contents, flipped, mars


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return given_job.make(tmp_path_factory.getbasetemp())


def refusal(run: Path, what: object) -> str:
    return (
        f"mars: run directory {run} has results of other data or of another base: {what} changed since. Set another "
        f"run_dir, take the files back, or delete {run} to start again.\n"
    )


@pytest.mark.parametrize("command", ["run", "finetune", "evaluate", "export"])
def test_old_results_were_shown_under_new_answers(job, command):
    before = contents(job.run)
    with changed(job.train, job.train.read_bytes().replace(b'"red"', b'"rot"')):
        code, out, err = mars(command, job.run)
        assert (code, out) == (2, "")
        assert err.endswith(refusal(job.run, job.train))
    assert contents(job.run) == before
    code, _, err = mars("run", job.run)
    assert code == 0
    assert [line for line in err.splitlines() if "skipped" in line] == [
        f"{phase}: done before, skipped" for phase in given_job.PHASES
    ]


def test_a_picture_that_was_replaced_and_given_its_old_time_was_not_noticed(job):
    picture = job.folder / "images" / "train5.png"
    times = picture.stat().st_atime_ns, picture.stat().st_mtime_ns
    other = (job.folder / "images" / "train7.png").read_bytes()
    with changed(picture, other):
        os.utime(picture, ns=times)
        code, _, err = mars("run", job.run)
    assert code == 2
    assert err.endswith(refusal(job.run, picture))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_another_base_in_the_same_folder_was_not_noticed(job, name):
    file = job.base / name
    content = file.read_bytes()
    # A blank in a JSON file; a bit of the last weight.
    with changed(file, flipped(content, 0.999) if name == "model.safetensors" else content + b" "):
        code, _, err = mars("evaluate", job.run)
    assert code == 2
    assert err.endswith(refusal(job.run, file))


def test_a_file_that_was_added_to_the_base_is_a_change(job):
    added = job.base / "added_tokens.json"
    added.write_text("{}")
    code, _, err = mars("export", job.run)
    added.unlink()
    assert code == 2
    assert err.endswith(refusal(job.run, added))


def test_touched_and_lost_files_are_no_change(job, tmp_path):
    os.utime(job.train)
    os.utime(job.base / "model.safetensors")
    hidden = shutil.move(job.folder / "images", tmp_path / "images")
    code, _, err = mars("run", job.run)
    shutil.move(hidden, job.folder / "images")
    assert code == 0, err
    assert err.count("done before, skipped") == len(given_job.PHASES)


def test_an_export_read_the_data_again_for_one_prompt(job, tmp_path):
    run = Path(shutil.copytree(job.run, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    hidden = shutil.move(job.folder / "images", tmp_path / "images")
    code, _, err = mars("export", run)
    shutil.move(hidden, job.folder / "images")
    assert code == 0, err
    assert json.loads((run / "data.json").read_text())["prompt"] in (run / "adapter" / "README.md").read_text()
    assert contents(run) == contents(job.run)


def test_a_run_of_before_prompts_were_noted_has_its_prompt_from_the_data(job, tmp_path):
    run = Path(shutil.copytree(job.run, tmp_path / "run"))
    (run / "data.json").unlink()
    (run / "state.json").unlink()
    shutil.rmtree(run / "adapter")
    code, _, err = mars("export", run)
    assert code == 0, err
    assert (run / "adapter" / "README.md").read_bytes() == (job.run / "adapter" / "README.md").read_bytes()


def test_before_anything_is_trained_changed_data_are_read_again(job, tmp_path):
    run = tmp_path / "run"
    train = Path(shutil.copy(job.train, tmp_path / "train.json"))
    # A search, so that there is a command that ends before anything is trained.
    data = {"train": str(train), "image_root": str(job.folder)}
    config = tiny_job.config(tmp_path / "a.yaml", job.base, train, run, data=data, probe={"num_samples": [8, 16]})
    assert mars("plan", config)[0] == 0
    digest = json.loads((run / "data.json").read_text())["sources"]
    train.write_text(train.read_text().replace('"red"', '"rot"'))
    code, _, err = mars("plan", config)
    assert code == 0
    assert f"data: {train} changed since, so the data are read again" in err
    assert json.loads((run / "data.json").read_text())["sources"] != digest
    assert "plan: data, pictures and base changed, done again" in err
    assert mars("plan", config)[2].count("done before, skipped") == 2


def test_a_stopped_final_run_went_on_with_other_answers(job, tmp_path):
    run = tmp_path / "run"
    config = job.config(run, finetune={"steps": 10**5, "look_every": 10**5, "warmup_steps": 1})
    environment = tiny_job.environment(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    process = subprocess.Popen(
        tiny_job.command("run", config), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 200
    while not any(path.name.isdigit() for path in (run / "finetune" / "checkpoints").glob("*/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    process.communicate()
    with changed(job.train, job.train.read_bytes().replace(b'"red"', b'"rot"')):
        code, _, err = mars("run", config)
    assert code == 2
    assert err.endswith(refusal(run, job.train))


def test_a_key_more_in_the_sources_ended_in_a_traceback(job, tmp_path):
    run = Path(shutil.copytree(job.run, tmp_path / "run"))
    document = json.loads((run / "sources.json").read_text())
    document["base"][str(job.base / "config.json")]["checked"] = True
    (run / "sources.json").write_text(json.dumps({**document, "schema": 1}))
    code, _, err = mars("run", run)
    assert code == 0, err
    assert err.count("done before, skipped") == len(given_job.PHASES)
    assert "warning" not in err


def test_sources_that_were_changed_are_reported_once(job, tmp_path):
    run = Path(shutil.copytree(job.run, tmp_path / "run"))
    document = json.loads((run / "sources.json").read_text())
    (run / "sources.json").write_text(json.dumps({**document, "digest": "0"}))
    code, _, err = mars("run", run)
    assert code == 0, err
    assert err.count("sources.json was damaged or changed by hand; it is written again") == 1
    assert json.loads((run / "sources.json").read_text())["digest"] == document["digest"]


def test_sources_that_were_lost_are_found_again_and_compared(job, tmp_path):
    run = Path(shutil.copytree(job.run, tmp_path / "run"))
    whole = json.loads((run / "sources.json").read_text())
    (run / "sources.json").write_text("[]")
    code, _, err = mars("run", run)
    assert code == 0, err
    assert err.count("sources.json holds a JSON list where a mapping of names is expected") == 1
    assert json.loads((run / "sources.json").read_text())["digest"] == whole["digest"]
    (run / "sources.json").unlink()
    with changed(job.train, job.train.read_bytes().replace(b'"red"', b'"rot"')):
        code, _, err = mars("run", run)
    assert code == 2
    assert f"{run / 'sources.json'} was damaged or deleted, and files changed since. Set another run_dir" in err
