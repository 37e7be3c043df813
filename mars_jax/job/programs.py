"""Which compiled programs a run needs, and which of them serves a given piece of work: a matter of FLOPs alone.

Nothing is measured here, so the same config on the same kind of device always gives the same programs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mars_jax.job.job import Job
from mars_jax.job.prices import compile_flops
from mars_jax.lanes.buckets import Bucket, plan_buckets
from mars_jax.lanes.engine import Engine, EngineShape
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


def probe_programs(job: Job, lanes: Sequence[Lane], lane_block: int) -> tuple[Program, ...]:
    """The programs of the probe phase.

    Args:
        job: of the run.
        lanes: all lanes.
        lane_block: lanes in one vectorised step, at most.
    """
    settings = job.config.probe

    def lane_flops(ranks: Ranks, cached: bool) -> float:
        return settings.horizon * job.prices.step(ranks, cached_encoder=cached)

    buckets = plan_buckets(lanes, lane_flops, compile_flops(), cacheable=_features_fit(job))
    devices = job.base.mesh.shape["lane"]
    programs = []
    for bucket in buckets:
        groups = lane_groups(bucket.lanes, settings.lanes_per_program)
        slots = devices * -(-max(map(len, groups)) // devices)
        block = min(lane_block, slots // devices)
        shape = EngineShape(bucket.padded_ranks, slots, block, cached_encoder=bucket.cached_encoder)
        programs.append(Program(bucket, groups, job.engines.engine(shape)))
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


def covering_engine(job: Job, programs: Sequence[Program], rank_vectors: Sequence[Ranks], steps: int) -> Engine:
    """The engine that runs some lanes for less: one of the probe phase, or their own and its compile.

    Args:
        job: of the run.
        programs: of the probe phase.
        rank_vectors: ranks of the lanes, which will run together.
        steps: of each of them, on average.
    """
    needed = {module: max(ranks[module] for ranks in rank_vectors) for module in rank_vectors[0]}
    count = len(rank_vectors)
    # One lane can't be split over lane devices: its samples are, and on a CPU its products.
    mesh = job.base.mesh if count > 1 else job.base.single_lane_mesh
    devices = mesh.shape["lane"]
    slots = devices * -(-count // devices)
    block = min(job.engines.default_lane_block, slots // devices)
    best = steps * count * job.prices.step(needed) + compile_flops()
    chosen = None
    for program in programs:
        engine, padded = program.engine, program.bucket.padded_ranks
        fits = engine.num_slots >= count and not engine.cached_encoder
        fits &= engine.mesh == mesh or share_cores(engine.mesh)
        if fits and all(padded[module] >= rank for module, rank in needed.items()):
            cost = steps * engine.places(count) * job.prices.step(padded)
            if cost <= best:
                best, chosen = cost, engine
    return chosen or job.engines.engine(EngineShape(needed, slots, block, cached_encoder=False), mesh)


def _features_fit(job: Job) -> bool:
    """Whether the encoder's output for the largest D takes at most a quarter of this machine's memory."""
    config = job.base.model_config
    samples = max(job.config.probe.num_samples)
    count = samples * job.data.shapes.max_tiles * config.vision.num_positions * config.feature_width
    return count * 4 <= physical_memory_bytes() / 4
