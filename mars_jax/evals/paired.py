"""Paired comparison of two evaluated runs on their common test samples, from files alone."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mars_jax.errors import ConfigError, DataError
from mars_jax.evals.stats import mcnemar, share
from mars_jax.job import files
from mars_jax.job.documents import SHAPES
from mars_jax.runtime.jsonfiles import Document, read_jsonl

_CONDITION = "finetuned"


def difference(first: Path, second: Path, warn: Callable[[str], None]) -> Document:
    """Compares the fine-tuned models of two runs on the same samples.

    Args:
        first: samples.jsonl of the first run.
        second: samples.jsonl of the second run.
        warn: receives a message about samples that only one run has.

    Returns:
        `num_samples`: common samples; `loss`: the mean over samples for each run (nats per token), and the mean
        difference (second - first) with its 95 % normal interval; `accuracy`: a row for each rule that scored both
        runs, with Wilson intervals and McNemar's exact test.

    Raises:
        ConfigError: a run is not evaluated, or the two have no sample in common.
        DataError: samples with the same id differ in prompt or target.
    """
    first_samples, second_samples = (_samples(path, warn) for path in (first, second))
    common = [name for name in first_samples if name in second_samples]
    if not common:
        raise ConfigError(
            f"{first} and {second} have no sample in common, so nothing can be compared. Evaluate both on the same "
            "test split, with the same evaluate.max_samples and seed."
        )
    for path, samples in ((first, first_samples), (second, second_samples)):
        if len(samples) > len(common):
            warn(f"{len(samples) - len(common)} of {len(samples)} samples of {path} are not in the other, left out")
    for name in common:
        for what in ("prompt", "target"):
            if first_samples[name][what] != second_samples[name][what]:
                raise DataError(
                    f"sample {name!r} has the {what} {first_samples[name][what]!r} in {first} and "
                    f"{second_samples[name][what]!r} in {second}. Evaluate both on the same data."
                )
    pairs = [(first_samples[name][_CONDITION], second_samples[name][_CONDITION]) for name in common]
    losses = np.asarray([[one["loss"], other["loss"]] for one, other in pairs])
    differences = losses[:, 1] - losses[:, 0]
    half = 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5 if len(differences) > 1 else None
    mean = float(differences.mean())
    rules = [rule for rule in pairs[0][0]["right"] if all(rule in side["right"] for pair in pairs for side in pair)]
    return {
        "num_samples": len(common),
        "loss": {
            "first": float(losses[:, 0].mean()),
            "second": float(losses[:, 1].mean()),
            "difference": mean,
            "difference_ci": None if half is None else [mean - half, mean + half],
        },
        "accuracy": [_accuracy(rule, pairs) for rule in rules],
    }


def _samples(path: Path, warn: Callable[[str], None]) -> dict[str, Document]:
    samples = {sample["id"]: sample for sample in read_jsonl(path, warn, SHAPES[files.SAMPLES])}
    if not samples:
        raise ConfigError(f"{path} is missing: run `mars evaluate {path.parent}` first.")
    return samples


def _accuracy(rule: str, pairs: list[tuple[Document, Document]]) -> Document:
    first, second = (np.asarray([pair[index]["right"][rule] for pair in pairs]) for index in (0, 1))
    one, other = share(first), share(second)
    return {
        "rule": rule,
        "first": one["accuracy"],
        "first_ci": one["accuracy_ci"],
        "second": other["accuracy"],
        "second_ci": other["accuracy_ci"],
        **asdict(mcnemar(first, second)),
    }
