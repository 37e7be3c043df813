"""The final run: its schedule, the probe it may start from, and what is kept of it.

A strategy may have trained it already (sweep/final.json); otherwise the picked ranks are trained here. It runs in the
program of the probes if that costs less than compiling its own: padding is exact, only not free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mars_jax.adapters.files import read_adapters, write_adapters
from mars_jax.config.load import Config
from mars_jax.job import files
from mars_jax.job.job import Job
from mars_jax.job.phase import sections
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.inputs import Rates
from mars_jax.lanes.lane import Lane, Ranks
from mars_jax.lanes.schedule import Schedule, warmup_multipliers
from mars_jax.lanes.stopping import Patience, StoppingRule, loss_ceiling
from mars_jax.runtime.jsonfiles import Document, write_json, write_jsonl
from mars_jax.runtime.trees import Tree
from mars_jax.search.trainer import Configuration, Curve

FINAL_SETTINGS = ("seed", "finetune", "optimizer", "data", "model", "lora", "adapter")
"""Sections of the config that a final run of given ranks depends on."""


@dataclass(frozen=True)
class FinalRun:
    """A final run that came to its end; its adapters lie in a file beside.

    Attributes:
        ranks: module -> rank, 0 where the module is frozen.
        num_samples: D.
        learning_rate: module -> learning rate.
        points: its eval points.
        warm_start: name of the probe that it started from, if any.
        seed: added to the config's for the draw of the adapters.
    """

    ranks: Ranks
    num_samples: int
    learning_rate: Rates
    points: tuple[EvalPoint, ...]
    warm_start: str | None
    seed: int = 0

    def to_json(self) -> Document:
        """The run in the document sweep/final.json."""
        return {
            "ranks": dict(self.ranks),
            "num_samples": self.num_samples,
            "learning_rate": dict(self.learning_rate),
            "warm_start": self.warm_start,
            "points": [point.to_json() for point in self.points],
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, document: Document) -> "FinalRun":
        """The inverse of `to_json`."""
        points = tuple(EvalPoint.from_json(point) for point in document["points"])
        known = {name: document[name] for name in cls.__dataclass_fields__ if name in document}
        return cls(**known | {"points": points})


def rates_of(config: Config, configuration: Configuration) -> dict[str, float]:
    """Module -> learning rate of a final run."""
    rates = config.learning_rates(config.finetune.learning_rate)
    return {module: rate * configuration.factors.get(module, 1.0) for module, rate in rates.items()}


def final_schedule(config: Config, vocabulary: int, stopping: StoppingRule | None = None) -> Schedule:
    """Steps, eval points and learning-rate factors of final runs.

    Args:
        config: of the job.
        vocabulary: tokens of the model.
        stopping: what ends runs before the last step; None: divergence alone.
    """
    settings = config.finetune
    stopping = stopping or Patience()
    return Schedule(
        warmup_multipliers(settings.steps, settings.warmup_steps, settings.schedule),
        sorted({*settings.eval_steps, *stopping.eval_steps}),
        per_doubling=0,
        chunk_steps=config.probe.chunk_steps,
        stopping=stopping,
        ceiling=loss_ceiling(vocabulary),
        averaging=settings.averaging,
        keeps_sample_losses=stopping.needs_sample_losses,
    )


def final_run(job: Job, curve: Curve) -> FinalRun:
    """The final run of a curve."""
    return FinalRun(
        curve.configuration.ranks,
        job.data.target_num_samples(),
        rates_of(job.config, curve.configuration),
        curve.points,
        curve.start,
        curve.configuration.seed,
    )


def leave_final_run(job: Job, curve: Curve) -> None:
    """Keeps a strategy's final run for the finetune phase."""
    write_adapters(job.directory / files.FINAL_ADAPTERS, adapters_of(curve))
    document = final_run(job, curve).to_json()
    write_json(job.directory / files.FINAL_RUN, {"settings": settings_of(job.config), "run": document})


