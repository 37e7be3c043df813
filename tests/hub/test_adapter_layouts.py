"""Adapters that PEFT writes, read into our tree: every family, under the names of every transformers version."""

import re
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from mars_jax.hub.adapter import read_adapter
from mars_jax.models.families.registry import checkpoint_table, model_config
from mars_jax.runtime.trees import flatten
from tests.helpers import tiny_llava, tiny_qwen

# peft 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WEIGHTS = "adapter_model.safetensors"
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llava(vision, text):
    # The state before the last layer, as LLaVA-1.5 has it: PEFT adapts the last layer too.
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-2, image_token_index=1
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {
    "llava, clip": lambda: llava(
        transformers.CLIPVisionConfig(**VISION, intermediate_size=40), transformers.LlamaConfig(**TEXT)
    ),
    "llava, siglip": lambda: llava(
        transformers.SiglipVisionConfig(**VISION, intermediate_size=40), transformers.Qwen2Config(**TEXT)
    ),
    "llava, dinov2": lambda: llava(transformers.Dinov2Config(**VISION, mlp_ratio=2), transformers.LlamaConfig(**TEXT)),
    "llava_onevision": tiny_llava.torch_model,
    "qwen2_5_vl": tiny_qwen.torch_model,
}
SETTINGS = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": "all-linear",
    "rank_pattern": {r".*(vision_tower|visual\.blocks)\..*": 2, r".*(projector|merger)\..*": 3},
    # The first that matches wins; the other matches everything. (PEFT sorts them in the file.)
    "alpha_pattern": {r".*(vision_tower|visual\.blocks)\..*": 5, r"[a-z].*": 7},
}

# From the names of the installed transformers to those of older ones: (transformers before, expression, replacement).
LLAVA_RENAMES = [
    ("5.6", r"\.vision_tower\.encoder\.layers\.", ".vision_tower.vision_model.encoder.layers."),
    ("5.6", r"(\.layer\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
    ("5.6", r"(\.layer\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
    ("5.6", r"(\.layer\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
    ("5.6", r"(\.layer\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
    ("4.52", r"model\.model\.language_model\.", "model.language_model.model."),
    ("4.52", r"model\.model\.(?=vision_tower|multi_modal_projector)", "model."),
]
QWEN_RENAMES = [
    ("4.52", r"model\.model\.language_model\.", "model.model."),
    ("4.52", r"model\.model\.visual\.", "model.visual."),
]
LAYOUTS = {
    "of the installed transformers": lambda name, renames: name,
    "before 5.6": lambda name, renames: older(name, renames, "5.6"),
    "before 4.52": lambda name, renames: older(name, renames, "5.6", "4.52"),
    "with the adapter's name": lambda name, renames: name.replace(".weight", ".default.weight"),
    "with another name, before 4.52": lambda name, renames: older(name, renames, "5.6", "4.52").replace(
        ".weight", ".my-adapter.weight"
    ),
    "without PeftModel": lambda name, renames: name.removeprefix("base_model.model."),
}


def older(name, renames, *versions):
    for version, expression, replacement in renames:
        if version in versions:
            name = re.sub(expression, replacement, name)
    return name


def written_by_peft(kind, directory, **settings):
    """Saves an adapter with drawn weights; the base's configuration, and PEFT's update of every linear by its name."""
    model = MODELS[kind]()
    config = model_config(model.config.to_dict())
    adapted = peft.get_peft_model(model, peft.LoraConfig(**SETTINGS, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    adapted.save_pretrained(directory)
    updates = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return config, updates


def check_updates(config, adapters, updates):
    """Every update of the tree is PEFT's, and PEFT has no other but of layers that the model never reads."""
    flat, table = flatten(adapters), checkpoint_table(config)
    expected = {table.hub_key(f"{name}.weight"): update for name, update in updates.items()}
    kernels = [p for p in table.parameters(config) if p.path.removesuffix("/kernel") in table.linears]
    for kernel in kernels:
        a, b, scale = (flat[kernel.path.replace("kernel", leaf)] for leaf in ("a", "b", "scale"))
        ours = scale[..., None, None] * (a @ b)
        for key, update in zip(kernel.keys, ours if kernel.stacked else [ours], strict=True):
            np.testing.assert_allclose(update.T, expected.pop(key), rtol=0, atol=1e-6, err_msg=key)
    assert len(flat) == 3 * len(kernels)
    assert all(table.unused(key, config) for key in expected)
    return len(expected)


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """A kind, its configuration, the folder of an adapter that PEFT saved, and PEFT's updates."""
    directory = tmp_path_factory.mktemp("adapter")
    config, updates = written_by_peft(request.param, directory)
    return request.param, config, directory, updates


def test_the_tree_computes_what_peft_computes(written):
    kind, config, directory, updates = written
    adapters, ranks = read_adapter(directory, config)
    assert ranks == {"vision": 2, "projector": 3, "llm": 4}
    assert adapters["llm"]["layers"]["mlp"]["up_proj"]["scale"].tolist() == [7 / 4, 7 / 4]
    unread = check_updates(config, adapters, updates)
    # Layers that LLaVA doesn't reach; SigLIP has a pooling head of three linears as well.
    assert unread == {"llava, clip": 6, "llava, siglip": 9, "llava, dinov2": 6}.get(kind, 0)


def test_the_scale_of_rslora(tmp_path):
    config, updates = written_by_peft("llava_onevision", tmp_path, use_rslora=True)
    adapters, _ = read_adapter(tmp_path, config)
    np.testing.assert_allclose(adapters["vision"]["layers"]["mlp"]["fc1"]["scale"], 5 / 2**0.5, rtol=1e-6)
    check_updates(config, adapters, updates)


def test_every_layout_is_read_to_the_same_tree(written, tmp_path):
    kind, config, directory, _ = written
    expected, ranks = read_adapter(directory, config)
    tensors = load_file(directory / WEIGHTS)
    renames = QWEN_RENAMES if kind == "qwen2_5_vl" else LLAVA_RENAMES
    shutil.copy(directory / "adapter_config.json", tmp_path)
    seen = set()
    for title, layout in LAYOUTS.items():
        renamed = {layout(name, renames): tensor for name, tensor in tensors.items()}
        seen.add(frozenset(renamed))
        save_file(renamed, tmp_path / WEIGHTS)
        tree, ranks_read = read_adapter(tmp_path, config)
        assert ranks_read == ranks, title
        assert jax.tree.structure(tree) == jax.tree.structure(expected), title
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    # 5.6 left Qwen's names as they were.
    assert len(seen) == len(LAYOUTS) - (kind == "qwen2_5_vl")
