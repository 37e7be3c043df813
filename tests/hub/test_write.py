"""Writing checkpoints: our parameters out and back, and the base with adapters merged in."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mars_jax.errors import ConfigError
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.write import write_checkpoint, write_merged
from mars_jax.runtime.trees import flatten
from tests.helpers import tiny_llava


@pytest.fixture(scope="module")
def model():
    return tiny_llava.torch_model()


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory, max_shard_size="40KB")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("template")
    (directory / "pytorch_model.bin").write_bytes(b"stale")
    return directory


@pytest.mark.parametrize("settings", [{}, {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True}])
def test_a_written_checkpoint_reads_back_and_loads_in_transformers(settings, tmp_path):
    torch_model = tiny_llava.torch_model(**settings)
    torch_model.save_pretrained(tmp_path / "original")
    _, params = read_checkpoint(tmp_path / "original", "float32")
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    write_checkpoint(tmp_path / "written", tiny_llava.config_json(torch_model), params, "float32", [extra])

    jax.tree.map(np.testing.assert_array_equal, read_checkpoint(tmp_path / "written", "float32")[1], params)
    assert (tmp_path / "written" / "tokenizer.json").read_text() == "{}"
    loaded, info = type(torch_model).from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(info.values()), info
    batch, _ = tiny_llava.inputs(torch_model, [[(31, 57)]])
    expected = tiny_llava.torch_logits(torch_model, batch)
    np.testing.assert_allclose(tiny_llava.torch_logits(loaded.eval(), batch), expected, rtol=0, atol=1e-5)


def test_a_written_checkpoint_has_hub_names_and_the_dtype_asked_for(model, base, tmp_path):
    write_checkpoint(tmp_path, tiny_llava.config_json(model), read_checkpoint(base, "float32")[1], "bfloat16")
    with safe_open(tmp_path / "model.safetensors", "numpy") as tensors:
        names = set(tensors.keys())
        dtypes = {tensors.get_tensor(name).dtype for name in names}
    assert {
        "vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight",
        "language_model.model.layers.0.self_attn.o_proj.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.lm_head.weight",
        "image_newline",
    } <= names
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}


def test_parameters_that_are_not_those_of_the_configuration(model, base, tmp_path):
    config = tiny_llava.config_json(model)
    _, params = read_checkpoint(base, "float32")
    with pytest.raises(ConfigError, match=r"differ in 1 paths: image_newline"):
        write_checkpoint(tmp_path, config, {k: v for k, v in params.items() if k != "image_newline"}, "float32")
    with pytest.raises(ConfigError, match=r"image_newline has shape \[3\]; config_json asks for \[32\]"):
        write_checkpoint(tmp_path, config, params | {"image_newline": np.zeros(3)}, "float32")
    with pytest.raises(
        ConfigError, match=r"has 2 vision layers, of which the parameters hold the 1 in use.*same model"
    ):
        write_checkpoint(tmp_path, config | {"vision_feature_layer": -2}, params, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_base_plus_update_in_the_dtype_of_the_base(dtype, model, base, tmp_path):
    _, params = read_checkpoint(base, dtype)
    source = base
    if dtype == "bfloat16":
        source = tmp_path / "base"
        write_checkpoint(source, tiny_llava.config_json(model), params, dtype)
    adapters = tiny_llava.random_adapters(params, {"vision": 2, "projector": 3, "llm": 4}, padded=8)
    write_merged(tmp_path / "merged", source, adapters)

    _, merged = read_checkpoint(tmp_path / "merged", dtype)
    before, updates = flatten(params), flatten(adapters)
    changed = 0
    for path, leaf in flatten(merged).items():
        linear = path.removesuffix("/kernel")
        expected = before[path].astype(np.float32)
        if f"{linear}/a" in updates:
            assert not np.array_equal(leaf, before[path]), path
            expected = expected + 2.0 * updates[f"{linear}/a"] @ updates[f"{linear}/b"]
            changed += 1
        np.testing.assert_allclose(
            leaf.astype(np.float32), expected, rtol=1e-5 if dtype == "float32" else 2**-8, atol=1e-6, err_msg=path
        )
    assert changed == 6 + 2 + 7


def test_a_merged_checkpoint_keeps_shards_and_companions(base, tmp_path):
    _, params = read_checkpoint(base, "float32")
    write_merged(tmp_path, base, tiny_llava.random_adapters(params, {"llm": 4}))
    names = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in tmp_path.iterdir()} == names
    before, after = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, tmp_path))
    assert after["metadata"] == before["metadata"]
    assert sorted(after["weight_map"].values()) == sorted(before["weight_map"].values())
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in after["weight_map"]


def test_merging_into_the_wrong_place_or_base(base, tmp_path):
    _, params = read_checkpoint(base, "float32")
    adapters = tiny_llava.random_adapters(params, {"llm": 4})
    with pytest.raises(ConfigError, match=r"is the base checkpoint itself"):
        write_merged(base, base, adapters)
    leaves = adapters["llm"]["layers"]["self_attn"]["q_proj"]
    deeper = {"llm": {"layers": {"self_attn": {"q_proj": {k: np.repeat(v, 2, axis=0) for k, v in leaves.items()}}}}}
    with pytest.raises(
        ConfigError, match=r"no place for the adapter of 'llm/layers/self_attn/q_proj' with shape \[4, 32"
    ):
        write_merged(tmp_path, base, deeper)
    wider = {"llm": {"layers": {"self_attn": {"q_proj": leaves | {"b": np.zeros((2, 4, 7), np.float32)}}}}}
    with pytest.raises(ConfigError, match=r"has shape \[32, 32\], its adapter makes \[7, 32\]"):
        write_merged(tmp_path, base, wider)


def test_merging_into_a_base_that_lacks_a_tensor(model, base, tmp_path):
    adapters = tiny_llava.random_adapters(read_checkpoint(base, "float32")[1], {"llm": 4})
    model.save_pretrained(tmp_path / "base")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tiny_llava.rewrite(tmp_path / "base", lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ConfigError, match=rf"update 1 tensors that it does not have, such as {name}"):
        write_merged(tmp_path / "merged", tmp_path / "base", adapters)


def test_what_makes_a_checkpoint_usable_is_copied_and_nothing_that_names_other_weights(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    kept = [
        *("chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json"),
        *("video_preprocessor_config.json", "processor_config.json", "added_tokens.json", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json", "tokenizer.model", "qwen.tiktoken"),
    ]
    for name in (*kept, "adapter_config.json", "pytorch_model.bin.index.json", "tf_model.h5"):
        (source / name).write_text("{}")
        (source / name).chmod(0o600)
    _, params = read_checkpoint(base, "float32")
    write_merged(tmp_path / "merged", source, tiny_llava.random_adapters(params, {"llm": 4}))
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names >= set(kept)
    assert not names & {"adapter_config.json", "pytorch_model.bin.index.json", "tf_model.h5"}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
