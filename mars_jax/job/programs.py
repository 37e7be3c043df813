"""Which compiled programs a run needs, and which of them serves a given piece of work: a matter of FLOPs alone.

Nothing is measured here, so the same config on the same kind of device always gives the same programs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mars_jax.job.prices import compile_flops, step_flops
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.buckets import Bucket, plan_buckets
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.runtime.devices import physical_memory_bytes
from mars_jax.runtime.sharding import share_cores


@dataclass(frozen=True)
class Program:
    """A bucket as it is run.

    Attributes:
        bucket: lanes and padded ranks.
        groups: the lanes cut into groups that share their data and their place in memory, the largest first.
        engine: the compiled functions.
    """

    bucket: Bucket
    groups: tuple[tuple[Lane, ...], ...]
    engine: Engine


def probe_programs(workspace: Workspace, lanes: Sequence[Lane], lane_block: int) -> tuple[Program, ...]:
    """The programs of the probe phase.

    Args:
        workspace: of the run.
        lanes: all lanes.
        lane_block: lanes in one vectorised step, at most.
    """
    settings = workspace.config.probe

    def lane_flops(ranks: Ranks, cached: bool) -> float:
        return settings.horizon * step_flops(workspace, ranks, cached_encoder=cached)

    buckets = plan_buckets(lanes, lane_flops, compile_flops(), cacheable=_features_fit(workspace))
    devices = workspace.mesh.shape["lane"]
    programs = []
    for bucket in buckets:
        groups = lane_groups(bucket.lanes, settings.lanes_per_program)
        slots = devices * -(-max(map(len, groups)) // devices)
        block = min(lane_block, slots // devices)
        engine = workspace.engine(bucket.padded_ranks, slots, block, cached_encoder=bucket.cached_encoder)
        programs.append(Program(bucket, groups, engine))
    return tuple(programs)


def lane_groups(lanes: Sequence[Lane], most: int) -> tuple[tuple[Lane, ...], ...]:
    """Cuts lanes into groups with the same (num_samples, seed), as equal as can be and of at most `most` lanes."""
    shared: dict[tuple[int, int], list[Lane]] = {}
    for lane in lanes:
        shared.setdefault((lane.num_samples, lane.seed), []).append(lane)
    groups = []
    for alike in shared.values():
        size = math.ceil(len(alike) / math.ceil(len(alike) / most))
        groups += [tuple(alike[i : i + size]) for i in range(0, len(alike), size)]
    return tuple(groups)


def covering_engine(
    workspace: Workspace, programs: Sequence[Program], rank_vectors: Sequence[Ranks], steps: int
) -> Engine:
    """The engine that runs some lanes for less: one of the probe phase, or their own and its compile.

    Args:
        workspace: of the run.
        programs: of the probe phase.
        rank_vectors: ranks of the lanes, which will run together.
        steps: of each of them, on average.
    """
    needed = {module: max(ranks[module] for ranks in rank_vectors) for module in rank_vectors[0]}
    count = len(rank_vectors)
    # One lane can't be split over lane devices: its samples are, and on a CPU its products.
    mesh = workspace.mesh if count > 1 else workspace.single_lane_mesh
    devices = mesh.shape["lane"]
    slots = devices * -(-count // devices)
    block = min(workspace.default_lane_block, slots // devices)
    best = steps * count * step_flops(workspace, needed) + compile_flops()
    chosen = None
    for program in programs:
        engine, padded = program.engine, program.bucket.padded_ranks
        fits = engine.num_slots >= count and not engine.cached_encoder
        fits &= engine.mesh == mesh or share_cores(engine.mesh)
        if fits and all(padded[module] >= rank for module, rank in needed.items()):
            cost = steps * engine.places(count) * step_flops(workspace, padded)
            if cost <= best:
                best, chosen = cost, engine
    return chosen or workspace.engine(needed, slots, block, mesh=mesh)


def _features_fit(workspace: Workspace) -> bool:
    """Whether the encoder's output for the largest D takes at most a quarter of this machine's memory."""
    config = workspace.model_config
    vision, states = config.vision, len(getattr(config, "vision_feature_layers", (0,)))
    samples = max(workspace.config.probe.num_samples)
    count = samples * workspace.shapes.max_tiles * vision.num_positions * vision.hidden_size * states
    return count * 4 <= physical_memory_bytes() / 4
