"""Our LLaVA of any encoder and decoder against transformers and peft: logits, exports, and files read and written."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mars_jax.adapters.targets import find_targets
from mars_jax.config.adapted import DEFAULT_MODULES
from mars_jax.data.images import load_rgb
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.errors import ConfigError
from mars_jax.hub.adapter import read_adapter, write_adapter
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.verify import verify_adapter, verify_merged
from mars_jax.hub.write import write_checkpoint, write_merged
from mars_jax.models.families.registry import build_model, checkpoint_table, model_config, parameters
from mars_jax.models.flops import BatchShape, evaluation_flops, lane_step_flops
from mars_jax.runtime.json_object import read_json_object
from mars_jax.runtime.trees import flatten, unflatten
from tests.helpers import tiny_data
from tests.helpers.llava_kinds import CLIP, DINOV2, KINDS, TEXT

TOLERANCE = 1e-4
# Every model is compiled to run once: the time goes to the compiler.
QUICK = {"xla_backend_optimization_level": 0}
RANKS = {"vision": 2, "projector": 3, "llm": 4}

# peft 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """A model of transformers, its folder, our batch, transformers' inputs, and the mask of real tokens."""
    folder = tmp_path_factory.mktemp("llava")
    kind = KINDS[request.param]
    model = kind.checkpoint(folder / "base")
    records, batch, mask = tiny_data.batch(tiny_data.conversations(folder), folder / "base")
    pictures = [load_rgb(path) for record in records for path in record.images]
    theirs = {
        "input_ids": batch["tokens"].astype(np.int64),
        "attention_mask": mask.astype(np.int64),
        "pixel_values": np.asarray(kind.processor(pictures, return_tensors="np")["pixel_values"]),
    }
    return model, folder / "base", batch, theirs, mask


def logits_of(directory, batch, adapters=None):
    config, params = read_checkpoint(directory, "float32")
    apply = partial(build_model(config).apply, method="logits")
    return np.asarray(jax.jit(apply, compiler_options=QUICK)({"params": params, "lora": adapters or {}}, batch))


def random_adapters(config, params):
    """Adapters of every linear, with random a and b."""
    rng, flat, shapes = np.random.default_rng(0), {}, flatten(params)
    for path in checkpoint_table(config).linears:
        *layers, d_in, d_out = shapes[f"{path}/kernel"].shape
        rank = RANKS[path.split("/")[0]]
        flat[f"{path}/a"] = rng.normal(0, 0.15, (*layers, d_in, rank)).astype(np.float32)
        flat[f"{path}/b"] = rng.normal(0, 0.15, (*layers, rank, d_out)).astype(np.float32)
        flat[f"{path}/scale"] = np.full(layers, 1.7, np.float32)
    return unflatten(flat)


def test_logits_equal_transformers_before_and_after_an_export(case, tmp_path):
    _, directory, batch, theirs, _ = case
    config, params = read_checkpoint(directory, "float32")
    adapters = random_adapters(config, params)
    write_adapter(tmp_path / "adapter", adapters, RANKS, config, base_name="base", provenance={})
    write_merged(tmp_path / "merged", directory, adapters)
    ours, plain = logits_of(directory, batch, adapters), logits_of(directory, batch)
    for result in (
        verify_adapter(tmp_path / "adapter", directory, theirs, ours, plain),
        verify_merged(tmp_path / "merged", directory, theirs, ours, plain),
    ):
        assert max(result["logits_difference"], result["base_difference"]) <= TOLERANCE
        assert result["moved"] > 0.1
    back, ranks = read_adapter(tmp_path / "adapter", config)
    assert ranks == RANKS
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_every_layout_is_read_and_written_back(case, layout, tmp_path):
    model, directory, batch, *_ = case
    config, params = read_checkpoint(directory, "float32")
    names = set(flatten(jax.eval_shape(lambda: build_model(config).init(jax.random.key(0), batch))["params"]))
    assert names == set(flatten(params))
    if layout == "memory":
        directory = shutil.copytree(directory, tmp_path / "memory")
        tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        head = {} if config.text.tie_word_embeddings else {"lm_head.weight": model.lm_head.weight.detach().numpy()}
        save_file(tensors | head, directory / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, read_checkpoint(directory, "float32")[1], params)
        return
    used, count = config.num_vision_layers_used, config.vision.num_layers
    settings = read_json_object(directory / "config.json")
    if used < count:
        settings["vision_config"]["num_hidden_layers"] = used
        layers = list(config.vision_feature_layers)
        settings["vision_feature_layer"] = layers if len(layers) > 1 else layers[0]
    write_checkpoint(tmp_path, settings, params, "float32")
    jax.tree.map(np.testing.assert_array_equal, read_checkpoint(tmp_path, "float32")[1], params)


