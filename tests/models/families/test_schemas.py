"""Every key of a configuration of transformers is read, refused unless it changes nothing, or known to change nothing.

And whatever stands in a file, it is read or refused at its key.
"""

import copy
import dataclasses
import json
import random

import pytest
import transformers
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from benchmarks.compat.adapter_bases import BASES
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.errors import ConfigError, MarsError
from mars_jax.hub.read import check_weights, read_config
from mars_jax.models.families import hf_json
from mars_jax.models.families.llava.config import LlavaFile, OnevisionFile
from mars_jax.models.families.qwen2_5_vl.config import QwenFile, QwenTextSettings, QwenVisionSettings
from mars_jax.models.families.registry import family_of, model_config, parameters
from tests.helpers import tiny_data

CLIP, SIGLIP, DINOV2, ONEVISION, QWEN = BASES
TEXT, VISION = "text_config", "vision_config"

# Of training from scratch, dropout, generation, other tasks, or attention windows that are refused anyway.
_TEXT = {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_window_layers",
    "pad_token_id",
    "pretraining_tp",
    "sliding_window",
    "use_cache",
}
_VISION = {"attention_dropout", "initializer_factor", "initializer_range", "projection_dim", "vision_use_head"}
_DINOV2 = {
    "_out_features",
    "_out_indices",
    "apply_layernorm",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "hidden_dropout_prob",
    "initializer_range",
    "layerscale_value",
    "reshape_hidden_states",
    "use_mask_token",
}
_SCHEMAS = [
    (transformers.LlamaConfig, hf_json.LlamaSettings, _TEXT),
    (transformers.Qwen2Config, hf_json.Qwen2Settings, _TEXT),
    (Qwen2_5_VLTextConfig, QwenTextSettings, _TEXT),
    (Qwen2_5_VLVisionConfig, QwenVisionSettings, {"initializer_range", "tokens_per_second"}),
    (transformers.CLIPVisionConfig, hf_json.ClipSettings, _VISION),
    (transformers.SiglipVisionConfig, hf_json.SiglipSettings, _VISION),
    (transformers.Dinov2Config, hf_json.Dinov2Settings, _DINOV2),
    (transformers.LlavaConfig, LlavaFile, {"image_seq_length"}),
    (transformers.LlavaOnevisionConfig, OnevisionFile, {"video_token_index"}),
    (transformers.Qwen2_5_VLConfig, QwenFile, {"video_token_id"}),
]


@pytest.mark.parametrize(("theirs", "ours", "harmless"), _SCHEMAS, ids=lambda value: getattr(value, "__name__", ""))
def test_no_key_of_transformers_is_unknown(theirs, ours, harmless):
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    keys = {field.name for field in dataclasses.fields(theirs)} - common
    assert keys - harmless <= set(ours.model_fields)


@pytest.mark.parametrize(("theirs", "ours", "harmless"), _SCHEMAS[:7], ids=lambda value: getattr(value, "__name__", ""))
def test_keys_that_a_file_leaves_out_have_the_values_of_transformers(theirs, ours, harmless):
    expected = theirs()
    names = [name for name, field in ours.model_fields.items() if not field.is_required() and field.default is not None]
    compared = [name for name in names if hasattr(expected, name) and not name.startswith("rope_")]
    for name in compared:
        value = getattr(expected, name)
        ours_default = ours.model_fields[name].get_default(call_default_factory=True)
        assert ours_default == (list(value) if isinstance(value, tuple) else value), name
    assert len(compared) >= 3


