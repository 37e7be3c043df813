"""The phase that measures base and result on the test split: perplexity, accuracy by every rule, tables by kind.

Perplexity is exp(sum of -log p / number of supervised tokens) over the corpus, float32. Accuracy is by log-likelihood:
of the closed set of answers (or a question's options), the one whose tokens (and end token) are likeliest given picture
and question. It needs no parsing, and is not comparable with accuracy of generated text, which is measured besides when
the config asks for it, by the rules of `scoring`.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mars_jax import lora
from mars_jax.data.batches import subset
from mars_jax.data.formats import PROMPTS
from mars_jax.data.records import Record
from mars_jax.evaluator import Evaluator, Outcome, candidate_answers, last_answer
from mars_jax.generation import load_end_tokens
from mars_jax.jsonfiles import append_jsonl, write_json
from mars_jax.rundir import RunDirectory
from mars_jax.scoring import is_right, macro_mean, mcnemar, read_answer, rules_of, share
from mars_jax.sharding import row_sharding
from mars_jax.workspace import Workspace

Tree = Any


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


def summary(records: Sequence[Record], outcomes: Mapping[str, Outcome], candidates: Sequence[str]) -> dict[str, Any]:
    """The document of an evaluation: what was asked, what each condition reached, in all and by kind of question.

    Args:
        records: the test samples.
        outcomes: condition -> outcome; `base` and `finetuned` are compared pair by pair.
        candidates: that the outcomes' choices are of.

    Returns:
        `conditions` by log-likelihood; and, as lists of rows, `generated` (by every rule for generated text),
        `by_tag` (by tag and rule), `macro_means` (MMStar's: means over the classes of a category, and over all) and
        `paired` (McNemar's test of the fine-tuned model and the base, by rule). Empty ones are left out.
    """
    right = {name: verdicts(records, outcome, candidates) for name, outcome in outcomes.items()}
    document: dict[str, Any] = {
        "split": "test",
        "num_samples": len(records),
        "prompt": " and ".join(sorted({PROMPTS.get(record.format, "the file's own") for record in records})),
        "conditions": {name: outcome.to_json() for name, outcome in outcomes.items()},
        "scoring": scoring_name(candidates) if candidates else None,
        "num_candidates": len(candidates),
    }
    lists = {
        "generated": list(_generated(records, outcomes, right)),
        "by_tag": list(_by_tag(records, right)),
        "macro_means": list(_macro_means(records, right)),
        "paired": [
            {"rule": rule, "first": "base", "second": "finetuned", **asdict(mcnemar(right["base"][rule], after))}
            for rule, after in right["finetuned"].items()
        ],
    }
    return document | {name: rows for name, rows in lists.items() if rows}


def verdicts(records: Sequence[Record], outcome: Outcome, candidates: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """What is right, bool [n], by every rule that the outcome allows: of choices, then of generated answers."""
    found = {scoring_name(candidates): outcome.correct} if candidates else {}
    if outcome.answers:
        for rule in rules_of(record.format for record in records):
            pairs = zip(records, outcome.answers, strict=True)
            found[rule] = np.asarray([is_right(rule, text, last_answer(r), r.options) for r, text in pairs])
    return found


def samples(
    records: Sequence[Record], outcomes: Mapping[str, Outcome], candidates: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A line for each test sample: what was asked, and of each condition its loss, its choice and its answer."""
    right = {name: verdicts(records, outcome, candidates) for name, outcome in outcomes.items()}
    for i, record in enumerate(records):
        line: dict[str, Any] = {
            "id": record.id,
            "split": "test",
            "format": record.format,
            "prompt": record.turns[-2].text,
            "target": last_answer(record),
            "tags": [f"{name}: {value}" for name, value in record.tags],
        }
        for name, outcome in outcomes.items():
            line[name] = {
                "loss": float(outcome.losses[i] / outcome.tokens[i]),
                "response": candidates[outcome.choices[i]] if candidates else None,
                "generated": outcome.answers[i] if outcome.answers else None,
                "right": {rule: bool(correct[i]) for rule, correct in right[name].items()},
            }
        yield line


def _generated(
    records: Sequence[Record], outcomes: Mapping[str, Outcome], right: Mapping[str, Mapping[str, NDArray[np.bool_]]]
) -> Iterator[dict[str, Any]]:
    for name, outcome in outcomes.items():
        if not outcome.answers:
            continue
        for rule in rules_of(record.format for record in records):
            pairs = zip(records, outcome.answers, strict=True)
            unread = sum(read_answer(rule, text, record.options) is None for record, text in pairs)
            yield {"condition": name, "rule": rule, **share(right[name][rule]), "unread": unread}


def _by_tag(
    records: Sequence[Record], right: Mapping[str, Mapping[str, NDArray[np.bool_]]]
) -> Iterator[dict[str, Any]]:
    for name, value in sorted({tag for record in records for tag in record.tags}):
        within = np.asarray([(name, value) in record.tags for record in records])
        for rule in right["finetuned"]:
            row: dict[str, Any] = {"tag": name, "value": value, "rule": rule, "num_samples": int(within.sum())}
            for condition, by_rule in right.items():
                told = share(by_rule[rule][within])
                row[condition] = told["accuracy"]
                if condition in ("base", "finetuned"):  # those of the controls follow from the number of samples
                    row[f"{condition}_ci"] = told["accuracy_ci"]
            yield row


def _macro_means(
    records: Sequence[Record], right: Mapping[str, Mapping[str, NDArray[np.bool_]]]
) -> Iterator[dict[str, Any]]:
    """A question counts for less where its class has many, so that every class weighs the same."""
    tags = [dict(record.tags) for record in records]
    if not all("l2_category" in of and "category" in of for of in tags):
        return
    classes = np.asarray([of["l2_category"] for of in tags])
    categories = np.asarray([of["category"] for of in tags])
    for category in [*sorted(set(categories)), "average"]:
        within = np.ones(len(tags), bool) if category == "average" else categories == category
        for rule in right["finetuned"]:
            means = {name: macro_mean(by_rule[rule][within], classes[within]) for name, by_rule in right.items()}
            yield {"category": str(category), "rule": rule, **means}


def scoring_name(candidates: Sequence[str]) -> str:
    """`letter_loglik` when every candidate is one capital letter, else `string_loglik`."""
    letters = all(answer in string.ascii_uppercase and len(answer) == 1 for answer in candidates)
    return "letter_loglik" if letters else "string_loglik"


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
