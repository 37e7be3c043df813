"""FLOPs that lane-steps, evaluations and compiles of a job cost."""

import jax

from mars_jax.data.shapes import Size
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.lane import Ranks
from mars_jax.models.flops import evaluation_flops, lane_step_flops

# FLOPs done in the time of one compile: 15 to 30 seconds at what a core reaches on small models; on a GPU a minute or
# more at what an H100 reaches on LLaVA-OneVision 0.5B (benchmarks/speed/gpu_step.py). Of a TPU nothing was measured.
_COMPILE_FLOPS = {"cpu": 1e12, "gpu": 1e16}
_COMPILE_FLOPS_ACCELERATOR = 1e15


def step_flops(workspace: Workspace, ranks: Ranks, *, cached_encoder: bool = False) -> float:
    """Least FLOPs of a lane-step of a probe; of a packed batch, on average."""
    shapes, batch_size = workspace.shapes, workspace.config.probe.batch_size
    parts = [(float(batch_size), Size(shapes.max_tokens, shapes.max_tiles, shapes.max_supervised))]
    if plan := workspace.packing(batch_size):
        parts = [(plan.wide_rows, plan.packing.wide), (plan.narrow_rows, plan.packing.narrow)]

    def flops(size: Size) -> float:
        return lane_step_flops(
            workspace.model_config,
            workspace.targets,
            ranks,
            batch_size=1,
            tokens=size.tokens,
            tiles=size.tiles,
            supervised=size.supervised,
            cached_encoder=cached_encoder,
        ).total

    return sum(rows * flops(size) for rows, size in parts)


def look_flops(workspace: Workspace, ranks: Ranks, samples: int, *, cached_encoder: bool = False) -> float:
    """Least FLOPs of a look of one lane at some validation samples."""
    shapes, batch_size = workspace.shapes, workspace.config.probe.batch_size
    batch = evaluation_flops(
        workspace.model_config,
        workspace.targets,
        ranks,
        batch_size=batch_size,
        tokens=shapes.max_tokens,
        tiles=shapes.max_tiles,
        supervised=shapes.max_supervised,
        cached_encoder=cached_encoder,
    )
    return workspace.look_batches(samples, batch_size) * batch.total


def compile_flops() -> float:
    """FLOPs that this kind of device does in the time of a compile."""
    return _COMPILE_FLOPS.get(jax.default_backend(), _COMPILE_FLOPS_ACCELERATOR)
