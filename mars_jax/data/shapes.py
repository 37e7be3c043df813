"""Plans the static shapes of a data set from picture sizes and tokenised text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mars_jax.data.images import image_size
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.template import Encoded, encode, separate_answers
from mars_jax.errors import DataError
from mars_jax.models.families.pictures import ImageTokens


@dataclass(frozen=True, slots=True)
class Shapes:
    """The static sizes of every batch of a data set.

    Attributes:
        max_tokens: T, text and image tokens together.
        max_tiles: N, at least 1.
        max_supervised: S, tokens to predict.
        corners: C, 4 if the features of any picture are scaled down, else 1.
    """

    max_tokens: int
    max_tiles: int
    max_supervised: int
    corners: int

    def union(self, other: "Shapes") -> "Shapes":
        """The smallest shapes that hold both, so that two data sets can share one compiled program."""
        return Shapes(
            max(self.max_tokens, other.max_tokens),
            max(self.max_tiles, other.max_tiles),
            max(self.max_supervised, other.max_supervised),
            max(self.corners, other.corners),
        )


class Size(NamedTuple):
    """Size of one sample: tokens up to the last that predicts a target, tiles, and tokens to predict."""

    tokens: int
    tiles: int
    supervised: int


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The records that fit a limit of tokens, with their shapes, and the records that do not.

    Attributes:
        shapes: static sizes of a batch of the kept records.
        kept: records that fit.
        sizes: size of each kept record.
        dropped: records that do not fit, with their numbers of tokens.
        remarks: what is odd about prompts -> number of samples: see `Encoded.remarks`.
        separated: conversations that became several records, and how many: see `separate_answers`.
    """

    shapes: Shapes
    kept: tuple[Record, ...]
    sizes: tuple[Size, ...]
    dropped: tuple[tuple[Record, int], ...]
    remarks: Mapping[str, int]
    separated: tuple[int, int]


def plan_shapes(records: Sequence[Record], preprocessor: Preprocessor, max_tokens: int | None = None) -> ShapePlan:
    """Plans the static shapes from picture sizes and tokenised text, without decoding pictures.

    A record of more than `max_tokens` tokens is dropped whole: truncation would cut image tokens or the answer. A
    record whose answers can't be trained in one sequence becomes several.

    Args:
        records: the records of a split.
        preprocessor: of the checkpoint.
        max_tokens: limit of text and image tokens together; None: no limit.

    Raises:
        DataError: a record has nothing to learn or cannot be encoded, or no record fits.
    """
    kept: list[Record] = []
    sizes: list[Size] = []
    dropped: list[tuple[Record, int]] = []
    shapes = Shapes(1, 1, 1, 1)
    remarks: Counter[str] = Counter()
    conversations, pieces = 0, 0
    for conversation in records:
        made = list(_trainable(conversation, preprocessor))
        if len(made) > 1:
            conversations, pieces = conversations + 1, pieces + len(made)
        for record, encoded, pictures in made:
            remarks.update(encoded.remarks)
            length = len(encoded.token_ids)
            if max_tokens is not None and length > max_tokens:
                dropped.append((record, length))
                continue
            kept.append(record)
            tiles = sum(picture.num_tiles for picture in pictures)
            sizes.append(Size(int(np.flatnonzero(encoded.supervised)[-1]), tiles, int(encoded.supervised.sum())))
            shapes = shapes.union(shapes_of(encoded, pictures))
    if not kept:
        shortest = min((length for _, length in dropped), default=0)
        raise DataError(
            f"none of {len(records)} records fits max_tokens = {max_tokens}; the shortest has {shortest} tokens. Raise "
            "max_tokens, or use smaller pictures."
        )
    return ShapePlan(shapes, tuple(kept), tuple(sizes), tuple(dropped), remarks, (conversations, pieces))


def _trainable(record: Record, preprocessor: Preprocessor) -> Iterator[tuple[Record, Encoded, tuple[ImageTokens, ...]]]:
    """A record, or the several in which all its answers can be trained, with their tokens and pictures."""
    encoded, pictures = encode_text(record, preprocessor)
    if not encoded.apart:
        yield record, encoded, pictures
        return
    for piece in separate_answers(record, encoded.apart):
        yield from _trainable(piece, preprocessor)


def encode_text(record: Record, preprocessor: Preprocessor) -> tuple[Encoded, tuple[ImageTokens, ...]]:
    """The token ids of a record, and the image tokens of its pictures.

    Raises:
        DataError: a picture cannot be read, or the record has nothing to learn.
    """
    pictures: tuple[ImageTokens, ...] = ()
    if record.images:
        try:
            pictures = preprocessor.pictures.tokens([image_size(path) for path in record.images])
        except (DataError, OSError) as error:
            raise DataError(f"{record}: {', '.join(map(str, record.images))}: {error}") from error
    counts = [len(picture.index) for picture in pictures]
    encoded = encode(record, preprocessor.chat, counts)
    if (largest := int(max(encoded.token_ids.max(), encoded.targets.max()))) >= preprocessor.num_rows:
        token = str(preprocessor.tokenizer.convert_ids_to_tokens(largest))
        written = any(token in turn.text for turn in record.turns)
        raise DataError(
            f"{record}: has token {largest} {token!r}{'' if written else ', which the chat template writes'}, but the "
            f"base's embedding has {preprocessor.num_rows} rows. {'Leave it out of the text, or t' if written else 'T'}"
            "ake the tokenizer and the chat template that belong to the checkpoint."
        )
    return encoded, pictures


def answer_end(record: Record, preprocessor: Preprocessor) -> int:
    """The token that ends the answers of a record in training: the template's, which may not be the tokenizer's.

    Raises:
        DataError: as `encode_text`.
    """
    encoded = encode_text(record, preprocessor)[0]
    return int(encoded.targets[encoded.supervised][-1])


def shapes_of(encoded: Encoded, pictures: Sequence[ImageTokens]) -> Shapes:
    """The shapes that one record needs."""
    tiles = sum(picture.num_tiles for picture in pictures)
    corners = max((picture.index.shape[1] for picture in pictures), default=1)
    return Shapes(len(encoded.token_ids), max(tiles, 1), int(encoded.supervised.sum()), corners)
