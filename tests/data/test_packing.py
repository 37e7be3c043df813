"""Packed batches: every sample once and whole, little padding, and the loss and gradients of the batch as it was."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_jax.adapters.targets import find_targets
from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable
from mars_jax.config.adapted import DEFAULT_MODULES
from mars_jax.data.packing import Assignment, Packing, plan_packing
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.shapes import Size
from mars_jax.errors import DataError
from mars_jax.hub.read import read_checkpoint
from mars_jax.lanes.step import loss_and_gradients, summed_loss
from mars_jax.models.families.registry import build_model
from mars_jax.runtime.trees import flatten
from tests.helpers import llava_kinds, tiny_data, tiny_job, tiny_lanes, tiny_llava, tiny_qwen

BATCH = 16
# Every model is compiled to run once: the time goes to the compiler.
QUICK = {"xla_backend_optimization_level": 0}


# What lies in which row.


def batch_of(sizes, seed=0, rows_per_tile=2):
    """A batch of samples of such sizes, random where that doesn't matter."""
    rng, count = np.random.default_rng(seed), len(sizes)
    length, tiles, supervised = np.maximum(np.max(sizes, axis=0), 1)
    batch = {
        "tokens": rng.integers(1, 1000, (count, length)).astype(np.int32),
        "pixels": rng.normal(size=(count, tiles, 3)).astype(np.float32),
        "image_index": np.full((count, length, 1), -1, np.int32),
        "image_weight": rng.random((count, length, 1)).astype(np.float32),
        "targets": rng.integers(0, 1000, (count, supervised)).astype(np.int32),
        "target_positions": np.zeros((count, supervised), np.int32),
        "target_weights": np.zeros((count, supervised), np.float32),
    }
    for sample, size in enumerate(sizes):
        # The last of its tokens predicts a target, so that the sample is that long; the first may be tiles' or text.
        chosen = rng.permutation(size.tokens - 1)[: size.supervised - 1]
        batch["target_positions"][sample, : size.supervised] = [*np.sort(chosen), size.tokens - 1]
        batch["target_weights"][sample, : size.supervised] = 1
        for tile in range(size.tiles):
            batch["image_index"][sample, tile, 0] = tile * rows_per_tile + rng.integers(rows_per_tile)
        if size.tiles and size.tokens > size.tiles:
            batch["image_index"][sample, size.tiles, 0] = tiles * rows_per_tile  # the newline
    return batch


