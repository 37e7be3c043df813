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

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.formats.base import PROMPTS
from mars_jax.data.records import Record
from mars_jax.evals.evaluator import Outcome, last_answer
from mars_jax.evals.rules import is_right, read_answer, rules_of
from mars_jax.evals.stats import macro_mean, mcnemar, share


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
