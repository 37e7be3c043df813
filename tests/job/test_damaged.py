"""Files of a finished run that a bad disk or a hand changed: used without a word, or a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import given_job
from tests.helpers.given_job import Job, contents, flipped, mars


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return given_job.make(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(job, tmp_path) -> Path:
    return Path(shutil.copytree(job.run, tmp_path / "run"))


def empty(content: bytes) -> bytes:
    return b""


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "spoilt",
    [
        {
            "data": ("data.json", flipped),
            "finetune": ("finetune/adapters.safetensors", flipped),
            "evaluate": ("evaluation.json", None),
            "export": ("adapter/adapter_config.json", halved),
            "merge": ("merged/model.safetensors", flipped),
        },
        {
            "select": ("selection.json", empty),
            "finetune": ("finetune/summary.json", flipped),
            "evaluate": ("samples.jsonl", halved),
            "merge": ("merged/tokenizer.json", None),
        },
        {"finetune": ("finetune/adapters.safetensors", None)},
    ],
)
def test_a_damaged_file_of_a_finished_phase_was_used_and_never_made_again(job, run, spoilt):
    for name, spoil in spoilt.values():
        if spoil:
            (run / name).write_bytes(spoil((run / name).read_bytes()))
        else:
            (run / name).unlink()
    done = given_job.process("run", run)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("warning: ")] == [
        f"warning: {phase}: {name} isn't there as the phase left it (damaged, deleted or edited); done again"
        for phase, (name, _) in spoilt.items()
    ]
    assert contents(run) == contents(job.run)
    assert mars("run", run)[2].count("done before, skipped") == len(given_job.PHASES)


@pytest.mark.parametrize(
    ("command", "name", "phase"),
    [
        ("evaluate", "finetune/adapters.safetensors", "finetune"),
        ("export", "finetune/summary.json", "finetune"),
        ("finetune", "selection.json", "select"),
        ("report", "evaluation.json", "evaluate"),
        ("report", "data.json", "run"),
    ],
)
def test_a_command_on_a_damaged_file_of_an_earlier_phase_is_refused(run, command, name, phase):
    file = run / name
    file.write_bytes(flipped(file.read_bytes()))
    code, _, err = mars(command, run)
    assert code == 3
    assert f"mars: {file} isn't what the phase " in err
    assert f"left: it was damaged, or changed by hand. Run `mars {phase} {run}` to make it again. To go on" in err


def test_settings_that_changed_had_no_name(job, run):
    # As in a run whose config was edited before its state.json noted what it was made with.
    state = json.loads((run / "state.json").read_text())
    state["phases"]["finetune"]["inputs"] |= {"optimizer": "another", "schedule": "of old"}
    (run / "state.json").write_text(json.dumps(state))
    done = given_job.process("finetune", run)
    assert done.returncode == 0, done.stderr
    assert "finetune: optimizer, schedule changed, done again" in done.stderr
    assert contents(run) == contents(job.run)


def test_an_export_without_a_pick_names_the_phase_that_makes_one(job, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(job.run / "finetune", run / "finetune")
    shutil.copy(job.run / "config.resolved.yaml", run)
    code, _, err = mars("export", run)
    assert code == 2
    assert err.endswith(
        f"mars: {run / 'selection.json'} is missing: run `mars select` first, or `mars run` for every phase.\n"
    )


def test_samples_that_were_changed_were_compared(job, run):
    (run / "samples.jsonl").write_bytes(flipped((run / "samples.jsonl").read_bytes()))
    code, _, err = mars("diff", run, job.run)
    assert code == 3
    assert f"{run / 'samples.jsonl'} isn't what the phase evaluate left" in err


def test_a_file_of_ones_own_is_taken_in_a_new_run_directory(job, run, tmp_path):
    # As the message says: a pick of one's own.
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "config.resolved.yaml", other)
    selection = json.loads((run / "selection.json").read_text())
    (other / "selection.json").write_text(json.dumps({**selection, "pick": {"projector": 2}}))
    done = given_job.process("finetune", other)
    assert done.returncode == 0, done.stderr
    assert json.loads((other / "finetune" / "summary.json").read_text())["ranks"] == {
        "vision": 0,
        "projector": 2,
        "llm": 0,
    }


@pytest.mark.parametrize("pick", [{"head": 3}, {"projector": -1}, {"projector": 0}])
def test_a_pick_that_is_none_is_refused(job, tmp_path, pick):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(job.run / "config.resolved.yaml", run)
    selection = json.loads((job.run / "selection.json").read_text())
    (run / "selection.json").write_text(json.dumps({**selection, "pick": pick}))
    code, _, err = mars("finetune", run)
    assert code == 2
    assert f"mars: {run / 'selection.json'}: pick has " in err
    assert "the modules are vision, projector, llm, and ranks are 0 (frozen) or more." in err


@pytest.mark.parametrize(
    ("content", "said"), [("", "is empty"), ("a: [", "is not YAML"), ("- 1", "is not a list of settings")]
)
def test_damaged_settings_passed_for_another_config(job, run, content, said):
    file = run / "config.resolved.yaml"
    whole = file.read_text()
    file.write_text(content)
    config = job.config(run)
    code, _, err = mars("run", config)
    assert code == 0, err
    assert err.count("done before, skipped") == len(given_job.PHASES)
    assert file.read_text() == whole.replace(str(job.run), str(run))
    file.write_text(content)
    code, _, err = mars("run", config, "seed=7")
    assert code == 3
    assert err == (
        f"mars: {file} {said}: it was damaged, or changed by hand. Put it back from a copy, or give the config that "
        "the run was made with, and it is written again; for other settings set another run_dir.\n"
    )


def test_an_empty_config_of_a_run_is_said_to_be_damaged(run):
    (run / "config.resolved.yaml").write_text("")
    code, _, err = mars("run", run)
    assert code == 2
    assert f"{run / 'config.resolved.yaml'} is empty: it was damaged. Run the command with the config that" in err


def test_a_changed_digit_of_the_settings_was_followed(run):
    file = run / "config.resolved.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    code, _, err = mars("report", run)
    assert code == 3
    assert f"mars: {file} holds other settings than the run was made with: it was damaged, or changed by hand." in err


WRITTEN_AGAIN = "Delete it, and run the command that writes it again."
OTHER_TYPES = {
    "null": (b"null", f" holds a JSON null where a mapping of names is expected. {WRITTEN_AGAIN}"),
    "a list": (b"[1]", f" holds a JSON list where a mapping of names is expected. {WRITTEN_AGAIN}"),
    "a text": (b'"x"', f" holds a JSON text where a mapping of names is expected. {WRITTEN_AGAIN}"),
    "a number": (b"3", f" holds a JSON number where a mapping of names is expected. {WRITTEN_AGAIN}"),
    "nothing": (b"", f" is empty, not JSON. {WRITTEN_AGAIN}"),
    "bytes": (bytes(range(256)), f" is not JSON: expected value at line 1 column 1. {WRITTEN_AGAIN}"),
    "a byte order mark": (b"\xef\xbb\xbf{}", f" is not JSON: expected value at line 1 column 1. {WRITTEN_AGAIN}"),
    "depth": (b"[" * 10**5, f" is not JSON: recursion limit exceeded at line 1 column 202. {WRITTEN_AGAIN}"),
    "some depth": (b"[" * 300 + b"]" * 300, " is not JSON: recursion limit exceeded at line 1 column 202."),
    "half a surrogate": (b'{"phases": "\\ud800"}', " is not JSON: unexpected end of hex escape at line 1 column "),
    "a long number": (
        b'{"phases": ' + b"9" * 5000 + b"}",
        " is not JSON: number out of range at line 1 column ",
    ),
    "a folder": (None, " is a folder where a file belongs. Move it away, and run the command again."),
}
OTHER_KEYS = {
    "state.json": '{"phases": {"data": [1]}} phases.data is [1] but must be an object',
    "data.json": '{"files": 3} files is 3 but must be an object',
    "selection.json": """{"pick": {"projector": "3"}} pick.projector is '3' but must be a valid integer""",
    "finetune/summary.json": '{"ranks": null} ranks is None but must be an object',
    "evaluation.json": '{"conditions": []} conditions is [] but must be an object',
}


def refused(run: Path, name: str, content: bytes | None, text: str) -> None:
    """Puts another content, or a folder, in the place of a file, and sees that commands name it."""
    # Without checksums, as in runs that were made before there were any.
    state = json.loads((run / "state.json").read_text())
    for record in state["phases"].values():
        record.pop("outputs", None)
    (run / "state.json").write_text(json.dumps(state))
    (run / name).unlink()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    for command in ("status", "report", "export") if name == "state.json" else ("report",):
        code, _, err = mars(command, run)
        assert code == 3, err
        assert err.splitlines()[-1].startswith(f"mars: {run / name}{text}")


@pytest.mark.parametrize(("content", "text"), OTHER_TYPES.values(), ids=OTHER_TYPES.keys())
@pytest.mark.parametrize("name", OTHER_KEYS)
def test_a_file_of_another_type_ended_in_a_traceback(run, name, content, text):
    refused(run, name, content, text)


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_a_key_of_another_type_ended_in_a_traceback(run, name):
    content, _, text = OTHER_KEYS[name].partition("} ")
    refused(run, name, f"{content}}}".encode(), f": {text}. {WRITTEN_AGAIN}")


IN_THE_WAY = (
    "mars: can't use {} in the run directory: {}. Something else lies where a file or a folder of the run belongs: "
    "move it away, and run the same command again."
)


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("lock", 2, IN_THE_WAY.format("{}", "Is a directory")),
        ("events.jsonl", 2, IN_THE_WAY.format("{}", "Is a directory")),
        ("report", 2, IN_THE_WAY.format("{}", "File exists")),
        ("adapter", 2, IN_THE_WAY.format("{}", "File exists")),
        ("finetune", 4, "mars: can't write checkpoints to {}/checkpoints/"),
    ],
)
def test_a_folder_for_a_file_and_a_file_for_a_folder_are_named(run, name, code, text):
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink()
        path.mkdir()
    found, _, err = mars("run", run)
    assert found == code, err
    assert err.splitlines()[-1].startswith(text.format(path))


@pytest.mark.parametrize("name", ["events.jsonl", "state.json", "lock", "samples.jsonl", "finetune/metrics.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_a_pipe_or_a_device_in_a_run_directory_was_read_for_ever(run, name, kind):
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero")
    for command in ("status", "report") if name in ("events.jsonl", "state.json", "lock") else ("report",):
        code, _, error = mars(command, run)
        assert code == 3
        assert f"{run / name} is a pipe, a socket or a device where a file belongs. Move it away" in error


@pytest.mark.parametrize("name", ["events.jsonl", "state.json", "finetune/metrics.jsonl"])
@pytest.mark.parametrize("target", ["", "gone"])
def test_a_file_behind_a_link_that_leads_nowhere_was_taken_for_one_never_written(run, name, target):
    (run / name).unlink()
    (run / name).symlink_to(target or Path(name).name)
    for command in ("status", "report", "fit"):
        code, _, error = mars(command, run)
        assert code == 3, error
        assert f"{run / name} is a link to {target or Path(name).name}, which leads nowhere. Put back what" in error


def test_a_key_of_a_phase_that_no_one_reads_was_shown_by_status(run):
    state = json.loads((run / "state.json").read_text())
    next(iter(state["phases"].values()))["video"] = {"laws": "e3a8"}
    (run / "state.json").write_text(json.dumps(state))
    code, out, _ = mars("status", run, "--json")
    assert code == 0
    assert "video" not in out
