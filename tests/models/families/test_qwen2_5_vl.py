"""Our Qwen2.5-VL against transformers and peft: pictures and positions, logits, LoRA gradients, files in and out."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mars_jax.adapters.tree import join_trainable, split_trainable
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.errors import ConfigError, DataError
from mars_jax.hub.adapter import read_adapter, write_adapter
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.verify import verify_adapter, verify_merged
from mars_jax.hub.write import write_checkpoint, write_merged
from mars_jax.models.families.pictures import rotary_positions
from mars_jax.models.families.qwen2_5_vl.table import TABLE
from mars_jax.models.families.qwen2_5_vl.windows import WindowGeometry, window_tokens
from mars_jax.models.families.registry import build_model, model_config
from mars_jax.runtime.json_object import read_json_object
from mars_jax.runtime.trees import flatten, unflatten
from tests.helpers import tiny_qwen

TOLERANCE = 1e-4
# Every model is compiled to run once: the time goes to the compiler.
QUICK = {"xla_backend_optimization_level": 0}
RANKS = {"vision": 2, "projector": 3, "llm": 4}

# peft 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MODELS = {
    "grouped": {},
    "tied, multi_query, wide window": {
        "text": {
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        "vision": {"window_size": 112, "fullatt_block_indexes": [0, 2], "num_heads": 3},
    },
    "windows only, small patches": {"vision": {"patch_size": 7, "window_size": 42, "fullatt_block_indexes": []}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, its folder, and a batch."""
    folder = tmp_path_factory.mktemp("qwen")
    model = tiny_qwen.torch_model()
    tiny_qwen.checkpoint(folder / "base", model)
    return model, folder / "base", tiny_qwen.case(folder, folder / "base")


def logits_of(directory, case, adapters=None):
    config, params = read_checkpoint(directory, "float32")
    apply = partial(build_model(config).apply, method="logits")
    return np.asarray(jax.jit(apply, compiler_options=QUICK)({"params": params, "lora": adapters or {}}, case.batch))


def random_adapters(params, ranks=RANKS, scale=1.7):
    """Adapters of every linear, with random a and b."""
    rng, flat = np.random.default_rng(0), {}
    shapes = flatten(params)
    for path in TABLE.linears:
        *layers, d_in, d_out = shapes[f"{path}/kernel"].shape
        rank = ranks[path.split("/")[0]]
        flat[f"{path}/a"] = rng.normal(0, 0.15, (*layers, d_in, rank)).astype(np.float32)
        flat[f"{path}/b"] = rng.normal(0, 0.15, (*layers, rank, d_out)).astype(np.float32)
        flat[f"{path}/scale"] = np.full(layers, scale, np.float32)
    return unflatten(flat)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    model = tiny_qwen.torch_model(**MODELS[name])
    tiny_qwen.checkpoint(tmp_path / "base", model)
    case = tiny_qwen.case(tmp_path, tmp_path / "base")
    with torch.no_grad():
        expected = model(**case.torch_inputs).logits.numpy()
    ours = logits_of(tmp_path / "base", case)
    assert np.abs(expected[case.mask]).max() > 1.0
    np.testing.assert_allclose(ours[case.mask], expected[case.mask], rtol=0, atol=TOLERANCE)


def test_lora_gradients_equal_peft_and_remat_changes_nothing(base, tmp_path):
    _, directory, case = base
    config, params = read_checkpoint(directory, "float32")
    write_adapter(tmp_path, random_adapters(params), RANKS, config, base_name=str(directory), provenance={})
    reference = tiny_qwen.torch_model()
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path), is_trainable=True).eval()
    tokens = case.batch["tokens"]
    labels = np.where(case.mask & (tokens != tiny_qwen.IMAGE_TOKEN_ID), tokens, -100)
    their_loss = adapted(**case.torch_inputs, labels=torch.from_numpy(labels).long()).loss
    their_loss.backward()

    adapters, ranks = read_adapter(tmp_path, config)
    assert ranks == RANKS
    supervised = labels[:, 1:] != -100
    places = np.arange(supervised.shape[1], dtype=np.int32)
    batch = case.batch | {
        "targets": np.maximum(labels[:, 1:], 0).astype(np.int32),
        "target_positions": np.broadcast_to(places[None], supervised.shape),
        "target_weights": supervised.astype(np.float32),
    }

    def loss(trainable, scales, params):
        variables = {"params": params, "lora": join_trainable(trainable, scales)}
        losses, counts = build_model(config, "attention").apply(variables, batch, method="loss")
        return losses.sum() / counts.sum()

    our_loss, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(*split_trainable(adapters), params)

    np.testing.assert_allclose(float(our_loss), their_loss.item(), rtol=0, atol=TOLERANCE)
    their_gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if "lora_" in name}
    compared = 0
    for path, gradient in flatten(gradients).items():
        linear, _, side = path.rpartition("/")
        key = TABLE.memory_key(TABLE.linears[linear].key.removesuffix(".weight"))
        for layer, ours in enumerate(gradient if gradient.ndim == 3 else gradient[None]):
            name = f"base_model.model.{key.format(layer=layer)}.lora_{side.upper()}.default.weight"
            expected = their_gradients[name].numpy().T
            largest = np.abs(expected).max()
            assert largest > 1e-4, name
            tolerance = min(TOLERANCE, 1e-3 * largest)
            np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=tolerance, err_msg=name)
            compared += 1
    assert compared == len(their_gradients) == 2 * (3 * 5 + 2 + 2 * 7)