def test_settings_that_a_file_leaves_out_are_those_of_transformers():
    """The hub's file of LLaVA-1.5 holds little of its decoder."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
    config = model_config({"model_type": "llava", "text_config": text, "vision_config": CLIP.to_dict()})
    expected = transformers.LlamaConfig(**text)
    for ours, theirs in (
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("rms_norm_eps", "rms_norm_eps"),
    ):
        assert getattr(config.text, ours) == getattr(expected, theirs)
    assert (config.image_token_id, config.vision_feature_layers, config.drop_first) == (32000, (2,), True)


@pytest.mark.parametrize(
    ("theirs", "part"),
    [
        (transformers.LlamaConfig(), "text"),
        (transformers.Qwen2Config(), "text"),
        (transformers.SiglipVisionConfig(), "vision"),
        (transformers.CLIPVisionConfig(), "vision"),
        (transformers.Dinov2Config(), "vision"),
    ],
)
def test_defaults_are_those_of_transformers(theirs, part):
    settings = {"text_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "clip_vision_model"}}
    settings[f"{part}_config"] = {"model_type": theirs.model_type}
    top = {"model_type": "llava", "vision_feature_layer": -1, "image_token_index": 9}
    ours = getattr(model_config(top | settings), part)
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    names |= {name: name for name in ("hidden_size", "image_size", "patch_size", "vocab_size")}
    names |= {} if theirs.model_type == "dinov2" else {"intermediate_size": "intermediate_size"}
    compared = [name for name in names if hasattr(ours, name)]
    assert {name: getattr(ours, name) for name in compared} == {n: getattr(theirs, names[n]) for n in compared}
    assert len(compared) >= 5


def test_parts_that_a_file_does_not_name_are_those_of_llava():
    parts = {"text_config": {"vocab_size": 32064}, "vision_config": {"image_size": 336}}
    config = model_config({"model_type": "llava", **parts})
    assert (config.vision.kind, config.text.attention_bias) == ("clip_vision_model", False)
    assert config.image_token_id == 32000


@pytest.mark.parametrize("name", KINDS)
def test_a_lane_step_is_counted_for_every_kind(name):
    kind = KINDS[name]
    top = transformers.LlavaConfig(vision_config=kind.vision, text_config=kind.text, **kind.top).to_dict()
    config = model_config(top | {"image_token_index": tiny_data.IMAGE_TOKEN_ID})
    base = unflatten({p.path: jax.ShapeDtypeStruct(p.shape, np.float32) for p in parameters(config)})
    targets = find_targets(base, {name: module["targets"] for name, module in DEFAULT_MODULES.items()})
    assert set(targets) == set(checkpoint_table(config).linears)
    shape = BatchShape(batch_size=2, tokens=20, tiles=1, supervised=3)
    step = lane_step_flops(config, targets, RANKS, shape)
    assert step.total > evaluation_flops(config, targets, RANKS, shape).total > 0
    assert min(step.encoder, step.projector, step.llm, step.adapters, step.attention) > 0


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("vision_config", {"model_type": "vit"}, "vision_config.model_type is 'vit'; this version supports"),
        (
            "vision_config",
            {"use_swiglu_ffn": True},
            "vision_config.use_swiglu_ffn is true; this version supports false",
        ),
        ("text_config", {"model_type": "gemma"}, "text_config.model_type is 'gemma'; this version supports 'llama', "),
        ("text_config", {"attention_bias": True}, "text_config.attention_bias is true; this version supports false"),
        (
            None,
            {"vision_feature_layer": [4]},
            r"vision_feature_layer is \[4\]; one or more of the hidden states -4 to 3",
        ),
        (None, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
    ],
)
def test_settings_that_are_not_supported_are_named(part, change, text):
    config = transformers.LlavaConfig(vision_config=DINOV2, text_config=transformers.LlamaConfig(**TEXT)).to_dict()
    (config[part] if part else config).update(change)
    with pytest.raises(ConfigError, match=f"^some/config.json: .*{text}"):
        model_config(config, "some/config.json")


def test_a_processor_that_does_not_fit_is_refused(tmp_path):
    kind = KINDS["clip, llama"]
    kind.checkpoint(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 14, "width": 14}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"makes pictures of 14 x 14 pixels, but config.json has 28 x 28"):
        load_preprocessor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "BlipImageProcessor"}))
    with pytest.raises(ConfigError, match="image processor is 'BlipImageProcessor'; LlavaImageProcessor, CLIP"):
        load_preprocessor(tmp_path)
