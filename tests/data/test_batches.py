"""Shapes, examples, streams, padded evaluation batches and the picture controls, on a tiny checkpoint folder."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mars_jax.data.batches import eval_batches, stream, subset
from mars_jax.data.examples import ExampleSource
from mars_jax.data.formats.base import Turn
from mars_jax.data.images import load_rgb
from mars_jax.data.preprocessor import Preprocessor, load_preprocessor
from mars_jax.data.preview import preview
from mars_jax.data.records import Record
from mars_jax.data.shapes import Shapes, plan_shapes
from mars_jax.errors import ConfigError, DataError
from mars_jax.evals.controls import can_shuffle, image_blind, shuffle_images
from mars_jax.models.families.llava.anyres import AnyresPictures, image_tokens
from tests.helpers import tiny_data
from tests.helpers.tiny_data import IMAGE_TOKEN_ID, save_picture

SIZES = [(40, 60), (28, 28), (60, 40), (56, 56)]


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory: pytest.TempPathFactory) -> Preprocessor:
    return load_preprocessor(tiny_data.checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [save_picture(folder / f"{number}.png", *size, seed=number) for number, size in enumerate(SIZES)]


def record(number: int, picture: Path | None, answer: str = "a red square") -> Record:
    question = "what shape?" if picture is None else "<image>\nwhat shape?"
    turns = (Turn("user", question), Turn("assistant", answer))
    images, digests = ((), ()) if picture is None else ((picture,), (picture.name,))
    group = f"image:{digests[0]}" if digests else f"text:{number}"
    return Record(str(number), images, turns, f"item {number}", group, digests)


@pytest.fixture
def records(pictures: list[Path]) -> list[Record]:
    with_pictures = [record(number, pictures[number % 4], f"a red square {number}") for number in range(6)]
    return [*with_pictures, record(6, None, "text 6")]


@pytest.fixture
def source(records: list[Record], preprocessor: Preprocessor) -> ExampleSource:
    return ExampleSource(records, preprocessor, plan_shapes(records, preprocessor, 500).shapes)


def test_planned_shapes_are_the_largest_needs(
    records: list[Record], preprocessor: Preprocessor, source: ExampleSource
) -> None:
    plan = plan_shapes(records, preprocessor, 500)
    lengths = [int((example["tokens"] != 0).sum()) for example in source]
    assert plan.shapes == Shapes(max(lengths), 5, max(int(e["target_weights"].sum()) for e in source), 1)
    assert (plan.kept, plan.dropped) == (tuple(records), ())


def test_example_follows_the_batch_contract(
    records: list[Record], preprocessor: Preprocessor, source: ExampleSource
) -> None:
    tokens, tiles, supervised = source.shapes.max_tokens, source.shapes.max_tiles, source.shapes.max_supervised
    for number, one in enumerate(records):
        example = source[number]
        assert {name: (array.dtype.name, array.shape) for name, array in example.items()} == {
            "tokens": ("int32", (tokens,)),
            "pixels": ("float32", (tiles, 3, 28, 28)),
            "image_index": ("int32", (tokens, 1)),
            "image_weight": ("float32", (tokens, 1)),
            "targets": ("int32", (supervised,)),
            "target_positions": ("int32", (supervised,)),
            "target_weights": ("float32", (supervised,)),
        }
        real = example["target_weights"] == 1
        assert preprocessor.tokenizer.decode(example["targets"][real]) == one.turns[1].text + "<|im_end|>"
        np.testing.assert_array_equal(
            example["tokens"][example["target_positions"][real] + 1], example["targets"][real]
        )
        is_image = example["tokens"] == IMAGE_TOKEN_ID
        np.testing.assert_array_equal(example["image_index"][:, 0] >= 0, is_image)
        np.testing.assert_array_equal(example["image_weight"][:, 0], is_image)
        if one.images:
            assert isinstance(preprocessor.pictures, AnyresPictures)
            own = image_tokens(*SIZES[number % 4], preprocessor.pictures.geometry)
            expected = np.where(own.index == -1, tiles * preprocessor.pictures.rows_per_tile, own.index)
            np.testing.assert_array_equal(example["image_index"][is_image], expected)
            pixels = preprocessor.pictures.tiles([load_rgb(one.images[0])])["pixels"]
            np.testing.assert_array_equal(example["pixels"][: len(pixels)], pixels)
            assert not example["pixels"][len(pixels) :].any()
        else:
            assert not example["pixels"].any()


def test_bilinear_corners_and_their_padding(tmp_path: Path, pictures: list[Path]) -> None:
    pinpoints = {"vision_aspect_ratio": "anyres_max_1"}  # the picture of 4 tiles is scaled down, that of 1 is not
    preprocessor = load_preprocessor(tiny_data.checkpoint(tmp_path, **pinpoints))
    records = [record(0, pictures[1]), record(1, pictures[3])]
    shapes = plan_shapes(records, preprocessor, 500).shapes
    assert shapes.corners == 4
    for number, example in enumerate(ExampleSource(records, preprocessor, shapes)):
        is_image = example["tokens"] == IMAGE_TOKEN_ID
        assert (example["image_index"][is_image] >= 0).all()
        assert (example["image_index"][~is_image] == -1).all()
        np.testing.assert_allclose(example["image_weight"].sum(axis=1), is_image)
        assert (example["image_weight"][:, 1:].any()) == (number == 1)


def test_data_without_pictures_have_one_zero_tile(preprocessor: Preprocessor) -> None:
    records = [record(0, None), record(1, None)]
    shapes = plan_shapes(records, preprocessor, 500).shapes
    assert (shapes.max_tiles, shapes.corners) == (1, 1)
    example = ExampleSource(records, preprocessor, shapes)[1]
    assert not example["pixels"].any()
    assert (example["image_index"] == -1).all()


def test_too_long_records_are_dropped_whole_and_named(
    records: list[Record], preprocessor: Preprocessor, pictures: list[Path]
) -> None:
    long = record(99, pictures[0], "a red square " * 50)
    plan = plan_shapes([records[0], long, records[1]], preprocessor, 100)
    assert plan.kept == (records[0], records[1])
    (dropped, length), *more = plan.dropped
    assert (dropped.id, more) == ("99", [])
    assert plan_shapes([long], preprocessor, length).shapes.max_tokens == length
    with pytest.raises(DataError, match=rf"none of 1 records fits max_tokens = 100; the shortest has {length} tokens"):
        plan_shapes([long], preprocessor, 100)


def test_record_with_nothing_to_learn(preprocessor: Preprocessor) -> None:
    silent = replace(record(5, None), turns=(Turn("user", "hello"),))
    with pytest.raises(DataError, match=r"item 5 \(id '5'\): no supervised tokens, so nothing to learn"):
        plan_shapes([silent], preprocessor, 500)


def test_too_thin_picture_is_named(preprocessor: Preprocessor, tmp_path: Path) -> None:
    thin = save_picture(tmp_path / "thin.png", 1, 300)
    with pytest.raises(
        DataError, match=r"item 0 \(id '0'\): .*thin.png: a picture of height 1 and width 300 is too thin"
    ):
        plan_shapes([record(0, thin)], preprocessor, 500)


def test_record_beyond_the_shapes(records: list[Record], preprocessor: Preprocessor) -> None:
    small = ExampleSource(records, preprocessor, Shapes(10, 5, 10, 1))
    with pytest.raises(
        DataError, match=r"item 0 \(id '0'\) needs Shapes\(max_tokens=\d+, .* Plan the shapes with this"
    ):
        small[0]


def test_picture_that_vanished(preprocessor: Preprocessor, tmp_path: Path) -> None:
    one = record(0, save_picture(tmp_path / "gone.png"))
    shapes = plan_shapes([one], preprocessor, 500).shapes
    source = ExampleSource([one], preprocessor, shapes, cache_bytes=0)
    first = source[0]
    (tmp_path / "gone.png").write_bytes((tmp_path / "gone.png").read_bytes()[:60])
    assert first["pixels"].any()
    with pytest.raises(DataError, match=r"item 0 \(id '0'\).*gone.png"):
        source[0]


def test_cache_serves_repeats_without_the_file_and_forgets_the_oldest(
    preprocessor: Preprocessor, tmp_path: Path
) -> None:
    paths = [save_picture(tmp_path / f"{number}.png", 56, 56, seed=number) for number in range(3)]
    records = [record(number, path) for number, path in enumerate(paths)]
    shapes = plan_shapes(records, preprocessor, 500).shapes
    tile_bytes = 5 * 3 * 28 * 28 * 4
    source = ExampleSource(records, preprocessor, shapes, cache_bytes=int(2.5 * tile_bytes))
    examples = [source[number] for number in range(3)]
    for path in paths:
        path.unlink()
    for number in (1, 2):
        for name, array in source[number].items():
            np.testing.assert_array_equal(array, examples[number][name])
    with pytest.raises(DataError):
        source[0]


def test_source_is_safe_in_threads(records: list[Record], preprocessor: Preprocessor, source: ExampleSource) -> None:
    expected = [source[number]["pixels"].sum() for number in range(len(source))]
    shared = ExampleSource(records, preprocessor, source.shapes, cache_bytes=100_000)
    order = list(range(len(source))) * 20
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda number: shared[number]["pixels"].sum(), order))
    assert sums == [expected[number] for number in order]


def test_subsets_are_nested() -> None:
    small, large = subset(1000, 128, 7), subset(1000, 256, 7)
    assert large[:128] == small
    assert len(set(large)) == 256
    assert subset(1000, 128, 8) != small
    with pytest.raises(
        ConfigError, match=r"num_samples is 1001, but the training split has 1000 records. Choose 1 to 100"
    ):
        subset(1000, 1001, 7)


def answers(batch: dict[str, np.ndarray], preprocessor: Preprocessor) -> list[str]:
    rows = zip(batch["targets"], batch["target_weights"] == 1, strict=True)
    return [preprocessor.tokenizer.decode(targets[real]).removesuffix("<|im_end|>") for targets, real in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_stream_covers_every_epoch_and_loses_nothing(
    source: ExampleSource, records: list[Record], preprocessor: Preprocessor, batch_size: int
) -> None:
    indices = [0, 2, 3, 5, 6]
    batches = stream(source, indices, seed=3, batch_size=batch_size)
    steps = -(-15 // batch_size)
    seen = [answer for step in range(steps) for answer in answers(batches[step], preprocessor)][:15]
    epochs = [seen[:5], seen[5:10], seen[10:15]]
    wanted = Counter(records[index].turns[1].text for index in indices)
    assert [Counter(epoch) for epoch in epochs] == [wanted] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_stream_is_a_function_of_seed_and_step(source: ExampleSource, preprocessor: Preprocessor) -> None:
    def targets(seed: int, steps: range) -> list[list[str]]:
        batches = stream(source, range(7), seed=seed, batch_size=2)
        return [answers(batches[step], preprocessor) for step in steps]

    assert targets(1, range(10, 14)) == targets(1, range(14))[10:]  # resume
    assert targets(1, range(14)) != targets(2, range(14))


def test_eval_batches_are_padded_with_rows_that_weigh_nothing(
    source: ExampleSource, records: list[Record], preprocessor: Preprocessor
) -> None:
    batches = list(eval_batches(source, 3))
    assert [valid for _, valid in batches] == [3, 3, 1]
    seen = list(itertools.chain(*(answers(batch, preprocessor)[:valid] for batch, valid in batches)))
    assert seen == [one.turns[1].text for one in records]
    last = batches[-1].batch
    assert {array.shape[0] for array in last.values()} == {3}
    assert last["target_weights"][0].any()
    assert not last["target_weights"][1:].any()


def test_image_blind_batch_differs_in_pixels_only(source: ExampleSource) -> None:
    batch, _ = next(eval_batches(source, 3))
    blind = image_blind(batch)
    assert batch["pixels"].any()
    assert not blind["pixels"].any()
    assert all(blind[name] is batch[name] for name in batch if name != "pixels")


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_pictures_are_always_others(records: list[Record], seed: int) -> None:
    shuffled = shuffle_images(records, seed)
    for before, after in zip(records, shuffled, strict=True):
        assert (after.id, after.turns) == (before.id, before.turns)
        assert (after.digests != before.digests) == bool(before.images)
        assert bool(after.images) == bool(before.images)
    assert {r.digests for r in shuffled} == {r.digests for r in records}
    assert shuffled == shuffle_images(list(records), seed)


def test_a_limit_of_pixels_is_refused_where_pictures_are_tiled(tmp_path: Path) -> None:
    folder = tiny_data.checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"max_pixels is 99, but .*config.json is of llava_onevision, whose tiles"):
        load_preprocessor(folder, max_pixels=99)


def test_samples_are_shown_with_the_tokens_of_each_picture_counted(
    preprocessor: Preprocessor, pictures: list[Path]
) -> None:
    two = replace(
        record(0, pictures[0]),
        images=(pictures[0], pictures[1]),
        digests=("a", "b"),
        turns=(Turn("user", "<image> or <image>?"), Turn("assistant", "a red square")),
    )
    records = [two, record(1, pictures[1]), record(2, None)]
    side_by_side = replace(preprocessor, tokenizer=tiny_data.tokenizer(tiny_data.PICTURES_FIRST))
    for used in (side_by_side, preprocessor):
        both, one, none = preview(records, used, plan_shapes(records, used, 500).shapes)
        assert both["text"].count("[5 image tokens]") == 2  # one tile of four patches and a newline each
    assert one["text"].count("[10 image tokens]") == 1  # thumbnail, tile, and two newlines
    assert "image tokens" not in none["text"]
    assert both["supervised"] == "a red square<|im_end|>"
    for sample in (both, one, none):
        ((start, end),) = sample["learned"]
        assert sample["text"][start:end] == sample["supervised"]


@pytest.mark.parametrize("seed", range(5))
def test_no_record_is_shown_a_picture_of_its_own_in_another_place(pictures: list[Path], seed: int) -> None:
    def several(number: int, *places: int) -> Record:
        images = tuple(pictures[place] for place in places)
        return replace(record(number, pictures[0]), images=images, digests=tuple("abcd"[place] for place in places))

    records = [several(0, 0, 1), several(1, 2, 1, 0), several(2, 3)]
    for before, after in zip(records, shuffle_images(records, seed), strict=True):
        assert not set(before.digests) & set(after.digests)
        assert after.images == tuple(pictures["abcd".index(digest)] for digest in after.digests)
    assert not can_shuffle([several(0, 0, 1), several(1, 1)])
    with pytest.raises(DataError, match=r"more different pictures than any record has.*have 2\. Leave the control out"):
        shuffle_images([several(0, 0, 1), several(1, 1)], seed)


def test_shuffled_pictures_need_two(pictures: list[Path]) -> None:
    with pytest.raises(DataError, match=r"needs more different pictures than any record has.*have 1\. Leave"):
        shuffle_images([record(0, pictures[0]), record(1, pictures[0])], 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("absent", r"config.json: no such file. A checkpoint is a local directory with config.json"),
        ("null", r"config.json: image_token_index is null; an integer expected"),
    ],
)
def test_load_preprocessor_errors(tmp_path: Path, change: str, text: str) -> None:
    folder = tiny_data.checkpoint(tmp_path, image_token_index=None)
    if change == "absent":
        (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=text):
        load_preprocessor(folder)