@pytest.mark.parametrize(
    ("name", "part", "key", "value", "message"),
    [
        (
            CLIP,
            TEXT,
            "hidden_size",
            "32",
            "text_config.hidden_size is '32'; an integer expected",
        ),
        (CLIP, TEXT, "hidden_size", [32], r"text_config.hidden_size is \[32\]; an integer"),
        (CLIP, TEXT, "hidden_size", None, "text_config.hidden_size is null; an integer"),
        (CLIP, TEXT, "hidden_size", 32.0, r"text_config.hidden_size is 32.0; an integer"),
        (CLIP, TEXT, "hidden_size", True, "text_config.hidden_size is true; an integer"),
        (
            CLIP,
            TEXT,
            "num_hidden_layers",
            10**9,
            "num_hidden_layers is 1000000000; 1024 or less",
        ),
        (CLIP, TEXT, "num_hidden_layers", 0, "num_hidden_layers is 0; 1 or more"),
        (CLIP, TEXT, "rms_norm_eps", float("inf"), "rms_norm_eps is inf; a finite number"),
        (CLIP, TEXT, "rms_norm_eps", -1, "rms_norm_eps is -1; 0 or more"),
        (
            CLIP,
            TEXT,
            "num_attention_heads",
            5,
            "hidden_size is 32; it must be a multiple of num_a",
        ),
        (
            CLIP,
            TEXT,
            "num_key_value_heads",
            3,
            "num_attention_heads is 4; it must be a multiple",
        ),
        (
            CLIP,
            TEXT,
            "head_dim",
            7,
            "text_config.head_dim is 7; rotary positions need an even",
        ),
        (
            CLIP,
            TEXT,
            "attention_bias",
            True,
            "attention_bias is true; this version supports false",
        ),
        (CLIP, TEXT, "mlp_bias", True, "mlp_bias is true; this version supports false"),
        (
            CLIP,
            TEXT,
            "hidden_act",
            "prelu",
            "hidden_act is 'prelu'; this version supports 'gelu', ",
        ),
        (
            CLIP,
            TEXT,
            "partial_rotary_factor",
            0.5,
            "partial_rotary_factor is 0.5; 1.* expected",
        ),
        (
            CLIP,
            TEXT,
            "rope_scaling",
            {"rope_type": "yarn", "factor": 4},
            "text_config.rope_scaling.rope_type is 'yarn'; this version supports 'default', 'linear', 'llama3'",
        ),
        (
            CLIP,
            TEXT,
            "rope_scaling",
            {"rope_type": "linear"},
            "text_config.rope_scaling.factor is null; rope_type 'linear' needs a number",
        ),
        (
            SIGLIP,
            TEXT,
            "rope_parameters",
            {"full_attention": {"rope_type": "default"}},
            r"rope_parameters.full_attention is \{'rope_type': 'default'\}; null expected",
        ),
        (SIGLIP, TEXT, "use_sliding_window", True, "use_sliding_window is true; this version"),
        (
            SIGLIP,
            TEXT,
            "layer_types",
            ["full_attention", "sliding_attention"],
            "layer_types.1 is 'sliding_attention'; this version supports 'full_attention'",
        ),
        (SIGLIP, VISION, "num_channels", 1, "num_channels is 1; this version supports 3"),
        (SIGLIP, VISION, "patch_size", 56, "patch_size is 56; at most image_size = 28"),
        (DINOV2, VISION, "image_size", [28, 56], r"image_size is \[28, 56\]; an integer"),
        (DINOV2, VISION, "qkv_bias", False, "qkv_bias is false; this version supports true"),
        (
            CLIP,
            None,
            "vision_feature_layer",
            0,
            "vision_feature_layer is 0; the embeddings alone leave no",
        ),
        (
            CLIP,
            None,
            "vision_feature_layer",
            [-4],
            r"vision_feature_layer is \[-4\]; the embeddings alone",
        ),
        (CLIP, None, "vision_feature_layer", [], r"vision_feature_layer is \[\]; .*1 or more items"),
        (
            CLIP,
            None,
            "vision_feature_layer",
            "last",
            "vision_feature_layer is 'last'; an integer or a list expected",
        ),
        (CLIP, None, "image_token_id", 4, "image_token_id is 4; image_token_index = 3 expected"),
        (
            CLIP,
            None,
            "image_token_index",
            320,
            "the image token is 320, but the embedding has 320 rows",
        ),
        (CLIP, None, TEXT, [1], r"text_config is \[1\]; an object expected"),
        (
            ONEVISION,
            None,
            "image_grid_pinpoints",
            [[28]],
            "image_grid_pinpoints.0 is .*2 or more items expected",
        ),
        (ONEVISION, None, "vision_aspect_ratio", 9, "vision_aspect_ratio is 9; a text expected"),
        (QWEN, None, "num_attention_heads", 0, "num_attention_heads is 0; 1 or more expected"),
        (
            QWEN,
            VISION,
            "num_heads",
            5,
            "vision_config.hidden_size is 24; it must be a multiple of num_heads",
        ),
        (QWEN, VISION, "window_size", 0, "vision_config.window_size is 0; 1 or more"),
        (
            QWEN,
            VISION,
            "num_hidden_layers",
            9,
            "num_hidden_layers is 9; this version supports null, 3",
        ),
        (QWEN, VISION, "fullatt_block_indexes", 1, "fullatt_block_indexes is 1; a list expected"),
        (
            QWEN,
            VISION,
            "rope_parameters",
            {"rope_type": "linear"},
            "rope_type is 'linear'; this version",
        ),
    ],
)
def test_a_value_that_is_not_possible_is_refused_at_its_key(name, part, key, value, message):
    settings = copy.deepcopy(BASES[name][0])
    (settings[part] if part else settings)[key] = value
    with pytest.raises(ConfigError, match=f"^a/config.json: .*{message}.*that belongs to the checkpoint"):
        model_config(settings, "a/config.json")