sizes_of_samples = st.lists(
    st.integers(1, 40).flatmap(
        lambda tokens: st.builds(
            Size, st.just(tokens), st.integers(0, min(tokens, 5)), st.integers(1, max(1, tokens // 2))
        )
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(sizes_of_samples, st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_every_sample_is_in_one_row_whole_with_its_tiles_and_targets(sizes, row_block, seed):
    packing = plan_packing(np.asarray(sizes), len(sizes), row_block, rows_per_tile=2).packing
    batch = batch_of(sizes, seed)
    packed = packing.pack(batch)
    tiles = packed["tiles"]["pixels"].reshape(-1, 3)
    found = []
    for width, blocks, room in zip(("wide", "narrow"), packed["blocks"], (packing.wide, packing.narrow), strict=True):
        rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in packed[width].items()}
        assert all(array.shape[1] == row_block for array in packed[width].values())
        assert rows["tokens"].shape[1:] == (room.tokens,)
        assert not (rows["segments"][blocks * row_block :] >= 0).any()
        assert not rows["target_weights"][blocks * row_block :].any()
        for row in range(blocks * row_block):
            one = {name: array[row] for name, array in rows.items()}
            for segment in range(1, one["segments"].max() + 1):
                own = np.flatnonzero(one["segments"] == segment)
                np.testing.assert_array_equal(own, np.arange(own[0], own[0] + len(own)))
                np.testing.assert_array_equal(one["positions"][own], np.arange(len(own)))
                targets = np.isin(one["target_positions"], own) & (one["target_weights"] > 0)
                # Its random tokens identify where it came from.
                lies = [
                    sample
                    for sample, size in enumerate(sizes)
                    if size.tokens == len(own)
                    and (batch["tokens"][sample, : len(own)] == one["tokens"][own]).all()
                    and (batch["targets"][sample, : size.supervised].tolist() == one["targets"][targets].tolist())
                ]
                sample = next(sample for sample in lies if sample not in found)
                found.append(sample)
                positions = batch["target_positions"][sample, : sizes[sample].supervised]
                np.testing.assert_array_equal(one["target_positions"][targets] - own[0], positions)
                for place, token in enumerate(own):
                    was, now = batch["image_index"][sample, place, 0], one["image_index"][token, 0]
                    if was < 0:
                        assert now == -1
                    elif was == 2 * batch["pixels"].shape[1]:
                        assert now == 2 * room.tiles
                    else:
                        tile = tiles[one["tile_index"][now // 2]]
                        np.testing.assert_array_equal(tile, batch["pixels"][sample, was // 2])
                        assert now % 2 == was % 2
                    assert one["image_weight"][token, 0] == batch["image_weight"][sample, place, 0]
    assert sorted(found) == list(range(len(sizes)))
    # Padding weighs nothing, and no more is computed than the batch as it was.
    weights = sum(packed[width]["target_weights"].sum() for width in ("wide", "narrow"))
    assert weights == batch["target_weights"].sum()
    if row_block == 1:
        assert packing.computed_tokens(packing.assign(np.asarray(sizes))) <= len(sizes) * packing.narrow.tokens


# Tokens, tiles and supervised tokens of 2000 samples.
def instructions(rng):
    """Text alone, a picture with a question, and several pictures: about 250 tokens, 1000 at most."""
    kind = rng.choice(3, 2000, p=[0.3, 0.6, 0.1])
    text = np.where(kind == 0, np.exp(rng.normal(5.0, 0.6, 2000)), np.exp(rng.normal(4.0, 0.6, 2000))).astype(int)
    tiles = np.choose(kind, [np.zeros(2000, int), np.ones(2000, int), rng.integers(2, 5, 2000)])
    return np.stack([np.minimum(text + 196 * tiles, 1000), tiles, np.maximum(text // 3, 1)], axis=1)


def any_resolution(rng):
    """One picture of two to ten tiles, all tokens of which are read."""
    tiles, text = rng.integers(2, 11, 2000), rng.integers(20, 200, 2000)
    return np.stack([729 * tiles + text, tiles, text // 4], axis=1)


def any_size(rng):
    """A picture of its own size, as Qwen2.5-VL reads it, in windows of 16 tokens."""
    tokens = np.clip(np.exp(rng.normal(5.7, 0.7, 2000)), 16, 1280).astype(int)
    return np.stack([tokens + rng.integers(20, 100, 2000), -(-tokens // 12), rng.integers(2, 40, 2000)], axis=1)


def short(rng):
    """Questions of about one length."""
    return np.stack([rng.integers(20, 44, 2000), np.ones(2000, int), rng.integers(2, 4, 2000)], axis=1)


@pytest.mark.parametrize("data", [instructions, any_resolution, any_size, short])
def test_less_than_a_tenth_of_mixed_lengths_is_padding(data):
    rng = np.random.default_rng(1)
    sizes = data(rng)
    plan = plan_packing(sizes, BATCH, 1, rows_per_tile=1)
    packing = plan.packing
    computed = used = 0
    for _ in range(200):
        chosen = sizes[rng.choice(len(sizes), BATCH, replace=False)]
        computed += packing.computed_tokens(packing.assign(chosen))
        used += chosen[:, 0].sum()
    assert 1 - used / computed < 0.1
    assert plan.padding["tokens"] == pytest.approx(1 - used / computed, abs=0.015)
    assert 1 - sizes[:, 0].mean() / sizes[:, 0].max() > 0.25  # as it was


def test_blocks_of_rows_are_filled_up():
    sizes = np.asarray([(9, 0, 1), (9, 0, 1), (8, 0, 1), (6, 0, 1), (5, 0, 1), (2, 0, 1)])
    rooms = Size(10, 1, 10), Size(15, 1, 15)
    single = Packing(*rooms, row_block=1, rows_per_tile=1).assign(sizes)
    assert single == ([[0, 3], [1, 4]], [[2, 5]])
    # With one block of wide rows the narrow one is computed as well; four narrow rows would be two blocks.
    packing = Packing(*rooms, row_block=3, rows_per_tile=1)
    assert packing.assign(sizes) == ([[0, 3], [1, 4], [2, 5]], [])
    assert packing.computed_rows(packing.assign(sizes)) == (3, 0)


def test_a_sample_that_no_row_has_room_for_is_refused():
    packing = plan_packing(np.asarray([(5, 1, 2), (8, 1, 2)]), 2, 1, rows_per_tile=2).packing
    with pytest.raises(
        DataError, match=r"^sample 1 of a batch needs Size\(tokens=9, .* more than a row's Size\(tokens"
    ):
        packing.pack(batch_of([Size(5, 1, 2), Size(9, 1, 2)]))


def test_whatever_the_encoder_takes_of_tiles_is_left_where_it_lies():
    sizes = [Size(6, 2, 2), Size(5, 1, 2)]
    packing = plan_packing(np.asarray(sizes), 2, row_block=1, rows_per_tile=2).packing
    batch = batch_of(sizes) | {"patch_depths": np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)}
    packed = packing.pack(batch)
    assert set(packed["tiles"]) == {"pixels", "patch_depths"}
    assert packed["tiles"]["patch_depths"] is batch["patch_depths"]
    assert "patch_depths" not in packed["narrow"]


# Loss and gradients.


@pytest.mark.parametrize(
    ("family", "cached"),
    [
        ("llava_onevision", False),
        ("scaled_down", False),
        ("qwen2_5_vl", False),
        ("llava", False),
        ("llava_onevision", True),
    ],
)
def test_loss_and_gradients_are_those_of_the_batch_as_it_was(family, cached, tmp_path, monkeypatch):
    if family == "qwen2_5_vl":
        tiny_qwen.checkpoint(tmp_path / "base", tiny_qwen.torch_model())
    elif family == "llava":
        llava_kinds.KINDS["clip, llama"].checkpoint(tmp_path / "base")
    else:
        limit = {"vision_aspect_ratio": "anyres_max_1"} if family == "scaled_down" else {}
        text = {"vocab_size": 300, "max_position_embeddings": 512}
        model = tiny_llava.torch_model(text=text, image_token_index=tiny_data.IMAGE_TOKEN_ID, **limit)
        model.save_pretrained(tmp_path / "base")
        config_json = (tmp_path / "base" / "config.json").read_text()
        tiny_data.checkpoint(tmp_path / "base")
        (tmp_path / "base" / "config.json").write_text(config_json)
    _, batch, _ = tiny_data.batch(tiny_data.conversations(tmp_path), tmp_path / "base")
    batch = {name: array[[0, 1, 2, 3, 2]] for name, array in batch.items()}
    assert (batch["image_weight"].shape[2] > 1) == (family == "scaled_down")

    config, base = read_checkpoint(tmp_path / "base", "float32")
    model = build_model(config)
    modules = {
        name: settings["targets"] for name, settings in DEFAULT_MODULES.items() if not (cached and name == "vision")
    }
    adapters = init_adapters(jax.random.key(0), find_targets(base, modules), dict.fromkeys(modules, 2))
    rng = np.random.default_rng(0)
    trainable, scales = split_trainable(
        jax.tree.map(lambda leaf: np.float32(rng.normal(0.0, 0.3, leaf.shape)), adapters)
    )
    if cached:
        encode = jax.jit(partial(model.apply, method="encode"), compiler_options=QUICK)
        batch["features"] = np.asarray(encode({"params": base}, batch))
        for name in ("pixels", "patch_positions", "patch_images"):
            batch.pop(name, None)

    rows_per_tile = load_preprocessor(tmp_path / "base").pictures.rows_per_tile
    # Blocks of two rows: in the one pictures after pictures and words after them, in the other a row to spare.
    monkeypatch.setattr(Packing, "assign", lambda *_: Assignment([[1, 0], [3, 2]], [[4]]))
    packing = Packing(Size(0, 0, 0), Size(0, 0, 0), 2, rows_per_tile)
    sizes = packing.sizes(batch)
    assert (sizes[:, 1] > 0).tolist() == [True, True, False, True, False]
    packing = replace(packing, narrow=Size(*sizes.max(axis=0)), wide=Size(*(sizes[0] + sizes[1] + 1)))
    packed = packing.pack(batch)
    assert packed["blocks"].tolist() == [1, 1]

    @partial(jax.jit, compiler_options=QUICK)
    def derived(leaves, batch, base):
        def summed(leaves, rows):
            return summed_loss(model, base, join_trainable(leaves, scales), rows)

        return loss_and_gradients(summed, leaves, batch)

    loss, gradients = derived(trainable, batch, base)
    value, slopes = derived(trainable, packed, base)
    assert loss > 1
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    for path, slope in flatten(slopes).items():
        expected = np.asarray(flatten(gradients)[path])
        largest = np.abs(expected).max()
        assert largest > 0, path
        np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-5 * largest, err_msg=path)


class PackedStream:
    """`tiny_lanes.Stream` of batches of four, as they are or packed, with some samples cut short before their end."""

    def __init__(self, packing=None):
        self._pool, self._packing = tiny_lanes.examples(8, seed=1), packing
        self._pool["target_weights"][::2, 1] = 0

    def __getitem__(self, step):
        chosen = np.random.default_rng(step).integers(0, 8, 4)
        batch = {name: leaf[chosen] for name, leaf in self._pool.items()}
        return self._packing.pack(batch) if self._packing else batch


def test_lanes_that_read_packed_batches_on_two_devices_end_as_they_did():
    sizes = np.asarray([(6, 1, 1), (8, 1, 2)])
    packing = plan_packing(sizes, 4, row_block=2, rows_per_tile=tiny_lanes.CONFIG.vision.num_patches).packing
    blocks = {tuple(PackedStream(packing)[step]["blocks"].tolist()) for step in range(8)}
    assert len(blocks) > 1
    timing = tiny_lanes.schedule([0, 3, 8])
    options = {"rates": dict.fromkeys(tiny_lanes.RATES, 3e-4)}
    results = []
    for mesh, stream in (({"lane": 1}, PackedStream()), ({"lane": 2, "data": 2}, PackedStream(packing))):
        engine = tiny_lanes.engine(tiny_lanes.PADDED, num_slots=4, lane_block=2, mesh_sizes=mesh)
        # Compiled once, for the first batches, whatever the number of rows.
        engine = replace(engine, chunk=tiny_lanes.Program(engine.chunk))
        results.append(tiny_lanes.run(tiny_lanes.LANES, engine, timing, stream=stream, **options))
    before, after = results
    for expected, rows in zip(before.points, after.points, strict=True):
        for left, right in zip(expected, rows, strict=True):
            for name in ("train_loss", "validation_loss", "update_norm"):
                if getattr(left, name) is not None:
                    assert getattr(right, name) == pytest.approx(getattr(left, name), rel=1e-4), name


# In a run.


def mixed_records(folder):
    """Records with a picture and a question or two, or words alone; some are long."""
    path = tiny_job.records(folder, 60)
    items = json.loads(path.read_text())
    for i, item in enumerate(items):
        if i % 4 == 3:
            item["image"] = []
            item["conversations"][0]["value"] = "what colour?"
        item["conversations"][0]["value"] += " a square" * (12 if i % 5 == 0 else i % 3)
    path.write_text(json.dumps(items))
    return path


def test_a_packed_run_ends_where_the_run_as_it_was_does(tmp_path):
    base, train = tiny_job.checkpoint(tmp_path / "base"), mixed_records(tmp_path)
    results = {}
    for packing, command in ((False, "probe"), (True, "run")):
        run = tmp_path / command
        config = tiny_job.config(tmp_path / f"{command}.yaml", base, train, run, data={"packing": packing})
        done = tiny_job.mars(command, config, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        lanes = [json.loads(line) for line in (run / "probes" / "lanes.jsonl").read_text().splitlines()]
        plan = json.loads((run / "plan.json").read_text())
        note = next(line for line in done.stderr.splitlines() if "are padding" in line)
        results[packing] = (lanes, json.loads((run / "data.json").read_text())["padding"], note, plan)
    (before, share, told_before, plan), (after, other_share, told_after, packed_plan) = results[False], results[True]
    assert share == other_share
    assert share["batch_size"] == 4
    assert 0 < share["packed"]["tokens"] < 0.6 * share["unpacked"]["tokens"]
    form = "data: {tokens:.0%} of the tokens and {tiles:.0%} of the tiles that a step of 4 samples computes are padding"
    text = {name: form.format(**share[name]) for name in ("packed", "unpacked")}
    assert f"{text['unpacked']}, unpacked; it would be" in told_before
    assert f"{text['packed']}, packed; it would be" in told_after
    for left, right in zip(before, after, strict=True):
        assert left["lane"] == right["lane"]
        assert right["best_loss"] == pytest.approx(left["best_loss"], rel=1e-3)
    # Less is computed, as the plan says; less memory is needed, since a row is computed at a time.
    assert packed_plan["flops"] < 0.95 * plan["flops"]
    assert packed_plan["step_memory_bytes"] < plan["step_memory_bytes"]
