"""Examples with the vision encoder's output in place of pixels, for programs whose encoder is frozen: computed once.

Exact as long as preprocessing is deterministic, which it is. The model's forward pass is the caller's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.examples import Example, ExampleSource


class FeatureSource:
    """Random access to examples of `indices`, with `features` [N, P, D vision] in place of `pixels`."""

    def __init__(
        self,
        source: ExampleSource,
        indices: Sequence[int],
        encode: Callable[[NDArray[np.float32]], NDArray[Any]],
        batch_size: int,
    ) -> None:
        """Encodes every distinct picture once.

        Args:
            source: the examples.
            indices: those that will be asked for.
            encode: pixels [B, N, 3, H, W] -> features [B, N, P, D vision].
            batch_size: B.
        """
        self._source = source
        self._features: dict[str, NDArray[Any]] = {}
        first = {source.records[index].group: index for index in reversed(list(indices))}
        groups = list(first)
        for start in range(0, len(groups), batch_size):
            chosen = groups[start : start + batch_size]
            # The last batch is filled up, so that one program encodes them all.
            filled = chosen + chosen[-1:] * (batch_size - len(chosen))
            pixels = np.stack([source[first[group]]["pixels"] for group in filled])
            self._features |= dict(zip(chosen, np.asarray(encode(pixels)), strict=False))

    def __getitem__(self, index: int) -> Example:
        """Example `index`, one of those given."""
        example = dict(self._source[index])
        del example["pixels"]
        return {**example, "features": self._features[self._source.records[index].group]}
