"""The real command, killed, signalled and out of room at any moment: run again, it ends as if nothing had been."""

import pytest
import tiny_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    base = tiny_job.checkpoint(folder / "base")
    train = tiny_job.records(folder / "data", 60)
    return tiny_job.config(folder / "a.yaml", base, train, folder / "run"), folder


def test_status_of_a_run_that_never_began_is_refused(job):
    config, folder = job
    done = tiny_job.mars("status", config, cache=folder / "cache")
    assert (done.returncode, f"there is no run in {folder / 'run'}" in done.stderr) == (2, True)
