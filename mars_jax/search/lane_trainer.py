"""The trainer of real lanes: probes and final runs of a job, each group in one program, resumed where it was killed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mars_jax.job import files
from mars_jax.job.book import hash_inputs
from mars_jax.job.job import Job
from mars_jax.job.programs import Program, covering_engine
from mars_jax.lanes.inputs import Hooks
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import Progress, best_adapters
from mars_jax.lanes.stopping import StoppingRule
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.search.finals import final_schedule, rates_of, warm_starts
from mars_jax.search.probes.design import planned_lanes
from mars_jax.search.probes.run import recorded_probes, run_probes
from mars_jax.search.trainer import Configuration, Curve


@dataclass(frozen=True)
class LaneTrainer:
    """Trains on the job's own base and data.

    Attributes:
        job: of the run.
        programs: of the probe phase, one of which may serve final runs.
        folder: where the state of final runs in progress is checkpointed, in a folder for each group.
        title: of the progress bar.
        padded: ranks that programs are planned for; None: those of the runs themselves.
        together: runs that programs are planned for; None: as many as are asked for. With both, runs that come in
            several groups share one program.
    """

    job: Job
    programs: Sequence[Program]
    folder: Path
    title: str
    padded: Ranks | None = None
    together: int | None = None

    def probe(self, configurations: Sequence[Ranks], sizes: Sequence[int]) -> list[LaneRecord]:
        """See `Trainer`. The lanes are those of the probe phase, which runs here if it has not."""
        if not (self.job.directory / files.LANES).exists():
            run_probes(self.job, planned_lanes(self.job.config), self.programs)
        return [
            record
            for record in recorded_probes(self.job)
            if record.num_samples in sizes and record.ranks in configurations
        ]

    def train(self, configurations: Sequence[Configuration], stopping: StoppingRule) -> list[Curve]:
        """See `Trainer`. All of them run as one group."""
        job, settings = self.job, self.job.config.finetune
        schedule = final_schedule(job.config, job.base.model_config.text.vocab_size, stopping)
        vectors = [configuration.ranks for configuration in configurations]
        lanes = [Lane(one.ranks, job.data.target_num_samples(), one.seed) for one in configurations]
        steps = stopping.lane_steps(len(lanes), schedule.horizon) // len(lanes)
        planned = [self.padded] * (self.together or len(vectors)) if self.padded else vectors
        engine = covering_engine(job, self.programs, planned, steps)
        starts, initial = warm_starts(job, engine, vectors)
        rates = [rates_of(job.config, configuration) for configuration in configurations]
        state = self.folder / hash_inputs(*(configuration.name for configuration in configurations))[:16]
        with (
            job.reporter.progress(self.title, len(lanes) * settings.steps, "lane-steps") as advance,
            Checkpoints(state, job.reporter.warn) as checkpoints,
            Interrupts() as interrupts,
        ):

            def report(progress: Progress) -> None:
                advance(progress.lane_steps, progress.text)

            # All read the data in the order of seed 0: restarts differ in their adapters alone.
            inputs = job.inputs.final_runs(replace(lanes[0], seed=0), engine, rates, initial)
            hooks = Hooks(checkpoints, interrupts=interrupts, advance=report)
            result = run_group(lanes, engine, inputs, schedule, hooks)
        return [
            Curve(
                configuration, tuple(result.points[k]), partial(best_adapters, engine, result, k, lanes[k]), starts[k]
            )
            for k, configuration in enumerate(configurations)
        ]
