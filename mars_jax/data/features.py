"""Examples with the vision encoder's output in place of pixels, for programs whose encoder is frozen: computed once.

Exact as long as preprocessing is deterministic, which it is. The model's forward pass is the caller's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.examples import Example, ExampleSource
from mars_jax.models.families.pictures import ENCODER_INPUTS


class FeatureSource:
    """Random access to examples of `indices`, with `features` [N, P, D vision] in place of what the encoder takes."""

    def __init__(
        self,
        source: ExampleSource,
        indices: Sequence[int],
        encode: Callable[[Example], NDArray[Any]],
        batch_size: int,
    ) -> None:
        """Encodes the pictures of every record once.

        Args:
            source: the examples.
            indices: those that will be asked for.
            encode: what the encoder takes of B examples, arrays [B, N, ...], to features [B, N, P, D vision].
            batch_size: B.
        """
        self._source = source
        self._features: dict[tuple[str, ...], NDArray[Any]] = {}
        first = {source.records[index].digests: index for index in reversed(list(indices))}
        distinct = list(first)
        for start in range(0, len(distinct), batch_size):
            chosen = distinct[start : start + batch_size]
            # The last batch is filled up, so that one program encodes them all.
            rows = [source[first[digests]] for digests in chosen + chosen[-1:] * (batch_size - len(chosen))]
            inputs = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name in ENCODER_INPUTS}
            self._features |= dict(zip(chosen, np.asarray(encode(inputs)), strict=False))

    def __getitem__(self, index: int) -> Example:
        """Example `index`, one of those given."""
        kept = {name: array for name, array in self._source[index].items() if name not in ENCODER_INPUTS}
        return {**kept, "features": self._features[self._source.records[index].digests]}
