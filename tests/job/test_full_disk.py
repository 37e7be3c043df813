"""A disk without room, in each phase: a traceback under the message, and temporary folders for good."""

import shutil
from pathlib import Path

import pytest

from tests.helpers import given_job
from tests.helpers.given_job import Job, contents

# Room for documents, but not for tensors.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000)); "


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return given_job.make(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (["merged"], "merged"),
        (["merged", "adapter"], "adapter"),
        (["merged", "adapter", "finetune"], "finetune/adapters.safetensors"),
    ],
)
def test_a_full_disk_is_named_and_leaves_no_temporary_files(job, tmp_path, gone, named):
    run = Path(shutil.copytree(job.run, tmp_path / "run"))
    for name in gone:
        shutil.rmtree(run / name)
    done = given_job.process("run", run, before=LIMIT)
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mars: can't write ")
    assert str(run / named) in last
    assert last.endswith("run the same command again to go on.")
    assert "Traceback" not in done.stderr
    assert not [path for path in run.rglob("*") if ".tmp" in path.name or "orbax-checkpoint-tmp" in path.name]
    again = given_job.process("run", run)
    assert again.returncode == 0, again.stderr
    assert contents(run) == contents(job.run)
