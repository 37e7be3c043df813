"""Packing: the samples of a training batch end to end in fewer rows, so that little of what is computed is padding.

A packed batch is the same batch in another layout, with the same loss. Which samples it has is the business of
`batches`; that rows are added up, and rows without samples not computed, that of `lanes.engine`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mars_jax.data.batches import Batch
from mars_jax.data.shapes import Size
from mars_jax.errors import DataError

# Rows come in two widths, T and T times this. With T alone 11 to 13 % of what is computed would be padding, where 16
# samples have mixed lengths, since the last row is seldom full and one of few.
_WIDE = 1.5
# Of rows filled by tokens alone, how many have room for their tiles and supervised tokens. More room would be padding.
_ROOM_QUANTILE = 0.95
# Samples, in batches, from which room and padding are worked out; and numbers of wide rows tried for a batch.
_TRIED_SAMPLES = 1024
_TRIED_WIDE_ROWS = 16
_UNLIMITED = 2**31

# What the encoder reads of a sample is left where it lies, since it is large: rows say which tiles they take.
_TILES = ("pixels", "features", "patch_positions")

PackedBatch = dict[str, Any]
"""See `Packing.pack`."""


class Places(NamedTuple):
    """Which samples of a batch lie in which row, in order, for the rows of each width."""

    wide: list[list[int]]
    narrow: list[list[int]]


@dataclass(frozen=True)
class Packing:
    """How the batches of a data set are packed.

    Attributes:
        narrow: room of a row that takes T tokens, those of the longest sample; every sample fits.
        wide: room of a wider row.
        row_block: k, rows that are computed at a time, a multiple of the mesh's parts of a batch.
        rows_per_tile: feature rows that a tile gives.
    """

    narrow: Size
    wide: Size
    row_block: int
    rows_per_tile: int

    def places(self, sizes: NDArray[np.int64]) -> Places:
        """First fit, the longest sample first, into some wide rows and then narrow ones: as many as compute least.

        Args:
            sizes: [B, 3], a `Size` for each sample.
        """
        order = np.argsort(-sizes[:, 0], kind="stable").tolist()
        needed = [Size(*size) for size in sizes.tolist()]
        numbers = range(0, len(order) + 1, math.ceil(len(order) / _TRIED_WIDE_ROWS))
        return min((self._first_fit(needed, order, most) for most in numbers), key=self.computed_tokens)

    def _first_fit(self, needed: Sequence[Size], order: Sequence[int], most_wide: int) -> Places:
        """Each sample, in this order, to the first row that has room for it, of which only so many may be wide."""
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
        return Places(wide + narrow[:spare], narrow[spare:])

    def computed_tokens(self, places: Places) -> int:
        """Tokens that are computed of a batch, padding included."""
        wide, narrow = self.computed_rows(places)
        return wide * self.wide.tokens + narrow * self.narrow.tokens

    def computed_rows(self, places: Places) -> tuple[int, int]:
        """Wide and narrow rows that are computed, those that fill up a block included."""
        blocks = [-(-len(rows) // self.row_block) for rows in places]
        return blocks[0] * self.row_block, blocks[1] * self.row_block

    def pack(self, batch: Batch) -> PackedBatch:
        """Lays a batch [B, ...] out in rows.

        A sample ends with its last target, since no loss depends on what comes after it.

        Returns:
            tiles: `pixels` or `features`, and `patch_positions`, [B, N, ...], as they were.
            blocks: int32 [2], blocks of k rows that hold samples, wide and narrow ones, from the first.
            wide, narrow: the rows, arrays [blocks, k, ...] with room for any batch. They are those of a batch of k
                samples (`tokens`, `image_index`, `image_weight`, `targets`, `target_positions`, `target_weights`,
                `patch_images`) with `positions` and `segments` (see `qwen2.Layout`: samples are segments 1, 2, ...),
                and

                tile_index   int32 [blocks, k, N row]   which of all B * N tiles of the batch

        Raises:
            DataError: a sample that needs more than a narrow row.
        """
        sizes = self.sizes(batch)
        for number in np.flatnonzero((sizes > self.narrow).any(axis=1)):
            raise DataError(
                f"sample {number} of a batch needs {Size(*sizes[number].tolist())}, more than a row's {self.narrow}. "
                "Plan the packing with it."
            )
        places, count = self.places(sizes), len(sizes)
        # A row that isn't narrow holds two samples or more.
        most = {"wide": max(1, -(-(count // 2) // self.row_block)), "narrow": -(-count // self.row_block)}
        return {
            "tiles": {name: batch[name] for name in _TILES if name in batch},
            "blocks": np.asarray(self.computed_rows(places), np.int32) // self.row_block,
            "wide": self._rows(batch, sizes, places.wide, self.wide, most["wide"]),
            "narrow": self._rows(batch, sizes, places.narrow, self.narrow, most["narrow"]),
        }

    def sizes(self, batch: Batch) -> NDArray[np.int64]:
        """The `Size` of every sample of a batch, [B, 3]; tokens after the last target don't count."""
        supervised, index = batch["target_weights"] > 0, batch["image_index"]
        tokens = np.where(supervised, batch["target_positions"], -1).max(axis=1) + 1
        seen = np.arange(index.shape[1])[None] < tokens[:, None]
        own = np.where(seen[..., None] & (index < self._newline(batch)), index, -1).max(axis=(1, 2))
        return np.stack([tokens, own // self.rows_per_tile + 1, supervised.sum(axis=1)], axis=1).astype(np.int64)

    def _newline(self, batch: Batch) -> int:
        """The feature row of the newline, in a sample's `image_index`."""
        return _tiles_of_a_sample(batch) * self.rows_per_tile

    def _rows(
        self, batch: Batch, sizes: NDArray[np.int64], rows: Sequence[Sequence[int]], room: Size, blocks: int
    ) -> dict[str, NDArray[Any]]:
        """The arrays of all rows of one width, [blocks, k, ...]."""
        count, (length, tiles, supervised) = blocks * self.row_block, room
        in_order = np.arange(batch["tokens"].shape[1], dtype=np.int32)[None]
        positions = batch.get("positions", np.broadcast_to(in_order, batch["tokens"].shape))
        arrays: dict[str, NDArray[Any]] = {
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
        if "patch_images" in batch:
            arrays["patch_images"] = np.full((count, tiles, batch["patch_images"].shape[2]), -1, np.int32)
        for row, samples in enumerate(rows):
            views = {name: array[row] for name, array in arrays.items()}
            start, pictures = np.zeros(3, np.int64), 0
            for segment, sample in enumerate(samples, 1):
                stop = start + sizes[sample]
                token, tile, target = (slice(*ends) for ends in zip(start, stop, strict=True))
                own = slice(sizes[sample][0])
                views["segments"][token] = segment
                views["positions"][token] = positions[sample, own]
                for name in ("tokens", "image_weight"):
                    views[name][token] = batch[name][sample, own]
                index = batch["image_index"][sample, own]
                moved = np.where(index < 0, -1, index + start[1] * self.rows_per_tile)
                views["image_index"][token] = np.where(index < self._newline(batch), moved, tiles * self.rows_per_tile)
                of_sample = batch["target_weights"][sample] > 0
                views["target_positions"][target] = batch["target_positions"][sample, of_sample] + start[0]
                for name in ("targets", "target_weights"):
                    views[name][target] = batch[name][sample, of_sample]
                first = sample * _tiles_of_a_sample(batch)
                views["tile_index"][tile] = first + np.arange(sizes[sample][1])
                if "patch_images" in views:
                    images = batch["patch_images"][sample, : sizes[sample][1]]
                    views["patch_images"][tile] = np.where(images < 0, -1, images + pictures)
                    pictures += int(images.max(initial=-1)) + 1
                start = stop
        return {name: array.reshape(blocks, self.row_block, *array.shape[1:]) for name, array in arrays.items()}


@dataclass(frozen=True)
class PackingPlan:
    """How batches will be packed, and what comes of it on average, told by random batches.

    Attributes:
        packing: of the batches.
        wide_rows: rows of a batch that are computed.
        narrow_rows: likewise.
        padding: its shares in the tokens and in the tiles that are computed.
    """

    packing: Packing
    wide_rows: float
    narrow_rows: float
    padding: dict[str, float]


def plan_packing(sizes: NDArray[np.int64], batch_size: int, row_block: int, rows_per_tile: int) -> PackingPlan:
    """Works out what rows have room for: all that any sample needs, and most rows that are filled by tokens alone.

    Args:
        sizes: [samples, 3], a `Size` for each sample that will be packed.
        batch_size: B.
        row_block: k, see `Packing`.
        rows_per_tile: feature rows that a tile gives.
    """
    largest = Size(*sizes.max(axis=0).tolist())
    wide = math.ceil(_WIDE * largest.tokens)
    by_tokens = [Size(width, _UNLIMITED, _UNLIMITED) for width in (largest.tokens, wide)]
    free = Packing(by_tokens[0], by_tokens[1], row_block, rows_per_tile)
    seen: tuple[list[NDArray[np.int64]], ...] = ([], [])
    for batch in _random_batches(sizes, batch_size, seed=0):
        for sums, rows in zip(seen, free.places(batch), strict=True):
            sums += [batch[row].sum(axis=0) for row in rows]

    def room(width: int, sums: list[NDArray[np.int64]], least: Size) -> Size:
        _, tiles, supervised = (
            np.ceil(np.quantile(sums, _ROOM_QUANTILE, axis=0)).astype(int).tolist() if sums else least
        )
        return Size(width, max(tiles, least.tiles, 1), max(supervised, least.supervised))

    narrow = room(largest.tokens, seen[1], largest)
    packing = Packing(narrow, room(wide, seen[0], narrow), row_block, rows_per_tile)
    batches = _random_batches(sizes, batch_size, seed=1)
    counts = np.asarray([packing.computed_rows(packing.places(batch)) for batch in batches])
    computed = counts.sum(axis=0) @ np.asarray([packing.wide, packing.narrow])
    shares = (1.0 - batches.sum(axis=(0, 1)) / computed).tolist()
    wide_rows, narrow_rows = counts.mean(axis=0).tolist()
    return PackingPlan(packing, wide_rows, narrow_rows, dict(zip(("tokens", "tiles"), shares, strict=False)))


def _random_batches(sizes: NDArray[np.int64], batch_size: int, seed: int) -> NDArray[np.int64]:
    """Sizes of the samples of some batches, [batches, B, 3]."""
    number = max(8, _TRIED_SAMPLES // batch_size)
    return sizes[np.random.default_rng(seed).integers(0, len(sizes), (number, batch_size))]


def _added(left: Size, right: Size) -> Size:
    return Size(left.tokens + right.tokens, left.tiles + right.tiles, left.supervised + right.supervised)


def _fits(size: Size, room: Size) -> bool:
    return size.tokens <= room.tokens and size.tiles <= room.tiles and size.supervised <= room.supervised


def _tiles_of_a_sample(batch: Batch) -> int:
    """N."""
    return batch["pixels" if "pixels" in batch else "features"].shape[1]
