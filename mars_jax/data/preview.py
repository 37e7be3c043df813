"""Samples as the model sees them, for people to look at before anything is trained."""

from collections.abc import Sequence

import numpy as np

from mars_jax.data.examples import ExampleSource, Preprocessor, Shapes
from mars_jax.data.images import image_size
from mars_jax.data.records import Record


def shown(records: Sequence[Record], preprocessor: Preprocessor, shapes: Shapes) -> list[dict[str, str]]:
    """Each record's id, its text with the image tokens counted, and the part that is supervised."""
    source = ExampleSource(records, preprocessor, shapes, cache_bytes=0)
    tokenizer = preprocessor.tokenizer
    found = []
    for record, example in zip(records, (source[i] for i in range(len(records))), strict=True):
        supervised = example["targets"][example["target_weights"] > 0]
        used = np.flatnonzero(example["tokens"] != tokenizer.pad_token_id)[-1] + 1
        sizes = [image_size(path) for path in record.images]
        counts = [len(picture.index) for picture in preprocessor.pictures.tokens(sizes)] if sizes else []
        # Of each picture's tokens the first is left, to be replaced by their number.
        places = np.flatnonzero(example["tokens"] == preprocessor.image_token_id)
        firsts = places[np.cumsum([0, *counts])[:-1]] if counts else places
        text = str(tokenizer.decode(np.delete(example["tokens"][:used], np.setdiff1d(places, firsts))))
        image = str(tokenizer.decode([preprocessor.image_token_id]))
        for count in counts:
            text = text.replace(image, f"[{count} image tokens]", 1)
        found.append(
            {
                "id": record.id,
                "text": text,
                "supervised": str(tokenizer.decode(supervised)),
            }
        )
    return found
