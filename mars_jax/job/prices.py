"""FLOPs that lane-steps, eval points, final runs and compiles of a job cost."""

from dataclasses import dataclass
from functools import cached_property

import jax

from mars_jax.config.load import Config
from mars_jax.data.shapes import Size
from mars_jax.job.base import JobBase
from mars_jax.job.data import JobData
from mars_jax.lanes.lane import Ranks
from mars_jax.models.flops import BatchShape, evaluation_flops, lane_step_flops

# FLOPs done in the time of one compile: 15 to 30 seconds at what a core reaches on small models; on a GPU a minute or
# more at what an H100 reaches on LLaVA-OneVision 0.5B (benchmarks/speed/gpu_step.py). Of a TPU nothing was measured.
_COMPILE_FLOPS = {"cpu": 1e12, "gpu": 1e16}
_COMPILE_FLOPS_ACCELERATOR = 1e15


def compile_flops() -> float:
    """FLOPs that this kind of device does in the time of a compile."""
    return _COMPILE_FLOPS.get(jax.default_backend(), _COMPILE_FLOPS_ACCELERATOR)


@dataclass(frozen=True)
class Prices:
    """Least FLOPs of the parts of a job.

    Attributes:
        config: of the job.
        base: of the job.
        data: of the job.
    """

    config: Config
    base: JobBase
    data: JobData

    def step(self, ranks: Ranks, *, cached_encoder: bool = False) -> float:
        """FLOPs of a lane-step of a probe; of a packed batch, on average."""
        return sum(
            rows
            * lane_step_flops(
                self.base.model_config,
                self.base.targets,
                ranks,
                BatchShape(1, size.tokens, size.tiles, size.supervised),
                method=self.base.method,
                cached_encoder=cached_encoder,
            ).total
            for rows, size in self._rows
        )

    @cached_property
    def _rows(self) -> list[tuple[float, Size]]:
        """Rows of a batch and their sizes."""
        shapes, batch_size = self.data.shapes, self.config.probe.batch_size
        if plan := self.data.packing(batch_size):
            return [(plan.wide_rows, plan.packing.wide), (plan.narrow_rows, plan.packing.narrow)]
        return [(float(batch_size), Size(shapes.max_tokens, shapes.max_tiles, shapes.max_supervised))]

    def eval_point(self, ranks: Ranks, samples: int, *, cached_encoder: bool = False) -> float:
        """FLOPs of an eval point of one lane at some validation samples."""
        shapes, batch_size = self.data.shapes, self.config.probe.batch_size
        batch = evaluation_flops(
            self.base.model_config,
            self.base.targets,
            ranks,
            BatchShape(batch_size, shapes.max_tokens, shapes.max_tiles, shapes.max_supervised),
            method=self.base.method,
            cached_encoder=cached_encoder,
        )
        return self.data.num_eval_batches(samples, batch_size) * batch.total

    def final_run(self, ranks: Ranks) -> float:
        """FLOPs of a final run with its eval points."""
        settings = self.config.finetune
        steps = settings.steps * self.step(ranks) * settings.batch_size / self.config.probe.batch_size
        return steps + (len(settings.eval_steps) - 1) * self.eval_point(ranks, settings.validation_samples)
