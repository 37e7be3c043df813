"""Examples with precomputed features of a frozen vision encoder.

Each picture is encoded once. This is exact because preprocessing is deterministic. The caller supplies the forward
pass of the encoder.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mars_jax.data.examples import Example, ExampleSource


class FeatureSource:
    """Random access to examples of `indices`, with `features` [N, P, D vision] in place of the encoder's inputs."""

    def __init__(
        self,
        source: ExampleSource,
        indices: Sequence[int],
        encode: Callable[[Example], np.ndarray],
        batch_size: int,
    ) -> None:
        """Encodes the pictures of every record once.

        Args:
            source: the examples.
            indices: indices of the examples that this source will serve.
            encode: maps the encoder inputs of B examples, [B, N, ...], to features [B, N, P, D vision].
            batch_size: B.
        """
        self._source = source
        self._features: dict[tuple[str, ...], np.ndarray] = {}
        first = {source.records[index].digests: index for index in reversed(list(indices))}
        distinct = list(first)
        for start in range(0, len(distinct), batch_size):
            chosen = distinct[start : start + batch_size]
            # The last batch is padded to B rows, so that one compiled program encodes all batches.
            rows = [source[first[digests]] for digests in chosen + chosen[-1:] * (batch_size - len(chosen))]
            inputs = {name: np.stack([row[name] for row in rows]) for name in source.encoder_inputs}
            self._features |= dict(zip(chosen, np.asarray(encode(inputs)), strict=False))

    def __getitem__(self, index: int) -> Example:
        """Example `index`, which must be one of `indices`."""
        example, dropped = self._source[index], self._source.encoder_inputs
        kept = {name: array for name, array in example.items() if name not in dropped}
        return {**kept, "features": self._features[self._source.records[index].digests]}
