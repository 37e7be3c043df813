"""Sequence packing: several samples of a training batch share a row, so that little compute is spent on padding.

A packed batch is the same batch in another layout, with the same loss. `batches` chooses the samples; `lanes.engine`
sums the losses of the rows and skips rows without samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.batches import Batch
from mars_jax.data.shapes import Size
from mars_jax.errors import DataError
from mars_jax.models.families.pictures import PICTURE_NUMBERS

# Rows come in two widths, T and T times this factor. With T alone, 11 to 13 % of the computed tokens of 16 samples of
# mixed lengths would be padding, because a batch has few rows and the last one is seldom full.
_WIDE = 1.5
# Share of rows, filled by tokens alone, that must have room for their tiles and supervised tokens. More room would be
# padding.
_ROOM_QUANTILE = 0.95
# Number of samples from which room and padding are estimated, and number of counts of wide rows tried for a batch.
_TRIED_SAMPLES = 1024
_TRIED_WIDE_ROWS = 16
_UNLIMITED = 2**31


class PackedBatch(TypedDict):
    """A batch in packed layout; see `Packing.pack`."""

    tiles: dict[str, np.ndarray]
    blocks: NDArray[np.int32]
    wide: dict[str, np.ndarray]
    narrow: dict[str, np.ndarray]


class Assignment(NamedTuple):
    """The samples of each row, in order, as indices into the batch, for the rows of each width."""

    wide: list[list[int]]
    narrow: list[list[int]]


@dataclass(frozen=True)
class Packing:
    """How the batches of a data set are packed.

    Attributes:
        narrow: room of a row that takes T tokens, those of the longest sample; every sample fits.
        wide: room of a wider row.
        row_block: k, rows computed at a time, a multiple of the number of parts into which the mesh splits a batch.
        rows_per_tile: feature rows of a tile.
    """

    narrow: Size
    wide: Size
    row_block: int
    rows_per_tile: int

    def assign(self, sizes: NDArray[np.int64]) -> Assignment:
        """Assigns samples to rows: first fit in order of decreasing length, wide rows before narrow ones.

        Several numbers of wide rows are tried, and the one with the fewest computed tokens is taken.

        Args:
            sizes: [B, 3], a `Size` for each sample.
        """
        order = np.argsort(-sizes[:, 0], kind="stable").tolist()
        needed = [Size(*size) for size in sizes.tolist()]
        numbers = range(0, len(order) + 1, math.ceil(len(order) / _TRIED_WIDE_ROWS))
        return min((self._first_fit(needed, order, most) for most in numbers), key=self.computed_tokens)

    def _first_fit(self, needed: Sequence[Size], order: Sequence[int], most_wide: int) -> Assignment:
        """Puts each sample, in this order, in the first row with room; at most `most_wide` rows are wide."""
        rows: list[list[int]] = []
        filled: list[Size] = []
        for sample in order:
            for row, taken in enumerate(filled):
                more = _added(taken, needed[sample])
                if _fits(more, self.wide if row < most_wide else self.narrow):
                    rows[row].append(sample)
                    filled[row] = more
                    break
            else:
                rows.append([sample])
                filled.append(needed[sample])
        wide = [row for row, taken in zip(rows, filled, strict=True) if not _fits(taken, self.narrow)]
        narrow = [row for row, taken in zip(rows, filled, strict=True) if _fits(taken, self.narrow)]
        spare = -len(wide) % self.row_block
        return Assignment(wide + narrow[:spare], narrow[spare:])

    def computed_tokens(self, assignment: Assignment) -> int:
        """Number of tokens computed for a batch, padding included."""
        wide, narrow = self.computed_rows(assignment)
        return wide * self.wide.tokens + narrow * self.narrow.tokens

    def computed_rows(self, assignment: Assignment) -> tuple[int, int]:
        """Numbers of wide and narrow rows computed, including empty rows that complete a block."""
        blocks = [-(-len(rows) // self.row_block) for rows in assignment]
        return blocks[0] * self.row_block, blocks[1] * self.row_block

    def pack(self, batch: Batch) -> PackedBatch:
        """Packs a batch [B, ...] into rows.

        A sample is cut after its last target, since no loss depends on later tokens.

        Returns:
            tiles: the encoder inputs (`pixels` and others), or `features`, [B, N, ...], unchanged: they are large, so
                rows hold indices of tiles.
            blocks: int32 [2], numbers of leading blocks of k rows that hold samples, wide and narrow.
            wide, narrow: the rows, arrays [blocks, k, ...] with room for any batch. They hold the arrays of a batch of
                k samples (`tokens`, `image_index`, `image_weight`, `targets`, `target_positions`, `target_weights`,
                and `PICTURE_NUMBERS` if the batch has them) with `positions` and `segments` (see `decoder.Layout`:
                samples are segments 1, 2, ...), and

                tile_index   int32 [blocks, k, N row]   indices of the row's tiles among all B * N tiles of the batch

        Raises:
            DataError: a sample does not fit a narrow row.
        """
        sizes = self.sizes(batch)
        for number in np.flatnonzero((sizes > self.narrow).any(axis=1)):
            raise DataError(
                f"sample {number} of a batch needs {Size(*sizes[number].tolist())}, more than a row's {self.narrow}. "
                "Plan the packing with it."
            )
        assignment, count = self.assign(sizes), len(sizes)
        # A wide row holds at least two samples.
        most = {"wide": max(1, -(-(count // 2) // self.row_block)), "narrow": -(-count // self.row_block)}
        wide = self._rows(batch, sizes, assignment.wide, self.wide, most["wide"])
        return {
            "tiles": {name: array for name, array in batch.items() if name not in wide},
            "blocks": np.asarray(self.computed_rows(assignment), np.int32) // self.row_block,
            "wide": wide,
            "narrow": self._rows(batch, sizes, assignment.narrow, self.narrow, most["narrow"]),
        }

    def sizes(self, batch: Batch) -> NDArray[np.int64]:
        """The `Size` of every sample of a batch, [B, 3]; tokens after the last target don't count."""
        supervised, index = batch["target_weights"] > 0, batch["image_index"]
        tokens = np.where(supervised, batch["target_positions"], -1).max(axis=1) + 1
        seen = np.arange(index.shape[1])[None] < tokens[:, None]
        last_row = np.where(seen[..., None] & (index < self._newline(batch)), index, -1).max(axis=(1, 2))
        return np.stack([tokens, last_row // self.rows_per_tile + 1, supervised.sum(axis=1)], axis=1).astype(np.int64)

    def _newline(self, batch: Batch) -> int:
        """Index of the newline's feature row in a sample's `image_index`."""
        return _tiles_of_a_sample(batch) * self.rows_per_tile

    def _rows(
        self, batch: Batch, sizes: NDArray[np.int64], rows: Sequence[Sequence[int]], room: Size, blocks: int
    ) -> dict[str, np.ndarray]:
        """The arrays of all rows of one width, [blocks, k, ...]."""
        count, (length, tiles, supervised) = blocks * self.row_block, room
        in_order = np.arange(batch["tokens"].shape[1], dtype=np.int32)[None]
        positions = batch.get("positions", np.broadcast_to(in_order, batch["tokens"].shape))
        arrays: dict[str, np.ndarray] = {
            "tokens": np.zeros((count, length), np.int32),
            "image_index": np.full((count, length, batch["image_index"].shape[2]), -1, np.int32),
            "image_weight": np.zeros((count, length, batch["image_index"].shape[2]), np.float32),
            "positions": np.zeros((count, length, *positions.shape[2:]), np.int32),
            "segments": np.full((count, length), -1, np.int32),
            "targets": np.zeros((count, supervised), np.int32),
            "target_positions": np.zeros((count, supervised), np.int32),
            "target_weights": np.zeros((count, supervised), np.float32),
            "tile_index": np.zeros((count, tiles), np.int32),
        }
        if PICTURE_NUMBERS in batch:
            arrays[PICTURE_NUMBERS] = np.full((count, tiles, batch[PICTURE_NUMBERS].shape[2]), -1, np.int32)
        for row, samples in enumerate(rows):
            views = {name: array[row] for name, array in arrays.items()}
            start, pictures = np.zeros(3, np.int64), 0
            for segment, sample in enumerate(samples, 1):
                stop = start + sizes[sample]
                token, tile, target = (slice(*ends) for ends in zip(start, stop, strict=True))
                used = slice(sizes[sample][0])
                views["segments"][token] = segment
                views["positions"][token] = positions[sample, used]
                for name in ("tokens", "image_weight"):
                    views[name][token] = batch[name][sample, used]
                index = batch["image_index"][sample, used]
                moved = np.where(index < 0, -1, index + start[1] * self.rows_per_tile)
                views["image_index"][token] = np.where(index < self._newline(batch), moved, tiles * self.rows_per_tile)
                of_sample = batch["target_weights"][sample] > 0
                views["target_positions"][target] = batch["target_positions"][sample, of_sample] + start[0]
                for name in ("targets", "target_weights"):
                    views[name][target] = batch[name][sample, of_sample]
                first = sample * _tiles_of_a_sample(batch)
                views["tile_index"][tile] = first + np.arange(sizes[sample][1])
                if PICTURE_NUMBERS in views:
                    images = batch[PICTURE_NUMBERS][sample, : sizes[sample][1]]
                    views[PICTURE_NUMBERS][tile] = np.where(images < 0, -1, images + pictures)
                    pictures += int(images.max(initial=-1)) + 1
                start = stop
        return {name: array.reshape(blocks, self.row_block, *array.shape[1:]) for name, array in arrays.items()}


@dataclass(frozen=True)
class PackingPlan:
    """A packing and its expected cost, estimated from random batches.

    Attributes:
        packing: the layout of every batch.
        wide_rows: mean number of wide rows computed per batch.
        narrow_rows: mean number of narrow rows computed per batch.
        padding: share of padding in the computed `tokens` and `tiles`.
    """

    packing: Packing
    wide_rows: float
    narrow_rows: float
    padding: dict[str, float]


def plan_packing(sizes: NDArray[np.int64], batch_size: int, row_block: int, rows_per_tile: int) -> PackingPlan:
    """Plans the room of rows: enough for every sample, and for most rows that are filled by tokens alone.

    Args:
        sizes: [samples, 3], a `Size` for each sample to pack.
        batch_size: B.
        row_block: k, see `Packing`.
        rows_per_tile: feature rows of a tile.
    """
    largest = Size(*sizes.max(axis=0).tolist())
    wide = math.ceil(_WIDE * largest.tokens)
    by_tokens = [Size(width, _UNLIMITED, _UNLIMITED) for width in (largest.tokens, wide)]
    free = Packing(by_tokens[0], by_tokens[1], row_block, rows_per_tile)
    seen: tuple[list[NDArray[np.int64]], ...] = ([], [])
    for batch in _random_batches(sizes, batch_size, seed=0):
        for sums, rows in zip(seen, free.assign(batch), strict=True):
            sums += [batch[row].sum(axis=0) for row in rows]

    def room(width: int, sums: list[NDArray[np.int64]], least: Size) -> Size:
        _, tiles, supervised = (
            np.ceil(np.quantile(sums, _ROOM_QUANTILE, axis=0)).astype(int).tolist() if sums else least
        )
        return Size(width, max(tiles, least.tiles, 1), max(supervised, least.supervised))

    narrow = room(largest.tokens, seen[1], largest)
    packing = Packing(narrow, room(wide, seen[0], narrow), row_block, rows_per_tile)
    batches = _random_batches(sizes, batch_size, seed=1)
    counts = np.asarray([packing.computed_rows(packing.assign(batch)) for batch in batches])
    computed = counts.sum(axis=0) @ np.asarray([packing.wide, packing.narrow])
    shares = (1.0 - batches.sum(axis=(0, 1)) / computed).tolist()
    wide_rows, narrow_rows = counts.mean(axis=0).tolist()
    return PackingPlan(packing, wide_rows, narrow_rows, dict(zip(("tokens", "tiles"), shares, strict=False)))


def _random_batches(sizes: NDArray[np.int64], batch_size: int, seed: int) -> NDArray[np.int64]:
    """Sizes of the samples of random batches, [batches, B, 3]."""
    number = max(8, _TRIED_SAMPLES // batch_size)
    return sizes[np.random.default_rng(seed).integers(0, len(sizes), (number, batch_size))]


def _added(left: Size, right: Size) -> Size:
    return Size(left.tokens + right.tokens, left.tiles + right.tiles, left.supervised + right.supervised)


def _fits(size: Size, room: Size) -> bool:
    return size.tokens <= room.tokens and size.tiles <= room.tiles and size.supervised <= room.supervised


def _tiles_of_a_sample(batch: Batch) -> int:
    """Tiles of each sample, N."""
    return batch["pixels" if "pixels" in batch else "features"].shape[1]