def test_exports_compute_in_torch_what_they_compute_here(base, tmp_path):
    _, directory, case = base
    config, params = read_checkpoint(directory, "float32")
    adapters = random_adapters(params)
    write_adapter(tmp_path / "adapter", adapters, RANKS, config, base_name="base", provenance={})
    write_merged(tmp_path / "merged", directory, adapters)
    batch = {name: value.numpy() for name, value in case.torch_inputs.items()}
    ours, plain = logits_of(directory, case, adapters), logits_of(directory, case)
    result = verify_adapter(tmp_path / "adapter", directory, batch, ours, plain)
    assert result["tensors"] == 2 * (3 * 5 + 2 + 2 * 7)
    assert result["moved"] > 0.1
    assert verify_merged(tmp_path / "merged", directory, batch, ours, plain)["moved"] > 0.1
    settings = read_json_object(tmp_path / "adapter" / "adapter_config.json")
    assert settings["rank_pattern"] == {r".*visual\.blocks\..*": 2, r".*visual\.merger\..*": 3}
    assert "enable_tower_connector_lora" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_every_layout_is_read_and_written_back(base, layout, tmp_path):
    model, directory, _ = base
    config_json = read_json_object(directory / "config.json")
    if layout == "hub":  # as the files of the hub: the decoder's settings at the top
        text = config_json.pop("text_config")
        rope = {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        config_json = text | config_json | rope
        del config_json["rope_parameters"]
    _, params = read_checkpoint(directory, "float32")
    write_checkpoint(tmp_path, config_json, params, "float32")
    if layout == "memory":
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({TABLE.memory_key(key): value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    config, again = read_checkpoint(tmp_path, "float32")
    assert config == read_checkpoint(directory, "float32")[0]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert sum(leaf.size for leaf in flatten(params).values()) == sum(x.numel() for x in model.parameters())
    names = set(flatten(jax.eval_shape(lambda: build_model(config).init(jax.random.key(0), base[2].batch))["params"]))
    assert names == set(flatten(params))


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(3136, 1003520), (784, 15680)]))
@example(10, 10, (3136, 1003520))
@example(56, 4000, (3136, 1003520))
def test_pictures_are_scaled_as_transformers_scales_them(height, width, limits):
    geometry = WindowGeometry(14, 2, 4, *limits)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(DataError, match=f"height {height} and width {width} is too thin"):
            geometry.grid((height, width))
        return
    expected = smart_resize(height, width, 28, *limits)
    assert tuple(28 * side for side in geometry.grid((height, width))) == expected


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5))
def test_every_group_has_its_own_place_in_a_window_of_its_neighbours(rows, columns, side):
    tokens = window_tokens((rows, columns), side)
    index = tokens.index[:, 0].reshape(rows, columns)
    assert len(set(index.ravel())) == rows * columns
    assert index.max() < tokens.num_tiles * side**2
    assert tokens.num_tiles == -(-rows // side) * -(-columns // side)
    window = index // side**2
    for number in range(tokens.num_tiles):
        down, across = np.nonzero(window == number)
        assert 0 <= np.ptp(down) < side
        assert 0 <= np.ptp(across) < side
        assert (down // side).min() == (down // side).max()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4)), max_size=3), st.integers(1, 4))
def test_positions_are_those_of_transformers(parts, tail):
    types, grids, pictures = [], [], []
    for words, rows, columns in parts:
        # Two pictures without a word between them are one run of image tokens to transformers, and two to us.
        types += [0] * max(words, 1) + [1] * (rows * columns)
        grids.append([1, 2 * rows, 2 * columns])
        pictures.append(window_tokens((rows, columns), 4))
    types = np.asarray([*types, *[0] * tail])
    ours = rotary_positions(len(types), np.flatnonzero(types), pictures)
    if not grids:
        np.testing.assert_array_equal(ours, np.broadcast_to(np.arange(len(types))[:, None], ours.shape))
        return
    expected, _ = POSITIONS.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long), torch.from_numpy(types)[None], torch.tensor(grids)
    )
    np.testing.assert_array_equal(ours, expected[:, 0].T)


