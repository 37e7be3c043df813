"""The final run: one lane with the picked ranks on the target number of samples, best checkpoint by validation loss.

It runs in the program of the local sweep, padded to the largest ranks of the grid: exact all the same, and nothing new
to compile.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mars_jax import lora
from mars_jax.checkpoint import Checkpoints
from mars_jax.errors import NoValidResultError
from mars_jax.jsonfiles import append_jsonl, write_json
from mars_jax.probe.loop import Schedule, run_group, warmup_multipliers
from mars_jax.probe.plan import Lane
from mars_jax.workspace import Workspace

Tree = Any


def finetune(
    workspace: Workspace, ranks: Mapping[str, int], checkpoint_directory: Path, metrics_file: Path, summary_file: Path
) -> dict[str, Any]:
    """Runs, or goes on with, the final fine-tune.

    Args:
        workspace: of the run.
        ranks: module -> rank.
        checkpoint_directory: holds the state, in a folder for each lane, so that another pick starts anew; the best
            adapters are read back from it by `best_adapters`.
        metrics_file: one record a look.
        summary_file: the outcome, also returned.

    Raises:
        NoValidResultError: the loss was not finite.
    """
    settings = workspace.config.finetune
    lane = _lane(workspace, ranks)
    looks = sorted({*range(0, settings.steps, settings.look_every), settings.steps})
    multipliers = warmup_multipliers(settings.steps, settings.warmup_steps, settings.schedule)
    rates = workspace.learning_rates(settings.learning_rate)
    with (
        Checkpoints(checkpoint_directory / lane.name) as checkpoints,
        workspace.reporter.progress("fine-tune", settings.steps, "steps") as advance,
    ):
        result = run_group(
            [lane],
            workspace.probe_engine,
            workspace.base,
            lambda lane: workspace.stream(lane, settings.batch_size),
            workspace.validation_batches(None, settings.batch_size),
            rates,
            Schedule(multipliers, looks, looks_per_doubling=0, chunk_steps=workspace.config.probe.chunk_steps),
            checkpoints=checkpoints,
            advance=advance,
        )
        (rows,) = result.rows
        if not rows[-1]["alive"]:
            raise NoValidResultError(
                f"the final run with ranks {dict(ranks)} diverged: its loss was not finite by step "
                f"{next(row['step'] for row in rows if not row['alive'])}. Lower finetune.learning_rate (now {rates})."
            )
        checkpoints.save(settings.steps, result.state, {"lanes": [lane.name], "rows": result.rows})
    best_step = int(result.state.best_step[0])
    if best_step == 0:
        workspace.reporter.warn(
            f"the final run never came below the base's validation loss ({rows[0]['validation_loss']:.4f} nats), so "
            f"the adapters change nothing. Lower finetune.learning_rate (now {rates}) or raise finetune.steps."
        )
    metrics_file.unlink(missing_ok=True)
    for row in rows:
        learning_rate = {m: rate * float(multipliers[max(row["step"], 1) - 1]) for m, rate in rates.items()}
        metric = {name: row[name] for name in ("step", "train_loss", "validation_loss", "update_norm")}
        append_jsonl(metrics_file, metric | {"learning_rate": learning_rate})
    summary = {
        "steps": settings.steps,
        "best_step": best_step,
        "best_validation_loss": float(result.state.best_loss[0]),
        "ranks": dict(ranks),
        "num_samples": lane.num_samples,
        "learning_rate": rates,
        "parameters": sum(ranks[m] * n for m, n in lora.parameters_per_rank(workspace.targets).items()),
    }
    write_json(summary_file, summary)
    return summary


def best_adapters(workspace: Workspace, ranks: Mapping[str, int], checkpoint_directory: Path) -> Tree:
    """The adapters at the best validation loss of a finished run, unpadded."""
    folder = checkpoint_directory / _lane(workspace, ranks).name
    engine = workspace.probe_engine
    ones = jax.numpy.ones(1, jax.numpy.int32)
    rates = {module: ones.astype(jax.numpy.float32) for module in ranks}
    abstract = jax.eval_shape(engine.init, ones, {module: ones for module in ranks}, rates)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(abstract)
    if found is None:
        raise NoValidResultError(f"{folder} holds no checkpoint. Run `mars finetune` again.")
    state = jax.tree.map(lambda leaf: leaf[0], found[1])
    return lora.trim(lora.join_trainable(state.best, state.scales), workspace.targets, ranks)


def _lane(workspace: Workspace, ranks: Mapping[str, int]) -> Lane:
    return Lane(ranks, workspace.target_num_samples(), seed=0)
