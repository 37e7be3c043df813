"""Two finished runs, compared sample by sample on the test samples that both have. Nothing is run again here."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mars_jax.errors import ConfigError, DataError
from mars_jax.evals.stats import mcnemar, share
from mars_jax.runtime.jsonfiles import read_jsonl

_CONDITION = "finetuned"


def difference(first: Path, second: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The fine-tuned models of two runs on the same questions.

    Args:
        first: its samples, from `RunDirectory.samples_file`.
        second: those of the other.
        warn: told of samples that only one of them has.

    Returns:
        `loss`: the mean over samples of each (nats a token), and of their differences (second - first) with the 95 %
        interval of that mean; `accuracy`: a row for each rule that both were scored by, with Wilson intervals and
        McNemar's exact test.

    Raises:
        ConfigError: a run isn't evaluated, or the two have no sample in common.
        DataError: a sample of one id isn't the same question in both.
    """
    ours, theirs = (_samples(path, warn) for path in (first, second))
    common = [name for name in ours if name in theirs]
    if not common:
        raise ConfigError(
            f"{first} and {second} have no sample in common, so nothing can be compared. Evaluate both on the same "
            "test split, with the same evaluate.max_samples and seed."
        )
    for path, samples in ((first, ours), (second, theirs)):
        if len(samples) > len(common):
            warn(f"{len(samples) - len(common)} of {len(samples)} samples of {path} are not in the other, left out")
    for name in common:
        for what in ("prompt", "target"):
            if ours[name][what] != theirs[name][what]:
                raise DataError(
                    f"sample {name!r} has the {what} {ours[name][what]!r} in {first} and {theirs[name][what]!r} in "
                    f"{second}. Evaluate both on the same data."
                )
    pairs = [(ours[name][_CONDITION], theirs[name][_CONDITION]) for name in common]
    losses = np.asarray([[one["loss"], other["loss"]] for one, other in pairs])
    apart = losses[:, 1] - losses[:, 0]
    half = 1.96 * float(apart.std(ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else None
    mean = float(apart.mean())
    rules = [rule for rule in pairs[0][0]["right"] if rule in pairs[0][1]["right"]]
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


def _samples(path: Path, warn: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    samples = {sample["id"]: sample for sample in read_jsonl(path, warn)}
    if not samples:
        raise ConfigError(f"{path} is missing: run `mars evaluate {path.parent}` first.")
    return samples


def _accuracy(rule: str, pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    first, second = (np.asarray([pair[place]["right"][rule] for pair in pairs]) for place in (0, 1))
    one, other = share(first), share(second)
    return {
        "rule": rule,
        "first": one["accuracy"],
        "first_ci": one["accuracy_ci"],
        "second": other["accuracy"],
        "second_ci": other["accuracy_ci"],
        **asdict(mcnemar(first, second)),
    }
