"""The phase `evaluate`: base and fine-tuned model on the test split, with controls."""

import jax

from mars_jax.adapters.files import read_adapters
from mars_jax.adapters.tree import init_adapters, kernels_of
from mars_jax.config.load import Config
from mars_jax.data.batches import subset
from mars_jax.data.records import Record
from mars_jax.evals.evaluator import Evaluator, EvaluatorSettings, candidate_answers, last_answer
from mars_jax.evals.summary import samples, summary
from mars_jax.hub.end_tokens import load_end_tokens
from mars_jax.job import files
from mars_jax.job.base import JobBase
from mars_jax.job.checks import check_there
from mars_jax.job.data import JobData
from mars_jax.job.job import Job
from mars_jax.job.phase import Inputs, Phase, files_of, sections, sources_of
from mars_jax.runtime.jsonfiles import Document, write_json, write_jsonl
from mars_jax.runtime.progress import Reporter
from mars_jax.runtime.sharding import row_sharding


def _inputs(job: Job) -> Inputs:
    for file in (files.SUMMARY, files.ADAPTERS):
        check_there(job.directory / file, "finetune")
    made = files_of(job, files.SUMMARY, files.ADAPTERS)
    return {**made, **sources_of(job), **sections(job.config, "evaluate", "seed", "data", "model", "lora", "adapter")}


def _work(job: Job) -> Document:
    settings = job.config.evaluate
    evaluator, records = held_out_evaluator(
        job.config,
        job.reporter,
        job.base,
        job.data,
        controls=settings.controls,
        max_new_tokens=settings.max_new_tokens,
    )
    method, targets = job.base.method, job.base.targets
    ranks = job.directory.read(files.SUMMARY)["ranks"]
    # Fresh adapters change nothing, and share the compiled program of trained ones.
    kernels = kernels_of(job.base.params, targets)
    fresh = init_adapters(jax.random.key(0), targets, ranks, method, kernels=kernels)
    adapters = read_adapters(job.directory / files.ADAPTERS)
    models = {"base": {method.name: fresh}, "finetuned": {method.name: adapters}}
    with job.reporter.progress("evaluate", evaluator.num_reads, "samples") as advance:
        outcomes = evaluator.evaluate(models, advance)
    document = summary(records, outcomes, evaluator.candidates)
    write_jsonl(job.directory / files.SAMPLES, samples(records, outcomes, evaluator.candidates))
    write_json(job.directory / files.EVALUATION, document)
    return document


EVALUATE = Phase("evaluate", _inputs, (files.EVALUATION, files.SAMPLES), _work)


def held_out_evaluator(
    config: Config,
    reporter: Reporter,
    base: JobBase,
    data: JobData,
    *,
    controls: bool,
    max_new_tokens: int | None = None,
) -> tuple[Evaluator, list[Record]]:
    """The evaluator of the test samples of a job, and these samples.

    Args:
        config: configuration of the job.
        reporter: receives warnings about answers that cannot be scored.
        base: base model of the job.
        data: data of the job.
        controls: whether to score also without pictures and with the pictures of other samples.
        max_new_tokens: limit of tokens of a generated answer; None: no answers are generated.
    """
    settings = config.evaluate
    test_records = data.test_records
    # A random subset, because files are often sorted by category.
    num_samples = min(settings.max_samples or len(test_records), len(test_records))
    records = [test_records[i] for i in sorted(subset(len(test_records), num_samples, config.seed))]
    # Options are part of the question, so those of test samples may be used.
    known = [*data.search.train, *(record for record in records if record.options)]
    candidates = candidate_answers(known, settings.max_candidates)
    if not candidates:
        reporter.warn(
            f"answers are not scored: the training split has more than {settings.max_candidates} distinct answers "
            f"(evaluate.max_candidates). Perplexity is still measured; set evaluate.max_new_tokens to score "
            f"generated answers."
        )
    unknown = [record.id for record in records if candidates and last_answer(record) not in candidates]
    if unknown:
        reporter.warn(
            f"{len(unknown)} of {len(records)} test answers are not among the {len(candidates)} of the training split "
            f"and count as wrong: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
        )
    measured = EvaluatorSettings(
        batch_size=settings.batch_size,
        candidates=candidates,
        controls=controls,
        seed=config.seed,
        max_new_tokens=max_new_tokens,
        end_tokens=load_end_tokens(base.checkpoint, data.preprocessor.tokenizer),
    )
    evaluator = Evaluator(base.model, base.params, records, data.preprocessor, measured, row_sharding(base.mesh))
    return evaluator, records
