"""The data of a job."""

import numpy as np

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
