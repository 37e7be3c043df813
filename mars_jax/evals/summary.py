"""Summary of an evaluation on the test split: perplexity, accuracy by every rule, tables by category of question.

Perplexity is exp(sum of -log p / number of supervised tokens) over the corpus, float32. Accuracy is by log-likelihood:
among the closed set of answers (or a question's options), the choice is the one whose tokens and end token are
likeliest given picture and question. It needs no parsing, and is not comparable with accuracy of generated text, which
is measured by the rules of `rules` if the configuration sets evaluate.max_new_tokens.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.formats.registry import FORMATS
from mars_jax.data.records import Record
from mars_jax.evals.evaluator import Outcome, last_answer
from mars_jax.evals.rules import is_right, read_answer, rules_of
from mars_jax.evals.stats import macro_mean, mcnemar, share

Verdicts = Mapping[str, Mapping[str, NDArray[np.bool_]]]
"""Condition -> rule -> whether each of the n answers is right, bool [n]."""


def summary(records: Sequence[Record], outcomes: Mapping[str, Outcome], candidates: Sequence[str]) -> dict[str, object]:
    """The contents of evaluation.json: the prompt, and the results of each condition, overall and by category.

    Args:
        records: the n test samples.
        outcomes: condition -> outcome; `base` and `finetuned` are compared pair by pair.
        candidates: the answers that the outcomes' choices index; empty if choices were not scored.

    Returns:
        `conditions` by log-likelihood; and, as lists of rows, `generated` (accuracy of generated text by rule),
        `by_tag` (accuracy by tag and rule), `macro_means` (if all samples are tagged with `category` and `l2_category`,
        as in MMStar: means over the classes of each category, and over all classes) and `paired` (McNemar's test of the
        fine-tuned model against the base, by rule). Empty lists are omitted.
    """
    right = {name: verdicts(records, outcome, candidates) for name, outcome in outcomes.items()}
    document: dict[str, object] = {
        "split": "test",
        "num_samples": len(records),
        "prompt": " and ".join(sorted({FORMATS[record.format].prompt for record in records})),
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
    """Whether each answer is right, bool [n], by rule: first that of the choices, then those of generated answers.

    Args:
        records: the n test samples.
        outcome: of one condition; rules for measurements that it lacks are omitted.
        candidates: the answers that its choices index.
    """
    right = {scoring_name(candidates): outcome.correct} if candidates else {}
    if outcome.answers:
        for rule in rules_of(record.format for record in records):
            pairs = zip(records, outcome.answers, strict=True)
            right[rule] = np.asarray([is_right(rule, text, last_answer(r), r.options) for r, text in pairs])
    return right


def samples(
    records: Sequence[Record], outcomes: Mapping[str, Outcome], candidates: Sequence[str]
) -> Iterator[dict[str, object]]:
    """The lines of samples.jsonl: each question, and the loss, choice and generated answer of each condition.

    Args:
        records: the n test samples.
        outcomes: condition -> outcome.
        candidates: the answers that the outcomes' choices index.
    """
    right = {name: verdicts(records, outcome, candidates) for name, outcome in outcomes.items()}
    for i, record in enumerate(records):
        line: dict[str, object] = {
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
    records: Sequence[Record], outcomes: Mapping[str, Outcome], right: Verdicts
) -> Iterator[dict[str, object]]:
    for name, outcome in outcomes.items():
        if not outcome.answers:
            continue
        for rule in rules_of(record.format for record in records):
            pairs = zip(records, outcome.answers, strict=True)
            unread = sum(read_answer(rule, text, record.options) is None for record, text in pairs)
            yield {"condition": name, "rule": rule, **share(right[name][rule]), "unread": unread}


def _by_tag(records: Sequence[Record], right: Verdicts) -> Iterator[dict[str, object]]:
    for name, value in sorted({tag for record in records for tag in record.tags}):
        within = np.asarray([(name, value) in record.tags for record in records])
        for rule in right["finetuned"]:
            row: dict[str, object] = {"tag": name, "value": value, "rule": rule, "num_samples": int(within.sum())}
            for condition, by_rule in right.items():
                result = share(by_rule[rule][within])
                row[condition] = result["accuracy"]
                if condition in ("base", "finetuned"):  # intervals of controls follow from the number of samples
                    row[f"{condition}_ci"] = result["accuracy_ci"]
            yield row


def _macro_means(records: Sequence[Record], right: Verdicts) -> Iterator[dict[str, object]]:
    """Means over the classes of each category, with equal weight for every class."""
    tags = [dict(record.tags) for record in records]
    if not all("l2_category" in sample and "category" in sample for sample in tags):
        return
    classes = np.asarray([sample["l2_category"] for sample in tags])
    categories = np.asarray([sample["category"] for sample in tags])
    for category in [*sorted(set(categories)), "average"]:
        within = np.ones(len(tags), bool) if category == "average" else categories == category
        for rule in right["finetuned"]:
            means = {name: macro_mean(by_rule[rule][within], classes[within]) for name, by_rule in right.items()}
            yield {"category": str(category), "rule": rule, **means}


def scoring_name(candidates: Sequence[str]) -> str:
    """Name of the log-likelihood rule: `letter_loglik` if all candidates are capital letters, else `string_loglik`."""
    letters = all(answer in string.ascii_uppercase and len(answer) == 1 for answer in candidates)
    return "letter_loglik" if letters else "string_loglik"
