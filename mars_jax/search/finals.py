"""The final run: one lane with the picked ranks on the target number of samples, best checkpoint by validation loss.

It runs in the program of the probes if that costs less than compiling its own: padding is exact, only not free. A
sweep (`search.strategies.halving`) has made it already: final runs of several ranks, of which the best is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mars_jax.adapters.files import read_adapters, write_adapters
from mars_jax.adapters.targets import parameters_per_rank
from mars_jax.errors import NoValidResultError
from mars_jax.job.directory import RunDirectory
from mars_jax.job.programs import Program, covering_engine
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.engine import Engine
from mars_jax.lanes.lane import Lane
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.result import GroupResult, Rates, Row, best_adapters
from mars_jax.lanes.schedule import Schedule, warmup_multipliers
from mars_jax.lanes.stopping import Leaving, ceiling_of
from mars_jax.runtime.checkpoint import Checkpoints
from mars_jax.runtime.interrupts import Interrupts
from mars_jax.runtime.jsonfiles import append_jsonl, read_json, write_json
from mars_jax.runtime.sharding import batch_parts
from mars_jax.runtime.trees import flatten


def finetune(
    workspace: Workspace, programs: Sequence[Program], ranks: Mapping[str, int], directory: RunDirectory
) -> dict[str, Any]:
    """Runs, or goes on with, the final fine-tune, unless a sweep has left it; see `write_final` for what is there then.

    Args:
        workspace: of the run.
        programs: of the probe phase, one of which may serve.
        ranks: module -> rank.
        directory: the state is checkpointed in a folder for each lane, so that another pick starts anew.

    Returns:
        The outcome, also written as summary.json.

    Raises:
        NoValidResultError: the loss was not finite, or exploded.
    """
    if directory.finetune_summary_file.exists():
        summary = read_json(directory.finetune_summary_file)
        if summary.get("from_sweep") and summary["ranks"] == ranks:
            workspace.reporter.notice("finetune: the run of the sweep that ended best is the final run")
            return summary
    settings = workspace.config.finetune
    lane = Lane(ranks, workspace.target_num_samples(), seed=0)
    engine = covering_engine(workspace, programs, [ranks], settings.steps)
    rates = workspace.learning_rates(settings.learning_rate)
    starts, initial = starts_of(workspace, engine, [ranks], directory)
    with (
        Checkpoints(directory.finetune_checkpoints / lane.name, workspace.reporter.warn) as checkpoints,
        workspace.reporter.progress("fine-tune", settings.steps, "steps") as advance,
        Interrupts() as interrupts,
    ):
        result = run_finals(
            workspace,
            engine,
            [lane],
            rates,
            checkpoints=checkpoints,
            initial=initial,
            interrupts=interrupts,
            advance=lambda progress: advance(progress.lane_steps, progress.text),
        )
    (rows,) = result.rows
    if not rows[-1]["alive"]:
        raise NoValidResultError(
            f"the final run with ranks {dict(ranks)} diverged by step {rows[-1]['step']}: {rows[-1]['reason']}. Lower "
            f"finetune.learning_rate (now {rates})."
        )
    return write_final(workspace, directory, engine, result, 0, lane, starts[0], from_sweep=False)


def write_final(
    workspace: Workspace,
    directory: RunDirectory,
    engine: Engine,
    result: GroupResult,
    k: int,
    lane: Lane,
    start: str | None,
    *,
    from_sweep: bool,
) -> dict[str, Any]:
    """Keeps a lane as the final run: adapters at its lowest validation loss, metrics.jsonl (a look each), summary.json.

    Args:
        workspace: of the run.
        directory: of the run.
        engine: that ran it.
        result: of its group.
        k: its place there.
        lane: its ranks and number of samples.
        start: the probe that it started from, if any.
        from_sweep: whether it was picked from several.

    Returns:
        The summary.
    """
    settings, rows = workspace.config.finetune, result.rows[k]
    rates = workspace.learning_rates(settings.learning_rate)
    best = min(rows, key=lambda row: row["validation_loss"])
    if best["step"] == 0:
        workspace.reporter.warn(
            f"the final run never came below the validation loss that it started from ({best['validation_loss']:.4f} "
            f"nats), so it changed nothing. Lower finetune.learning_rate (now {rates}) or raise finetune.steps."
        )
    write_adapters(directory.finetune_adapters_file, best_adapters(engine, result, k, lane))
    _write_metrics(directory, rows, final_schedule(workspace).multipliers, rates)
    summary = {
        "steps": settings.steps,
        "best_step": best["step"],
        "best_validation_loss": best["validation_loss"],
        "ranks": dict(lane.ranks),
        "num_samples": lane.num_samples,
        "learning_rate": rates,
        "parameters": sum(lane.ranks[m] * n for m, n in parameters_per_rank(workspace.targets).items()),
        "warm_start": start,
        "from_sweep": from_sweep,
    }
    write_json(directory.finetune_summary_file, summary)
    return summary


def run_finals(
    workspace: Workspace,
    engine: Engine,
    lanes: Sequence[Lane],
    rates: Rates | Sequence[Rates],
    *,
    schedule: Schedule | None = None,
    **options: Any,
) -> GroupResult:
    """Runs lanes of the target D as final runs; `options` are others of `run_group`."""
    settings = workspace.config.finetune
    return run_group(
        lanes,
        engine,
        workspace.base_on(engine.mesh),
        workspace.stream(lanes[0], settings.batch_size, batch_parts(engine.mesh)),
        workspace.validation_batches(settings.batch_size),
        rates,
        schedule or final_schedule(workspace),
        look_batches=workspace.look_batches(settings.validation_samples, settings.batch_size),
        **options,
    )


def final_schedule(workspace: Workspace) -> Schedule:
    """Steps, looks and learning-rate factors of a final run."""
    settings = workspace.config.finetune
    return Schedule(
        warmup_multipliers(settings.steps, settings.warmup_steps, settings.schedule),
        sorted({*range(0, settings.steps, settings.look_every), settings.steps}),
        looks_per_doubling=0,
        chunk_steps=workspace.config.probe.chunk_steps,
        leaving=Leaving(ceiling=ceiling_of(workspace.model_config.text.vocab_size)),
    )


def starts_of(
    workspace: Workspace, engine: Engine, vectors: Sequence[Mapping[str, int]], directory: RunDirectory
) -> tuple[list[str | None], dict[int, np.ndarray]]:
    """The probe that each final run starts from, where the config asks for it; and `initial` of `run_group`."""
    if not workspace.config.finetune.warm_start:
        return [None] * len(vectors), {}
    probes = [_probe_to_start_from(workspace, ranks, directory) for ranks in vectors]
    return probes, {k: _initial(engine, directory, probe) for k, probe in enumerate(probes) if probe}


def _probe_to_start_from(workspace: Workspace, ranks: Mapping[str, int], directory: RunDirectory) -> str | None:
    """The probe with these ranks, the largest D and seed 0."""
    config = workspace.config
    probe = Lane(ranks, max(config.probe.num_samples), seed=0).name
    if directory.probe_adapters(probe).exists():
        workspace.reporter.notice(f"finetune: starts from probe {probe}")
        return probe
    workspace.reporter.warn(f"no probe has the picked ranks ({probe}), so the final run starts from a fresh draw")
    return None


def _initial(engine: Engine, directory: RunDirectory, probe: str) -> np.ndarray:
    """Adapters of a probe as the engine's vector [P], padded with zeros."""
    flat = flatten(read_adapters(directory.probe_adapters(probe)))
    leaves = []
    for path, shape in engine.layout.shapes.items():
        leaf = np.asarray(flat.get(path, np.zeros([0] * len(shape), np.float32)))
        leaves.append(np.pad(leaf, [(0, size - have) for size, have in zip(shape, leaf.shape, strict=True)]).ravel())
    return np.concatenate(leaves)


def _write_metrics(
    directory: RunDirectory, rows: Sequence[Row], multipliers: np.ndarray, rates: Mapping[str, float]
) -> None:
    directory.finetune_metrics_file.unlink(missing_ok=True)
    for row in rows:
        learning_rate = {m: rate * float(multipliers[max(row["step"], 1) - 1]) for m, rate in rates.items()}
        metric = {name: row[name] for name in ("step", "train_loss", "validation_loss", "update_norm")}
        append_jsonl(directory.finetune_metrics_file, metric | {"learning_rate": learning_rate})
