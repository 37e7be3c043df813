"""Checkpoints after a kill, on a bad disk or on a full one: damaged ones are skipped with a warning."""

import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mars_jax.lanes.lane import Lane
from mars_jax.runtime.checkpoint import Checkpoints
from tests.helpers import least_model
from tests.helpers.tiny_lanes import assert_same, schedule

# When orbax fails to read one array, it leaves its reads of others behind, and they complain once its loop is closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

LANES = [Lane({"vision": 4, "llm": 2}, 8, 1), Lane({"vision": 1, "llm": 4}, 8, 1)]
RATES = {"vision": 3e-2, "llm": 3e-2}
EVAL_STEPS = [0, 4, 6, 8, 11, 16]


def run(**changes):
    return least_model.run(LANES, RATES, schedule(EVAL_STEPS, per_doubling=2), **changes)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


class Kill(Exception):
    """What stops a run."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The checkpoints of a run that was killed between its fourth and fifth eval points: steps 6 and 8."""
    directory = tmp_path_factory.mktemp("killed")

    def advance(progress):
        if progress.step == 11:
            raise Kill

    with Checkpoints(directory) as checkpoints, pytest.raises(Kill):
        run(checkpoints=checkpoints, advance=advance)
    return directory


@pytest.fixture
def directory(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "checkpoints"))


def goes_on(directory, uninterrupted):
    """Runs again, to the end of an uninterrupted run. Returns the step that it went on from, and its warnings."""
    warnings, progress = [], []
    with Checkpoints(directory, warnings.append) as checkpoints:
        resumed = run(checkpoints=checkpoints, advance=progress.append)
    ends, expected = ([[p.to_json() for p in lane] for lane in run.points] for run in (resumed, uninterrupted))
    np.testing.assert_equal(ends, expected)
    for k in range(len(LANES)):
        assert_same(resumed.lane_state(k), uninterrupted.lane_state(k))
    return progress[0].step, warnings


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path, share=0.5):
    """Changes the bit at some share of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 0x10
    path.write_bytes(content)


def test_a_run_goes_on_from_its_newest_checkpoint(directory, uninterrupted):
    assert goes_on(directory, uninterrupted) == (8, [])


@pytest.mark.parametrize("spoil", [truncate, empty, flip, Path.unlink])
def test_a_spoilt_checkpoint_is_passed_over_for_the_one_before(directory, uninterrupted, spoil):
    for path in files(directory / "8"):
        spoil(path)
    step, (warning,) = goes_on(directory, uninterrupted)
    assert step == 6
    assert re.fullmatch(
        rf"the checkpoint of step 8 in {directory} can't be read \(\w+: .*\); it is deleted, and the run goes on from "
        "the one before it, if there is one",
        warning,
    )


def small(step):
    """A state and a document of which every byte is checked below."""
    rng = np.random.default_rng(step)
    numbers = {"vector": rng.normal(size=500).astype(np.float32), "flags": np.array([True, False])}
    return numbers, {"rows": [[{"step": step, "loss": rng.normal(), "drift": math.nan}]]}


@pytest.mark.parametrize("spoil", [truncate, empty, *(partial(flip, share=share) for share in (0.2, 0.5, 0.8))])
def test_a_changed_bit_of_a_saved_number_was_taken_for_the_number(tmp_path, spoil):
    # And so for each file alone, whichever of them orbax keeps numbers or rows in.
    sound, copy = tmp_path / "sound", tmp_path / "copy"
    with Checkpoints(sound) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *small(step))
    steps = []
    for path in files(sound / "2"):
        shutil.copytree(sound, copy)
        spoil(copy / path.relative_to(sound))
        warnings = []
        with Checkpoints(copy, warnings.append) as checkpoints:
            step, state, document = checkpoints.restore(small(0)[0])
        steps.append(step)
        assert len(warnings) == (step == 1)
        assert_same(state, small(step)[0])
        np.testing.assert_equal(document, small(step)[1])
        shutil.rmtree(copy)
    assert set(steps) == {1, 2}  # orbax also keeps files that nothing is read from


def test_without_a_checkpoint_that_can_be_read_a_run_starts_afresh(directory, uninterrupted):
    for path in files(directory):
        flip(path)
    step, warnings = goes_on(directory, uninterrupted)
    assert step == 0
    assert [text.split(" in ")[0] for text in warnings] == ["the checkpoint of step 8", "the checkpoint of step 6"]


WRITE = """
import resource, sys
import numpy as np
from pathlib import Path
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.errors import DoesNotFitError, Interrupted
state = {"x": np.random.default_rng(0).normal(size=5000)}
try:
    with Checkpoints(Path(sys.argv[1])) as checkpoints:
        checkpoints.save(1, state, {})
    with Checkpoints(Path(sys.argv[1])) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        checkpoints.save(2, state, {})
        raise Interrupted("a checkpoint of step 2 was saved")
except DoesNotFitError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_is_an_error_even_for_a_run_that_stops_and_keeps_the_checkpoint_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith(f"can't write checkpoints to {tmp_path}: ")
    assert done.stdout.endswith(
        "Finished work is kept. Make room there, or make it writable, and run the same command again to go on.\n"
    )
    with Checkpoints(tmp_path, pytest.fail) as checkpoints:
        step, state, _ = checkpoints.restore({"x": np.zeros(5000)})
    assert step == 1
    np.testing.assert_array_equal(state["x"], np.random.default_rng(0).normal(size=5000))