POSITIONS = tiny_qwen.torch_model().model


def test_a_picture_counts_the_tokens_that_transformers_counts(base):
    case = base[2]
    grids = case.torch_inputs["image_grid_thw"].numpy()
    ours = (case.batch["image_index"][:, :, 0] >= 0).sum()
    assert ours == (grids.prod(axis=1) // 4).sum()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vision_config": {"out_hidden_size": 30}}, "vision_config.out_hidden_size is 30; this version supports 32"),
        ({"vision_config": {"window_size": 100}}, "window_size is 100; it must be a multiple of patch_size x"),
        ({"text_config": {"vocab_size": None}}, "text_config.vocab_size is missing"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type is 'yarn'; this version supports"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}}},
            r"mrope_section is \[1, 1, 1\]; three numbers that add up to half the head size, 4",
        ),
        (
            {"text_config": {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]}}},
            r"rope_scaling.mrope_section is \[1, 1, 1\]",  # the key that the file has
        ),
    ],
)
def test_settings_that_are_not_supported_are_named(base, change, text, tmp_path):
    config = read_json_object(base[1] / "config.json")
    for part, values in change.items():
        for key, value in values.items():
            config[part] = {k: v for k, v in config[part].items() if k != key} | ({key: value} if value else {})
    with pytest.raises(ConfigError, match=f"^some/config.json: .*{text}"):
        model_config(config, "some/config.json")


def test_defaults_of_the_encoder_are_those_of_transformers():
    theirs = transformers.Qwen2_5_VLConfig(vision_config={"hidden_size": 1280}).vision_config
    text = {
        "hidden_size": 3584,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 9,
    }
    token = {"image_token_id": 3}
    ours = model_config({"model_type": "qwen2_5_vl", **text, **token, "vision_config": {"hidden_size": 1280}}).vision
    assert (ours.num_layers, ours.num_heads, ours.intermediate_size) == (theirs.depth, theirs.num_heads, 3420)
    assert (ours.patch_size, ours.merge_size, ours.window_size) == (14, theirs.spatial_merge_size, theirs.window_size)
    assert list(ours.full_attention_layers) == list(theirs.fullatt_block_indexes)


@pytest.mark.parametrize("nested", [False, True])
def test_defaults_of_the_decoder_are_those_of_transformers(nested):
    sizes = {"hidden_size": 1024, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 8}
    sizes |= {"vocab_size": 9, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"vision_config": {"out_hidden_size": 1024}}
    text = {"text_config": sizes} if nested else sizes
    ours = model_config({"model_type": "qwen2_5_vl", "image_token_id": 3, **text, **vision}).text
    theirs = transformers.Qwen2_5_VLTextConfig(**sizes)
    assert (ours.num_kv_heads, ours.rms_norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_processor_of_another_model_is_refused(base, tmp_path):
    directory = shutil.copytree(base[1], tmp_path / "base")
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 16}))
    with pytest.raises(ConfigError, match=r"the image processor has patch_size = 16, but config.json has 14"):
        load_preprocessor(directory)


def test_larger_pictures_are_scaled_down_to_the_pixels_of_the_config(base):
    _, directory, _ = base
    small = load_preprocessor(directory, max_pixels=28 * 28 * 6).pictures
    large = load_preprocessor(directory).pictures
    picture = Image.fromarray(np.zeros((200, 300, 3), np.uint8))
    (fewer,), (more,) = small.tokens([(200, 300)]), large.tokens([(200, 300)])
    assert (len(fewer.index), len(more.index)) == (6, 15)
    assert (small.tiles([picture])["patch_images"] >= 0).sum() == 4 * 6
    with pytest.raises(ConfigError, match=r"max_pixels is 100, but the image processor in .* to 784 pixels at least"):
        load_preprocessor(directory, max_pixels=100)


def test_padding_windows_change_nothing(base):
    _, directory, case = base
    spare = {"pixels": np.ones, "patch_positions": np.zeros, "patch_images": partial(np.full, fill_value=-1)}
    wider = dict(case.batch)
    for name, fill in spare.items():
        array = wider[name]
        more = fill((array.shape[0], 2, *array.shape[2:])).astype(array.dtype)
        wider[name] = np.concatenate([array, more], axis=1)
    np.testing.assert_allclose(
        logits_of(directory, case._replace(batch=wider)), logits_of(directory, case), rtol=0, atol=1e-5
    )
