"""The published points of Figure 2 of MARS (arXiv 2603.00720), LLaVA-OneVision 0.5B, by rank of the LLM."""

import numpy as np
from numpy.typing import NDArray

Points = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

RANKS = (64, 32, 16, 8)

# Convergence time in iterations at D = 2**4 .. 2**10.
_STEPS = (
    (10, 20, 25, 40, 65, 110, 190),
    (15, 20, 35, 60, 75, 155, 230),
    (20, 25, 45, 65, 95, 185, 350),
    (20, 35, 50, 80, 125, 240, 365),
)
# Perplexity at D = 2**8 .. 2**14.
_PERPLEXITY = (
    (3.8472, 3.2530, 2.9029, 2.7192, 2.6147, 2.6794, 2.7246),
    (4.1349, 3.3907, 3.0765, 2.7396, 2.6097, 2.6332, 2.6221),
    (4.4106, 3.5853, 3.1625, 2.7716, 2.6025, 2.6244, 2.5925),
    (4.6799, 3.8728, 3.2879, 2.8226, 2.6127, 2.5999, 2.5681),
)


def convergence_points() -> Points:
    """(rank, num_samples, steps), each [28]."""
    return np.repeat(RANKS, 7), np.tile(2 ** np.arange(4, 11), 4), np.array(_STEPS, float).reshape(-1)


def performance_points() -> Points:
    """(rank, num_samples, perplexity), each [28]."""
    return np.repeat(RANKS, 7), np.tile(2 ** np.arange(8, 15), 4), np.array(_PERPLEXITY).reshape(-1)
