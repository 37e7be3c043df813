"""Records of lanes that were lost, doubled or changed: fitted without a word, and never written again."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import killable_job
from tests.helpers.given_job import mars
from tests.helpers.killable_job import Job


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return killable_job.make(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(job, tmp_path) -> Path:
    return Path(shutil.copytree(job.alone, tmp_path / "run"))


def lost(lines: list[str]) -> list[str]:
    return lines[:3] + lines[4:]


def doubled(lines: list[str]) -> list[str]:
    return [*lines, lines[2]]


def altered(lines: list[str]) -> list[str]:
    record = json.loads(lines[5])
    return [*lines[:5], json.dumps({**record, "best_loss": record["best_loss"] - 1}), *lines[6:]]


def gone(lines: list[str]) -> list[str]:
    return []


@pytest.mark.parametrize("change", [lost, doubled, altered, gone])
def test_changed_lanes_were_fitted_without_a_word(job, run, change):
    file = run / "probes" / "lanes.jsonl"
    whole = file.read_bytes()
    file.write_text("".join(line + "\n" for line in change(whole.decode().splitlines())))
    code, _, err = mars("fit", run)
    assert code == 3
    assert f"mars: {file} isn't what the phase probe left: it was damaged, or changed by hand. Run `mars probe" in err
    # The probes are all there as curves.
    code, _, err = mars("probe", run)
    assert code == 0, err
    assert "warning: probe: probes/lanes.jsonl isn't there as the phase left it" in err
    assert "(damaged, deleted or edited); written again" in err
    assert file.read_bytes() == whole


def test_changed_curves_are_refused_with_the_way_out(run):
    lanes, curves = (run / "probes" / name for name in ("lanes.jsonl", "curves.jsonl"))
    curves.write_bytes(curves.read_bytes()[:-200])
    code, _, err = mars("run", run)
    assert code == 3
    assert err.splitlines()[-1] == (
        f"mars: the probes are finished, but {curves} isn't what they left: damaged, deleted or changed by hand. Put "
        f"it back from a copy; or delete {lanes} and {curves}, and all lanes run again."
    )


@pytest.mark.parametrize(
    ("change", "fault", "remedy"),
    [
        (doubled, "has more than one record of lanes: ", "Keep one line of each."),
        (
            altered,
            ": the best_loss of lane ",
            "Delete {}: the same command writes it again from probes/curves.jsonl.",
        ),
    ],
)
def test_lanes_that_change_before_the_probes_are_finished_are_found_at_their_end(run, change, fault, remedy):
    file = run / "probes" / "lanes.jsonl"
    unfinished(run)
    file.write_text("".join(line + "\n" for line in change(file.read_text().splitlines())))
    code, _, err = mars("probe", run)
    assert code == 3
    assert f"mars: {file}" in err
    assert fault in err
    assert err.endswith(f"{remedy.format(file)}\n")
    file.unlink()
    assert mars("probe", run)[0] == 0


def unfinished(run: Path) -> None:
    """Has the probes as they are before their phase ends."""
    state = run / "state.json"
    document = json.loads(state.read_text())
    document["phases"]["probe"] = {"status": "interrupted", "started": ""}
    state.write_text(json.dumps(document))


def without(*names: str):
    return lambda record: {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without("train_loss"), "train_loss is missing"),
        (without("drift"), "drift is missing"),
        (without("alive", "reason"), "alive is missing"),
        (lambda record: {**record, "remaining": None}, "remaining is None but must be an object"),
        (
            lambda record: {**record, "remaining": {"vision": 0.5}},
            "has one of remaining and hybrids, which belong together",
        ),
    ],
)
def test_a_line_of_a_curve_without_a_key_ended_in_a_traceback(run, change, fault):
    unfinished(run)
    curves = run / "probes" / "curves.jsonl"
    lines = curves.read_text().splitlines()
    lines[2] = json.dumps(change(json.loads(lines[2])))
    curves.write_text("".join(line + "\n" for line in lines))
    code, _, err = mars("probe", run)
    assert code == 3
    assert err.splitlines()[-1] == f"mars: {curves}, line 3: {fault}. Mend or delete the line."


@pytest.mark.parametrize(("names", "numbers"), [(["lanes"], "0 lanes and 6 steps"), (["steps"], "6 lanes and 0 steps")])
def test_a_group_without_its_lanes_or_their_steps_ended_in_a_traceback(run, names, numbers):
    unfinished(run)
    events = run / "events.jsonl"
    records = [json.loads(line) for line in events.read_text().splitlines()]
    number = next(number for number, record in enumerate(records) if record["event"] == "group")
    records[number] = without(*names)(records[number])
    events.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, _, err = mars("probe", run)
    assert code == 3
    assert err.splitlines()[-1] == (
        f"mars: {events}, line {number + 1}: a group has {numbers}; it has as many of each, 1 or more. Mend or delete "
        "the line."
    )


def test_a_record_that_was_there_before_its_lane_ran_is_compared_with_its_curve(job, run, tmp_path):
    other = tmp_path / "other"
    (other / "probes").mkdir(parents=True)
    shutil.copy(run / "config.resolved.yaml", other)
    record = json.loads((run / "probes" / "lanes.jsonl").read_text().splitlines()[5])
    file = other / "probes" / "lanes.jsonl"
    file.write_text(json.dumps({**record, "best_loss": 0.5}) + "\n")
    code, _, err = job.end("probe", other)
    assert code == 3, err
    assert f"mars: {file}: the best_loss of lane {record['lane']} is 0.5, but its curve in probes/curves.jsonl" in err
    file.unlink()
    assert mars("probe", other)[0] == 0
    assert sorted(file.read_text().splitlines()) == sorted((run / "probes" / "lanes.jsonl").read_text().splitlines())


def test_lanes_of_ones_own_are_fitted_alone_unless_one_is_there_twice(run, tmp_path):
    own = tmp_path / "own"
    (own / "probes").mkdir(parents=True)
    for name in ("config.resolved.yaml", "probes/lanes.jsonl"):
        shutil.copy(run / name, own / name)
    assert mars("fit", own)[0] == 0
    file = own / "probes" / "lanes.jsonl"
    file.write_text("".join(line + "\n" for line in doubled(file.read_text().splitlines())))
    code, _, err = mars("fit", own)
    assert code == 3
    assert f"mars: {file} has more than one record of lanes: " in err


def test_fewer_lanes_than_planned_are_fitted_with_a_warning(run, tmp_path):
    own = tmp_path / "own"
    (own / "probes").mkdir(parents=True)
    for name in ("config.resolved.yaml", "plan.json", "probes/lanes.jsonl"):
        shutil.copy(run / name, own / name)
    file = own / "probes" / "lanes.jsonl"
    file.write_text("".join(line + "\n" for line in lost(file.read_text().splitlines())))
    code, _, err = mars("fit", own)
    assert code == 0, err
    assert "warning: fit: 11 of the 12 planned lanes are recorded; the laws are fitted to these" in err