def left_final_run(job: Job, configuration: Configuration) -> tuple[FinalRun, Tree] | None:
    """The final run that the strategy left and its adapters, if it is of this configuration and today's settings."""
    file = job.directory / files.FINAL_RUN
    if not file.exists():
        return None
    document = job.directory.read(files.FINAL_RUN)
    run = FinalRun.from_json(document["run"])
    wanted = (configuration.ranks, rates_of(job.config, configuration), configuration.seed)
    if (run.ranks, run.learning_rate, run.seed) != wanted or document["settings"] != settings_of(job.config):
        return None
    return run, read_adapters(job.directory / files.FINAL_ADAPTERS)


def settings_of(config: Config) -> str:
    """The text of `FINAL_SETTINGS`, by which a final run that was kept is known."""
    return repr(sections(config, *FINAL_SETTINGS))


def adapters_of(curve: Curve) -> Tree:
    """The adapters of a curve that was trained here, at the lowest validation loss."""
    if curve.adapters is None:
        raise ValueError(f"the final run {curve.configuration.name} is a recorded curve, which has no adapters.")
    return curve.adapters()


def write_final(job: Job, run: FinalRun, adapters: Tree, *, from_sweep: bool) -> Document:
    """Writes the finetune phase's files: adapters at the lowest validation loss, metrics.jsonl, summary.json.

    Args:
        job: of the run.
        run: the final run.
        adapters: its adapters at the lowest validation loss.
        from_sweep: whether a strategy trained it beside others.

    Returns:
        The summary.
    """
    config, directory = job.config, job.directory
    best = min(run.points, key=lambda point: point.validation_loss)
    if best.step == 0:
        job.reporter.warn(
            f"the final run never came below the validation loss that it started from ({best.validation_loss:.4f} "
            f"nats), so it changed nothing. Lower finetune.learning_rate (now {dict(run.learning_rate)}) or raise "
            "finetune.steps."
        )
    write_adapters(directory / files.ADAPTERS, adapters)
    multipliers = final_schedule(config, job.base.model_config.text.vocab_size).multipliers
    _write_metrics(directory / files.METRICS, run.points, multipliers, run.learning_rate)
    summary: Document = {
        "steps": config.finetune.steps,
        "best_step": best.step,
        "best_validation_loss": best.validation_loss,
        "ranks": dict(run.ranks),
        "num_samples": run.num_samples,
        "learning_rate": dict(run.learning_rate),
        "parameters": job.base.num_trained(run.ranks),
        "warm_start": run.warm_start,
        "from_sweep": from_sweep,
    }
    write_json(directory / files.SUMMARY, summary)
    return summary


def warm_starts(job: Job, engine: Engine, vectors: Sequence[Ranks]) -> tuple[list[str | None], dict[int, np.ndarray]]:
    """The probe that each final run starts from, where the config asks for it; and `LaneInputs.initial`."""
    if not job.config.finetune.warm_start:
        return [None] * len(vectors), {}
    probes = [_probe_to_start_from(job, ranks) for ranks in vectors]
    initial = {
        k: engine.layout.padded_vector(read_adapters(job.directory / files.probe_adapters(probe)))
        for k, probe in enumerate(probes)
        if probe
    }
    return probes, initial


def _probe_to_start_from(job: Job, ranks: Ranks) -> str | None:
    """The probe with these ranks, the largest D and seed 0."""
    probe = Lane(ranks, max(job.config.probe.num_samples), seed=0).name
    if (job.directory / files.probe_adapters(probe)).exists():
        job.reporter.notice(f"finetune: starts from probe {probe}")
        return probe
    job.reporter.warn(f"no probe has the picked ranks ({probe}), so the final run starts from a fresh draw")
    return None


def _write_metrics(
    file: Path, points: Sequence[EvalPoint], multipliers: np.ndarray, rates: Mapping[str, float]
) -> None:
    def metric(point: EvalPoint) -> Document:
        return {
            "step": point.step,
            "train_loss": point.train_loss,
            "validation_loss": point.validation_loss,
            "update_norm": dict(point.update_norm),
            "learning_rate": {m: rate * float(multipliers[max(point.step, 1) - 1]) for m, rate in rates.items()},
        }

    write_jsonl(file, map(metric, points))
