"""What the tabular benchmark holds of every task: configurations, their eval points, lengths and seeds.

Two designs in one. Every rank of (2, 8, 32) of vision encoder and LLM with every learning-rate factor of (1/3, 1, 3) of
both, so that a strategy may change one thing and keep the others; and the cross of five ranks with its corners, as
`mars plan` probes them, at three factors. In some configurations one of the two is frozen, and one in the middle has
more draws of its adapters.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mars_jax.search.trainer import Configuration, distinct

SEARCHED = ("vision", "llm")
PROJECTOR_RANK = 8
FULL_RANKS = (2, 8, 32)
CROSS_PAIRS = ((4, 8), (16, 8), (8, 4), (8, 16))
FROZEN_PAIRS = ((0, 8), (0, 32), (8, 0), (32, 0))
FACTORS = (1 / 3, 1.0, 3.0)

BATCH = 16
LENGTHS = (160, 1280)
"""Steps of final runs; the longer ones are recorded for some tasks and configurations."""

SEEDS = (0, 1)
"""Of the choice of samples, their order and the draw of the adapters."""

RESTARTED = (8, 8)
RESTARTS = (1, 2, 3)
"""A pair in the middle, and further draws of its adapters."""

RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of a run at which the losses of the validation samples are kept."""


def eval_steps(steps: int) -> list[int]:
    """Steps of the eval points of a final run: first nearly log-spaced, then every eighth."""
    parts = (1 / 32, 1 / 16, *(eighth / 8 for eighth in range(1, 9)))
    return [0, *(round(part * steps) for part in parts)]


def configurations() -> list[Configuration]:
    """All that are recorded at the shorter length."""
    restarted = [replace(configuration(RESTARTED, (1.0, 1.0)), seed=seed) for seed in RESTARTS]
    return distinct([*_full(), *_at_three_factors(CROSS_PAIRS), *_at_three_factors(FROZEN_PAIRS), *restarted])


def long_configurations() -> list[Configuration]:
    """Those that are recorded at both lengths: every pair of three ranks at three factors."""
    return _at_three_factors(list(itertools.product(FULL_RANKS, repeat=2)))


def configuration(pair: Sequence[int], factors: Sequence[float]) -> Configuration:
    """Of ranks and factors of the searched modules; the projector's are fixed."""
    vision, llm = pair
    ranks = {"vision": vision, "projector": PROJECTOR_RANK, "llm": llm}
    chosen = dict(zip(SEARCHED, factors, strict=True))
    return Configuration(ranks, {m: factor for m, factor in chosen.items() if factor != 1.0 and ranks[m]})


def _full() -> Iterator[Configuration]:
    for pair in itertools.product(FULL_RANKS, repeat=2):
        for factors in itertools.product(FACTORS, repeat=2):
            yield configuration(pair, factors)


def _at_three_factors(pairs: Sequence[Sequence[int]]) -> list[Configuration]:
    return distinct(configuration(pair, (factor, factor)) for pair in pairs for factor in FACTORS)
