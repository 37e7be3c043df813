"""Notes on training samples and base together: odd padding, ends of answers, pictures without their tokens."""

from collections.abc import Iterator, Sequence

import numpy as np

from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import answer_end, encode_text
from mars_jax.hub.end_tokens import GENERATION_FILE


def sample_notes(train: Sequence[Record], preprocessor: Preprocessor, ends: Sequence[int]) -> Iterator[str]:
    """What the base and the training samples do to each other that a user should know.

    Args:
        train: training samples.
        preprocessor: of the base.
        ends: tokens at which inference engines stop, see `load_end_tokens`.

    Yields:
        A sentence for each.
    """
    if preprocessor.pad_token_id != preprocessor.tokenizer.pad_token_id:
        yield (
            f"the padding token {preprocessor.tokenizer.pad_token!r} has no row in the base's embedding; token "
            f"{preprocessor.pad_token_id} pads instead, which changes nothing, since padding is masked"
        )
    if (end := answer_end(train[0], preprocessor)) not in ends:
        name = preprocessor.tokenizer.convert_ids_to_tokens(end)
        yield (
            f"the chat template ends answers with {name!r} (token {end}), which neither {GENERATION_FILE} nor the "
            "tokenizer names as an end: it is trained, and our evaluation stops there, but inference engines would go "
            f"on. Add {end} to eos_token_id in the checkpoint's {GENERATION_FILE}."
        )
    first = next((record for record in train if record.images), None)
    around = preprocessor.around_pictures
    if first and around and not _is_surrounded(first, around, preprocessor):
        tokens = preprocessor.tokenizer.convert_ids_to_tokens(list(around))
        names = [token or f"token {number}" for token, number in zip(tokens, around, strict=True)]
        yield (
            f"the chat template renders pictures without {' and '.join(names)} around them, as this family was "
            "trained. Take the chat template of the checkpoint's source; that of a language model alone does not fit."
        )


def _is_surrounded(record: Record, around: tuple[int, int], preprocessor: Preprocessor) -> bool:
    """Whether the first picture of a record comes after, and the last before, the tokens that the family expects."""
    ids = encode_text(record, preprocessor)[0].token_ids.tolist()
    start, end = around
    places = np.flatnonzero(np.asarray(ids) == preprocessor.image_token_id)
    return ids[: places[0]][-1:] == [start] and ids[places[-1] + 1 :][:1] == [end]