@pytest.mark.parametrize(
    ("name", "part", "key", "value"),
    [
        (SIGLIP, TEXT, "use_sliding_window", None),
        (SIGLIP, TEXT, "rope_scaling", None),
        (SIGLIP, TEXT, "layer_types", ["full_attention", "full_attention"]),
        (SIGLIP, TEXT, "num_key_value_heads", None),
        (DINOV2, VISION, "image_size", [28, 28]),
        (CLIP, None, "vision_feature_layer", [-4, 2]),
        (QWEN, None, "image_token_index", 7),
        (QWEN, None, "quantization_config", None),
    ],
)
def test_odd_values_that_mean_something_are_read(name, part, key, value):
    settings = copy.deepcopy(BASES[name][0])
    plain = model_config(settings)
    (settings[part] if part else settings)[key] = value
    config = model_config(settings)
    changed = {"num_key_value_heads", "vision_feature_layer"}
    assert (config == plain) == (key not in changed)
    if key == "vision_feature_layer":
        assert config.vision_feature_layers == (0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, r"\(LlavaLlamaForCausalLM\)"),
        ({"model_type": "llava_qwen", "architectures": None}, r"\(llava_qwen\)"),
        ({"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}, r"\(mm_vision_tower\)"),
        ({"model_type": "llava_mistral", "architectures": "LlavaMistralForCausalLM"}, r"\(llava_mistral\)"),
    ],
)
def test_a_checkpoint_of_llavas_own_code_is_named(settings, message):
    with pytest.raises(ConfigError, match=rf"^x/config.json: original LLaVA format {message}.*Take the -hf conversion"):
        model_config(settings, "x/config.json")


@pytest.mark.parametrize(
    ("key", "settings", "method"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
        ("compression_config", {"format": "float"}, "by an unknown method"),
        ("quantization_config", [], "by an unknown method"),
    ],
)
@pytest.mark.parametrize("part", [None, TEXT])
def test_a_quantised_checkpoint_is_named(key, settings, method, part):
    config = copy.deepcopy(BASES[ONEVISION][0])
    (config[part] if part else config)[key] = settings
    with pytest.raises(ConfigError, match=rf"{key} is there: the weights are quantised \({method}\).*quantised from"):
        model_config(config)


# Anything at all.

