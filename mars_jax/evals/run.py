"""The evaluation of a run: base and fine-tuned model on the test split, with controls."""

from typing import Any

import jax
import jax.numpy as jnp

from mars_jax.adapters import lora
from mars_jax.data.batches import subset
from mars_jax.data.records import Record
from mars_jax.evals.evaluator import Evaluator, candidate_answers, last_answer
from mars_jax.evals.generation import load_end_tokens
from mars_jax.evals.summary import samples, summary
from mars_jax.job.directory import RunDirectory
from mars_jax.job.workspace import Workspace
from mars_jax.runtime.jsonfiles import append_jsonl, write_json
from mars_jax.runtime.sharding import row_sharding
from mars_jax.runtime.trees import Tree


def evaluate_run(workspace: Workspace, adapters: Tree, directory: RunDirectory) -> dict[str, Any]:
    """Base and fine-tuned model on the test split; also one line a sample."""
    settings = workspace.config.evaluate
    evaluator, records = held_out_evaluator(
        workspace, controls=settings.controls, max_new_tokens=settings.max_new_tokens
    )
    candidates = evaluator.candidates
    trainable, scales = lora.split_trainable(adapters)
    untrained = lora.join_trainable(jax.tree.map(jnp.zeros_like, trainable), scales)
    with workspace.reporter.progress("evaluate", evaluator.num_reads, "samples") as advance:
        outcomes = evaluator.evaluate({"base": untrained, "finetuned": adapters}, advance)
    document = summary(records, outcomes, candidates)
    directory.samples_file.unlink(missing_ok=True)
    for line in samples(records, outcomes, candidates):
        append_jsonl(directory.samples_file, line)
    write_json(directory.evaluation_file, document)
    return document


def held_out_evaluator(
    workspace: Workspace, *, controls: bool, max_new_tokens: int | None = None
) -> tuple[Evaluator, list[Record]]:
    """The evaluator of the test samples that a config asks for, and those samples."""
    settings = workspace.config.evaluate
    every = workspace.test_records
    # At random: files are often sorted by kind.
    chosen = subset(len(every), min(settings.max_samples or len(every), len(every)), workspace.config.seed)
    records = [every[i] for i in sorted(chosen)]
    # Options belong to the question, so those of the test samples may be known.
    known = [*workspace.search.train, *(record for record in records if record.options)]
    candidates = candidate_answers(known, settings.max_candidates)
    if not candidates:
        workspace.reporter.warn(
            f"answers are not scored: the training split has more than {settings.max_candidates} distinct answers "
            f"(evaluate.max_candidates). Perplexity is measured all the same, and evaluate.max_new_tokens has answers "
            f"written and read."
        )
    strange = [record.id for record in records if candidates and last_answer(record) not in candidates]
    if strange:
        workspace.reporter.warn(
            f"{len(strange)} of {len(records)} test answers are not among the {len(candidates)} of the training split "
            f"and count as wrong: {', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}"
        )
    evaluator = Evaluator(
        workspace.model,
        workspace.base,
        records,
        workspace.preprocessor,
        candidates=candidates,
        batch_size=settings.batch_size,
        controls=controls,
        seed=workspace.config.seed,
        rows=row_sharding(workspace.mesh),
        max_new_tokens=max_new_tokens,
        end_tokens=load_end_tokens(workspace.checkpoint, workspace.preprocessor.tokenizer),
    )
    return evaluator, records
