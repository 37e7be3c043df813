"""Samples as the model sees them, for people to look at before anything is trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mars_jax.data.examples import Example, ExampleSource
from mars_jax.data.images import image_size
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import Shapes


def shown(records: Sequence[Record], preprocessor: Preprocessor, shapes: Shapes) -> list[dict[str, Any]]:
    """Each record's id, its text with the image tokens counted, and the part that is supervised.

    `learned` says where in the text that part is: [start, end) in characters of each answer and its end token.
    """
    source = ExampleSource(records, preprocessor, shapes, cache_bytes=0)
    return [_shown(record, source[number], preprocessor) for number, record in enumerate(records)]


def _shown(record: Record, example: Example, preprocessor: Preprocessor) -> dict[str, Any]:
    tokenizer, tokens = preprocessor.tokenizer, example["tokens"]
    sizes = [image_size(path) for path in record.images]
    counts = [len(picture.index) for picture in preprocessor.pictures.tokens(sizes)] if sizes else []
    image = str(tokenizer.decode([preprocessor.image_token_id]))

    # Of each picture's tokens the first is left, to be replaced by their number.
    places = np.flatnonzero(tokens == preprocessor.image_token_id)
    firsts = places[np.cumsum([0, *counts])[:-1]] if counts else places
    used = np.flatnonzero(tokens != tokenizer.pad_token_id)[-1] + 1
    left = np.setdiff1d(np.arange(used), np.setdiff1d(places, firsts))
    supervised = np.zeros(len(tokens), bool)
    supervised[example["target_positions"][example["target_weights"] > 0] + 1] = True

    def text(stop: int) -> str:
        """What is decoded of the tokens left up to `stop`."""
        found = str(tokenizer.decode(tokens[left[:stop]]))
        for count in counts:
            found = found.replace(image, f"[{count} image tokens]", 1)
        return found

    borders = np.flatnonzero(np.diff(supervised[left].astype(int), prepend=0, append=0))
    return {
        "id": record.id,
        "text": text(len(left)),
        "supervised": str(tokenizer.decode(tokens[supervised])),
        "learned": np.reshape([len(text(border)) for border in borders.tolist()], (-1, 2)).tolist(),
    }