_ODD = [None, True, 0, -1, 1, 7, 2**31, 10**30, 0.5, 1e400, -1e400, float("nan"), "", "default", [], [1], [[1]], {}]
_ODD += [{"a": 1}, ["x"] * 3, "\x00", [None], 10**9, {"height": 28, "width": "x"}, [28, 28], {"shortest_edge": 10**7}]
_BUDGET = 150


def places(value, path=()):
    """The keys of a document, at any depth."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def mutated(document, rng):
    """A copy with one or two values of another kind, a key that is gone, or a key that is known elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2])):
        *parents, key = rng.choice(places(document))
        parent = document
        for name in parents:
            parent = parent[name]
        if rng.random() < 0.1 and isinstance(parent, dict):
            del parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(_ODD))
    return document


def outcome(work):
    """What becomes of odd input: any other error than ours fails the test."""
    try:
        work()
    except MarsError:
        return "refused"
    return "read"


@pytest.mark.parametrize("name", BASES)
def test_any_config_is_read_or_refused_in_words(name):
    rng, seen = random.Random(0), set()
    settings = copy.deepcopy(BASES[name][0]) | {"architectures": ["X"], "tie_word_embeddings": False}
    text = settings.get(TEXT, settings)
    text |= {"head_dim": 8, "attention_bias": False, "use_sliding_window": None, "hidden_act": "silu"}
    if "rope_scaling" not in text:
        text["rope_parameters"] = {"rope_theta": 10.0, "rope_type": "default"}
    for _ in range(5 * _BUDGET):
        seen.add(outcome(lambda: parameters(model_config(json.loads(json.dumps(mutated(settings, rng)))))))
    assert seen == {"read", "refused"}


@pytest.mark.parametrize("name", BASES)
def test_any_processor_file_is_read_or_refused_in_words(name, tmp_path):
    rng, seen = random.Random(1), set()
    settings, processor = BASES[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = model_config(settings)
    tiny_data.tokenizer().save_pretrained(tmp_path)
    processor = {**processor, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    processor |= {"do_center_crop": None, "rescale_factor": 1 / 255, "do_rescale": True, "pad_size": None}
    for number in range(_BUDGET):
        document = mutated(processor, rng)
        nested = number % 2
        text = json.dumps({"image_processor": document} if nested else document)
        (tmp_path / "preprocessor_config.json").write_text("{}" if nested else text)
        (tmp_path / "processor_config.json").write_text(text if nested else "{}")
        seen.add(outcome(lambda: family_of(config).load_pictures(tmp_path, config, None)))
    assert seen == {"read", "refused"}


def test_any_index_is_read_or_refused_in_words(tmp_path):
    rng, seen = random.Random(2), set()
    (tmp_path / "config.json").write_text(json.dumps(BASES[CLIP][0]))
    index = {"metadata": {"total_size": 5}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    for value in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "model-1.safetensors\x00"):
        index["weight_map"]["b"] = value
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigError, match=r"a file in weight_map is .*the name of a safetensors file beside it"):
            check_weights(tmp_path)
    for _ in range(_BUDGET):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(mutated(index, rng)))
        seen.add(outcome(lambda: check_weights(tmp_path)))
    assert seen == {"refused"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "is nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "is nested too deeply; at most 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit .*Fetch the file again"),
        (b'{"a": "\xff"}', "cannot be read: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "not JSON at line 1, column 1: Unexpected UTF-8 BOM"),
        (b"[1]", "holds a JSON list; an object is needed"),
        (b"", "not JSON at line 1, column 1"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json", "index"])
def test_a_file_that_is_no_json_object_is_refused(file, content, message, tmp_path):
    tiny_data.checkpoint(tmp_path)
    name = "model.safetensors.index.json" if file == "index" else file
    (tmp_path / name).write_bytes(content)
    work = check_weights if file == "index" else read_config if file == "config.json" else load_preprocessor
    with pytest.raises(ConfigError, match=f"{name}: {message}"):
        work(tmp_path)
