"""Random access to records as encoded examples of fixed shape.

An example is a numpy dict; its keys and shapes are the contract with the models (see `ExampleSource`). Batching and
order are in `batches`.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

import numpy as np

from mars_jax.data.images import PictureError, load_rgb
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import Shapes, encode_text, shapes_of
from mars_jax.data.template import Encoded
from mars_jax.errors import DataError
from mars_jax.models.families.pictures import NEWLINE, ImageTokens, rotary_positions

Example = dict[str, np.ndarray]
"""Arrays by name; see `ExampleSource`."""

ValueT = TypeVar("ValueT")


class ExampleSource:
    """Random access to examples of one shape, encoded on demand (a grain random-access source; safe in threads).

    `source[i]` is a dict, with T, N, S, C of `shapes` and R feature rows of a tile:

        tokens            int32   [T]       right-padded with the padding token
        pixels            float32 [N, ...]  and the other encoder inputs, see the family's `Pictures`
        image_index       int32   [T, C]    rows of the features, row N*R the newline; -1 on text
        image_weight      float32 [T, C]    a token is the weighted sum of its C rows; 0 on text
        targets           int32   [S]       tokens to predict
        target_positions  int32   [S]       position of the hidden state that predicts each
        target_weights    float32 [S]       1, and 0 on padding
        positions         int32   [T, 3]    rotary positions, where the decoder's have three axes
    """

    def __init__(
        self, records: Sequence[Record], preprocessor: Preprocessor, shapes: Shapes, cache_bytes: int = 2**30
    ) -> None:
        """Sets up the source; nothing is encoded yet.

        Args:
            records: the records.
            preprocessor: of the checkpoint.
            shapes: static sizes of every example.
            cache_bytes: memory for encoded records, least recently used dropped first; 0 caches nothing.
        """
        self.records = tuple(records)
        self.shapes = shapes
        self._preprocessor = preprocessor
        self._cache = _LruCache(cache_bytes)

    @property
    def encoder_inputs(self) -> tuple[str, ...]:
        """The arrays of an example that only the vision encoder reads."""
        return self._preprocessor.encoder_inputs

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"ExampleSource({len(self.records)} records, {self.shapes})"

    def __getitem__(self, number: int) -> Example:
        """Encodes record `number`.

        Raises:
            DataError: the picture cannot be read any more, or the record does not fit `shapes`.
        """
        record, shapes = self.records[number], self.shapes
        encoded, pictures = self._cache.get(number, lambda: self._text(record))
        example = _text_example(encoded, shapes, self._preprocessor.pad_token_id)
        maker = self._preprocessor.pictures
        tiles = self._cache.get(record.images, lambda: self._tiles(record)) if record.images else {}
        spare = maker.padding(shapes.max_tiles - len(next(iter(tiles.values()), ())))
        example |= {name: np.concatenate([tiles[name], array]) if tiles else array for name, array in spare.items()}

        image_positions = np.flatnonzero(encoded.token_ids == self._preprocessor.image_token_id)
        index = np.full((shapes.max_tokens, shapes.corners), -1, np.int32)
        weight = np.zeros((shapes.max_tokens, shapes.corners), np.float32)
        start, first_row = 0, 0
        for picture in pictures:
            newline = picture.index == NEWLINE
            rows = np.where(newline, shapes.max_tiles * maker.rows_per_tile, picture.index + first_row)
            positions = image_positions[start : start + len(rows)]
            # Spare corners repeat the first row with weight 0, so that -1 always means text.
            index[positions] = rows[:, :1]
            index[positions, : rows.shape[1]] = rows
            weight[positions, : rows.shape[1]] = picture.weight
            start, first_row = start + len(rows), first_row + picture.num_tiles * maker.rows_per_tile
        if self._preprocessor.axes > 1:
            example["positions"] = rotary_positions(shapes.max_tokens, image_positions, pictures)
        return {**example, "image_index": index, "image_weight": weight}

    def with_answers(self, number: int, answers: Sequence[Sequence[int]]) -> Example:
        """Record `number` without its last answer, followed by C candidate answers as separate branches.

        A is the sum of the candidates' lengths. `tokens`, `image_index` and `image_weight` have length T + A. The
        targets are each candidate's tokens and the record's end token, one candidate after the other: S = A + C.

        Args:
            number: index of the record.
            answers: token ids of each of the C candidates.

        Returns:
            The arrays of the class docstring with these lengths, and

            positions         int32   [T + A]   position of a token in its branch; every candidate starts where the
                                                last answer started ([T + A, 3] where positions have three axes)
            segments          int32   [T + A]   0 the record, 1 to C the candidates, -1 padding
        """
        example = self[number]
        encoded, _ = self._cache.get(number, lambda: self._text(self.records[number]))
        end = int(np.flatnonzero(encoded.supervised)[-1])
        start = int(np.flatnonzero(~encoded.supervised[:end])[-1]) + 1
        length = self.shapes.max_tokens
        padding = np.arange(length) >= start
        tokens = [np.where(padding, self._preprocessor.pad_token_id, example["tokens"])]
        before = example.get("positions", np.arange(length)[:, None])
        positions, segments, targets, sources = [before], [np.where(padding, -1, 0)], [], []
        offset, following = length, before[start - 1].max() + 1
        for branch, answer in enumerate(answers, 1):
            count = len(answer)
            tokens.append(np.asarray(answer))
            positions.append(np.broadcast_to(following + np.arange(count)[:, None], (count, before.shape[1])))
            segments.append(np.full(count, branch))
            targets.append(np.asarray([*answer, encoded.token_ids[end]]))
            sources.append(np.asarray([start - 1, *range(offset, offset + count)]))
            offset += count
        integers = {
            "tokens": tokens,
            "positions": positions if self._preprocessor.axes > 1 else [part[:, 0] for part in positions],
            "segments": segments,
            "targets": targets,
            "target_positions": sources,
        }
        spare = [(0, offset - length), (0, 0)]
        return example | {
            **{name: np.concatenate(parts).astype(np.int32) for name, parts in integers.items()},
            "target_weights": np.ones(offset - length + len(answers), np.float32),
            "image_index": np.pad(example["image_index"], spare, constant_values=-1),
            "image_weight": np.pad(example["image_weight"], spare),
        }

    def prompt(self, number: int) -> Example:
        """Record `number` without its last answer: the prompt of generation.

        Computed as `with_answers` of one empty candidate, so S = 1, and `target_positions` is the prompt's last token.
        """
        return self.with_answers(number, [()])

    def _text(self, record: Record) -> tuple[tuple[Encoded, tuple[ImageTokens, ...]], int]:
        encoded, pictures = encode_text(record, self._preprocessor)
        needed = shapes_of(encoded, pictures)
        if self.shapes.union(needed) != self.shapes:
            raise DataError(f"{record} needs {needed}, more than {self.shapes}. Plan the shapes with this record.")
        return (encoded, pictures), encoded.token_ids.nbytes + encoded.targets.nbytes + encoded.supervised.nbytes

    def _tiles(self, record: Record) -> tuple[dict[str, np.ndarray], int]:
        try:
            tiles = self._preprocessor.pictures.tiles([load_rgb(path) for path in record.images])
        except (OSError, PictureError) as error:
            name = getattr(error, "filename", None) or record.images[0]
            raise DataError(f"{record}: {name} cannot be read any more ({error}). Restore the file.") from error
        return tiles, sum(array.nbytes for array in tiles.values())


def _text_example(encoded: Encoded, shapes: Shapes, pad_token_id: int) -> Example:
    tokens = np.full(shapes.max_tokens, pad_token_id, np.int32)
    tokens[: len(encoded.token_ids)] = encoded.token_ids
    supervised = np.flatnonzero(encoded.supervised)
    count = len(supervised)
    targets = np.zeros(shapes.max_supervised, np.int32)
    positions = np.zeros(shapes.max_supervised, np.int32)
    weights = np.zeros(shapes.max_supervised, np.float32)
    targets[:count] = encoded.targets[supervised]
    positions[:count] = supervised - 1
    weights[:count] = 1
    return {"tokens": tokens, "targets": targets, "target_positions": positions, "target_weights": weights}


class _LruCache:
    """A cache bounded in bytes, safe in threads; the least recently used values are dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[ValueT, int]]) -> ValueT:
        """The cached value of `key`; if absent, that of `make()`, which returns (value, bytes)."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return cast("ValueT", self._entries[key][0])
        value, size = make()  # unlocked, so that threads encode at the same time
        with self._lock:
            if key not in self._entries:
                self._entries[key] = value, size
                self._bytes += size
            while self._bytes > self._max_bytes:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._bytes -= dropped
        return value
