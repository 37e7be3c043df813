"""Reading checkpoints: the three key layouts, shards, dtypes, tied heads, and every way a directory can be wrong."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mars_jax.errors import ConfigError
from mars_jax.hub.read import check_weights, read_checkpoint
from mars_jax.models.families.llava.model import LlavaOnevision
from mars_jax.runtime.trees import flatten
from tests.helpers import tiny_llava

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model():
    return tiny_llava.torch_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layout", ["hub", "memory", "saved"])
def test_every_layout_gives_the_tensors_of_torch(layout, model, copy):
    tiny_llava.rewrite(copy, lambda tensors: {tiny_llava.in_layout(k, layout): v for k, v in tensors.items()})
    _, params = read_checkpoint(copy, "float32")

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    flat = flatten(params)
    vision, llm = "model.vision_tower", "model.language_model"
    expected = {
        "vision/patch_embed/kernel": state[f"{vision}.embeddings.patch_embedding.weight"].reshape(24, 3 * 14 * 14).T,
        "vision/position_embed": state[f"{vision}.embeddings.position_embedding.weight"],
        "vision/layers/layer_norm2/bias": np.stack(
            [state[f"{vision}.encoder.layers.{i}.layer_norm2.bias"] for i in range(2)]
        ),
        "projector/linear_1/kernel": state["model.multi_modal_projector.linear_1.weight"].T,
        "image_newline": state["model.image_newline"],
        "llm/layers/self_attn/k_proj/kernel": np.stack(
            [state[f"{llm}.layers.{i}.self_attn.k_proj.weight"].T for i in range(2)]
        ),
        "llm/embed_tokens/embedding": state[f"{llm}.embed_tokens.weight"],
        "llm/lm_head/kernel": state["lm_head.weight"].T,
    }
    for path, value in expected.items():
        np.testing.assert_array_equal(flat[path], value, err_msg=path)
    unused = sum(tensor.size for name, tensor in state.items() if "post_layernorm" in name)
    assert sum(leaf.size for leaf in flat.values()) == sum(tensor.size for tensor in state.values()) - unused


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text": {"tie_word_embeddings": True, "head_dim": 16}, "tie_word_embeddings": True},
        {"vision_feature_layer": -2, "multimodal_projector_bias": False},
    ],
)
def test_parameters_are_those_that_the_flax_model_initialises(settings, tmp_path):
    torch_model = tiny_llava.torch_model(**settings)
    torch_model.save_pretrained(tmp_path)
    _, batch = tiny_llava.inputs(torch_model, [[(28, 28)]])
    config, params = read_checkpoint(tmp_path, "float32")
    init = jax.eval_shape(lambda: LlavaOnevision(config).init(jax.random.key(0), batch, method="logits"))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init)


def test_shards_are_read_as_the_index_lists_them(model, saved, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stale = {"language_model.model.norm.weight": np.zeros(32, np.float32), "other": np.zeros(1, np.float32)}
    save_file(stale, tmp_path / "model-00001-of-00002.safetensors")
    whole, sharded = read_checkpoint(saved, "float32")[1], read_checkpoint(tmp_path, "float32")[1]
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def test_dtypes_are_cast_tensor_by_tensor(saved, copy):
    def mix(tensors):
        return {
            k: v.astype([np.float32, np.float16, ml_dtypes.bfloat16][i % 3]) for i, (k, v) in enumerate(tensors.items())
        }

    tiny_llava.rewrite(copy, mix)
    exact = flatten(read_checkpoint(saved, "float32")[1])
    for dtype in (jnp.bfloat16, "float32"):
        params = flatten(read_checkpoint(copy, dtype)[1])
        for path, leaf in params.items():
            assert leaf.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(leaf.astype(np.float32), exact[path], rtol=2**-7, err_msg=path)


def test_tied_head_must_equal_the_embedding(copy):
    edit_config(copy, tie_word_embeddings=True)
    tiny_llava.rewrite(copy, lambda tensors: tensors | {HEAD: tensors[EMBEDDING]})
    config, params = read_checkpoint(copy, "float32")
    assert config.text.tie_word_embeddings
    assert "lm_head" not in params["llm"]
    tiny_llava.rewrite(copy, lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + 1})
    with pytest.raises(
        ConfigError, match=r"ties the word embeddings, yet 'language_model.lm_head.weight' differs.*false"
    ):
        read_checkpoint(copy, "float32")


def test_what_the_model_never_reads_may_be_there(copy):
    extra = {
        "vision_tower.vision_model.head.probe": np.zeros((1, 1, 24), np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 4), np.int64),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    tiny_llava.rewrite(copy, lambda tensors: tensors | extra)
    read_checkpoint(copy, "float32")


def drop(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(EMBEDDING), rf"Missing 1: {EMBEDDING}\. Not part of the model 0: none"),
        (
            lambda t: t | {"language_model.model.layers.7.mlp.bias": t[EMBEDDING]},
            r"Not part of the model 1: .*layers\.7",
        ),
        (
            lambda t: t | {EMBEDDING: t[EMBEDDING][:5]},
            r"embed_tokens.weight' has shape \[5, 32\].*asks for \[128, 32\]",
        ),
        (
            lambda t: t | {EMBEDDING: t[EMBEDDING].astype(np.int8)},
            rf"the weights are quantised \(stored as I8: {EMBEDDING}\).*Take the checkpoint that they were quantised",
        ),
        (
            lambda t: t | {"model.language_model.embed_tokens.weight": t[EMBEDDING]},
            r"are the same parameter in two key layouts",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, copy):
    tiny_llava.rewrite(copy, change)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(copy, "float32")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config.json: no such file.*hf download"),
        ("config.json", '{"model_type": ', r"config.json: not JSON at line 1, column 16"),
        ("config.json", "[]", r"holds a JSON list; an object is needed"),
        ("config.json", b"\xff\xfe", r"config.json: cannot be read"),
        (
            "config.json",
            '{"model_type": "llava_next"}',
            r"'llava_next'.*Supported families: llava, llava_onevision, qwen2_5_vl",
        ),
        ("model.safetensors", None, r"neither model.safetensors nor .* found: config.json.*Only safetensors"),
        ("model.safetensors", "version https://git-lfs", r"not a complete safetensors file \(23 bytes\).*Git LFS"),
        ("model.safetensors.index.json", "{}", r"index.json: weight_map is missing"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}',
            r"lists 2 shards, of which 1 are not there: other.safetensors.*fetch them again",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model.safetensors"}}',
            r"does not describe model.safetensors; they differ in \d+ tensors: a, ",
        ),
    ],
)
def test_files_that_are_missing_or_broken(name, content, message, copy):
    path = copy / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(copy, "float32")


def test_truncated_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model.safetensors: not a complete safetensors file .* fetch it again"):
        read_checkpoint(copy, "float32")


def edited_header(path, change):
    """Rewrites the header of a safetensors file, as a function of its JSON."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header[HEAD].update(shape=[2**62, 4]), "not a complete safetensors file"),
        (lambda header: header[HEAD].update(shape=[-1, 4]), "not a complete safetensors file"),
        (lambda header: header[HEAD].update(dtype="X"), "not a complete safetensors file"),
        (lambda header: header[HEAD].update(data_offsets=[0, 10**12]), "not a complete safetensors file"),
        (
            lambda header: header.update({"x" * 10**5: header.pop(HEAD)}),
            r"Not part of the model 1: 'xxxx.*\.\.\..*xxx'\. ",
        ),
        (lambda header: header.update({"a\x1b[2J": header.pop(HEAD)}), r"Not part of the model 1: 'a\\x1b\[2J'\. "),
    ],
    ids=["overflow", "negative", "dtype", "offsets", "long name", "control characters"],
)
def test_a_hostile_header_is_refused_in_few_and_plain_words(change, message, copy):
    edited_header(copy / "model.safetensors", change)
    for work in (check_weights, lambda directory: read_checkpoint(directory, "float32")):
        with pytest.raises(ConfigError, match=message) as refusal:
            work(copy)
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 1500
