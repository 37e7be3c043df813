"""Inputs of lanes, gathered from the base and the data of a job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mars_jax.config.load import Config
from mars_jax.job.base import JobBase
from mars_jax.job.data import JobData
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.inputs import LaneInputs, Rates
from mars_jax.lanes.lane import Lane
from mars_jax.runtime.sharding import batch_parts


@dataclass(frozen=True)
class InputsOf:
    """Gathers the inputs of probes and of final runs.

    Attributes:
        config: of the job.
        base: of the job.
        data: of the job.
    """

    config: Config
    base: JobBase
    data: JobData

    def probes(self, lane: Lane, engine: Engine, rates: Rates | Sequence[Rates] | None = None) -> LaneInputs:
        """Inputs of probes that read the data of `lane`, at the config's learning rates unless given."""
        settings, cached = self.config.probe, engine.cached_encoder
        return LaneInputs(
            base=self.base.params_on(engine.mesh),
            stream=self.data.probe_stream(lane, cached_encoder=cached),
            validation=self.data.validation_batches(settings.batch_size, cached_encoder=cached),
            rates=rates or self.config.learning_rates(),
            eval_batches=self.data.num_eval_batches(settings.validation_samples, settings.batch_size),
            seed=self.config.seed,
        )

    def final_runs(
        self,
        lane: Lane,
        engine: Engine,
        rates: Rates | Sequence[Rates],
        initial: Mapping[int, np.ndarray] | None = None,
    ) -> LaneInputs:
        """Inputs of final runs on the samples of `lane`; `initial` as in `LaneInputs`."""
        settings = self.config.finetune
        return LaneInputs(
            base=self.base.params_on(engine.mesh),
            stream=self.data.stream(lane, settings.batch_size, batch_parts(engine.mesh)),
            validation=self.data.validation_batches(settings.batch_size),
            rates=rates,
            eval_batches=self.data.num_eval_batches(settings.validation_samples, settings.batch_size),
            initial=initial,
            seed=self.config.seed,
        )
