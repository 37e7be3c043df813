"""Previews of encoded samples, for inspection before training."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from mars_jax.data.examples import Example, ExampleSource
from mars_jax.data.images import image_size
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import Shapes


class Preview(TypedDict):
    """A sample as the model sees it.

    `text` is the decoded sample, each picture's image tokens replaced by their number; `supervised` the part that is
    trained on; `learned` the [start, end) of that part in `text`, in characters, for each answer with its end token.
    """

    id: str
    text: str
    supervised: str
    learned: list[list[int]]


def preview(records: Sequence[Record], preprocessor: Preprocessor, shapes: Shapes) -> list[Preview]:
    """The preview of each record."""
    source = ExampleSource(records, preprocessor, shapes, cache_bytes=0)
    return [_preview_of(record, source[number], preprocessor) for number, record in enumerate(records)]


def _preview_of(record: Record, example: Example, preprocessor: Preprocessor) -> Preview:
    tokenizer, tokens = preprocessor.tokenizer, example["tokens"]
    sizes = [image_size(path) for path in record.images]
    counts = [len(picture.index) for picture in preprocessor.pictures.tokens(sizes)] if sizes else []
    image = str(tokenizer.decode([preprocessor.image_token_id]))

    # The first image token of each picture is kept, and replaced by their number below.
    image_positions = np.flatnonzero(tokens == preprocessor.image_token_id)
    firsts = image_positions[np.cumsum([0, *counts])[:-1]] if counts else image_positions
    used = np.flatnonzero(tokens != preprocessor.pad_token_id)[-1] + 1
    kept = np.setdiff1d(np.arange(used), np.setdiff1d(image_positions, firsts))
    weighted = example["target_weights"] > 0
    learned = example["target_positions"][weighted] + 1
    # The end token of an earlier answer is learned, but is not in the text where the template writes none.
    written = tokens[np.minimum(learned, len(tokens) - 1)] == example["targets"][weighted]
    supervised = np.zeros(len(tokens), bool)
    supervised[learned[written]] = True

    def text(stop: int) -> str:
        """The first `stop` kept tokens, decoded."""
        decoded = str(tokenizer.decode(tokens[kept[:stop]]))
        for count in counts:
            decoded = decoded.replace(image, f"[{count} image tokens]", 1)
        return decoded

    borders = np.flatnonzero(np.diff(supervised[kept].astype(int), prepend=0, append=0))
    return {
        "id": record.id,
        "text": text(len(kept)),
        "supervised": str(tokenizer.decode(example["targets"][weighted])),
        "learned": np.reshape([len(text(border)) for border in borders.tolist()], (-1, 2)).tolist(),
    }
