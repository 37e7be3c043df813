"""PEFT adapters out and back: keys, patterns, the target expression, padding, frozen modules, and what is refused."""

import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.hub.adapter import read_adapter, write_adapter
from mars_jax.hub.read import read_checkpoint
from mars_jax.models.families.llava.table import ONEVISION as FAMILY
from mars_jax.runtime.trees import flatten, unflatten
from tests.helpers import tiny_llava

RANKS = {"vision": 2, "projector": 3, "llm": 4}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny_llava.torch_model()


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    return read_checkpoint(directory, "float32")


def export(directory, adapters, ranks, config, **changes):
    write_adapter(directory, adapters, ranks, config, **{"base_name": "org/base", "provenance": {"seed": 1}} | changes)
    return json.loads((directory / "adapter_config.json").read_text())


def edit(adapters, path, change):
    return unflatten({key: change(leaf) if key == path else leaf for key, leaf in flatten(adapters).items()})


def test_keys_shapes_and_settings(base, tmp_path):
    config, params = base
    adapters = tiny_llava.random_adapters(params, RANKS, padded=8)
    written = export(tmp_path, adapters, RANKS, config, base_revision="abc123")
    tensors = load_file(tmp_path / WEIGHTS)

    vision = "base_model.model.model.vision_tower.vision_model.encoder.layers"
    llm = "base_model.model.model.language_model.layers"
    linears = {
        **{f"{vision}.{i}.self_attn.{n}_proj": (24, 24, 2) for i in range(2) for n in ("q", "k", "v", "out")},
        **{f"{vision}.{i}.mlp.fc1": (24, 40, 2) for i in range(2)},
        **{f"{vision}.{i}.mlp.fc2": (40, 24, 2) for i in range(2)},
        "base_model.model.model.multi_modal_projector.linear_1": (24, 32, 3),
        "base_model.model.model.multi_modal_projector.linear_2": (32, 32, 3),
        **{f"{llm}.{i}.self_attn.{n}_proj": (32, 32, 4) for i in range(2) for n in ("q", "o")},
        **{f"{llm}.{i}.self_attn.{n}_proj": (32, 16, 4) for i in range(2) for n in ("k", "v")},
        **{f"{llm}.{i}.mlp.{n}_proj": (32, 48, 4) for i in range(2) for n in ("gate", "up")},
        **{f"{llm}.{i}.mlp.down_proj": (48, 32, 4) for i in range(2)},
    }
    expected = {f"{name}.lora_A.weight": (rank, d_in) for name, (d_in, _, rank) in linears.items()}
    expected |= {f"{name}.lora_B.weight": (d_out, rank) for name, (_, d_out, rank) in linears.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    np.testing.assert_array_equal(
        tensors[f"{llm}.1.mlp.down_proj.lora_A.weight"], adapters["llm"]["layers"]["mlp"]["down_proj"]["a"][1, :, :4].T
    )

    assert {key: written[key] for key in ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern")} == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r".*vision_tower\..*": 2, r".*multi_modal_projector\..*": 3},
        "alpha_pattern": {r".*vision_tower\..*": 4, r".*multi_modal_projector\..*": 6},
    }
    record = json.loads((tmp_path / "mars.json").read_text())
    assert record == {
        "ranks": RANKS,
        "alpha": {"vision": 4, "projector": 6, "llm": 8},
        "base_model": "org/base",
        "base_revision": "abc123",
        "provenance": {"seed": 1},
    }
    card = (tmp_path / "README.md").read_text()
    assert "| vision | 2 | 4 | 2 |" in card
    assert "'org/base', revision='abc123'" in card
    assert "vLLM 0.33 takes no LoRA adapter for `LlavaOnevisionForConditionalGeneration`: serve the merged" in card


@pytest.mark.parametrize("ranks", [RANKS, {"vision": 5}, {"llm": 1, "projector": 2}])
@pytest.mark.parametrize("scale", [2.0, 1.7])
def test_round_trip(ranks, scale, base, tmp_path):
    config, params = base
    adapters = tiny_llava.random_adapters(params, ranks, scale)
    export(tmp_path, adapters, ranks, config)
    back, ranks_back = read_adapter(tmp_path, config)
    assert ranks_back == ranks
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7), back, adapters)


def test_a_frozen_module_is_left_out_of_everything(base, tmp_path):
    config, params = base
    adapters = tiny_llava.random_adapters(params, RANKS)
    written = export(tmp_path, adapters, RANKS | {"llm": 0}, config)
    assert (written["r"], written["rank_pattern"]) == (2, {r".*multi_modal_projector\..*": 3})
    assert "language_model" not in written["target_modules"]
    assert not any("language_model" in name for name in load_file(tmp_path / WEIGHTS))
    assert read_adapter(tmp_path, config)[1] == {"vision": 2, "projector": 3}


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(sorted(FAMILY.linears)), min_size=1))
def test_the_target_expression_matches_what_was_trained_and_nothing_else(model, base, tmp_path_factory, chosen):
    config, params = base
    flat = flatten(tiny_llava.random_adapters(params, RANKS))
    adapters = unflatten({path: leaf for path, leaf in flat.items() if path.rpartition("/")[0] in chosen})
    ranks = {module: RANKS[module] for module in adapters}
    directory = tmp_path_factory.mktemp("adapter")
    expression = export(directory, adapters, ranks, config)["target_modules"]

    trained = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in load_file(directory / WEIGHTS)
        if key.endswith("lora_A.weight")
    }
    in_memory = [name for name, _ in model.named_modules()]
    older = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in in_memory]
    hub = [FAMILY.hub_key(name) for name in in_memory]
    for names, expected in [
        (older, trained),
        (in_memory, {name.replace("vision_model.", "") for name in trained}),
        (hub, {FAMILY.hub_key(name) for name in trained}),
    ]:
        assert {name for name in names if re.fullmatch(expression, name)} == expected


def test_layers_that_the_projector_never_sees_are_not_targeted(base, tmp_path):
    config, params = base
    config = replace(config, vision_feature_layers=(1,))
    adapters = jax.tree.map(lambda leaf: leaf[:1], tiny_llava.random_adapters(params, {"vision": 2}))
    expression = export(tmp_path, adapters, {"vision": 2}, config)["target_modules"]
    assert re.fullmatch(expression, "model.vision_tower.encoder.layers.0.mlp.fc1")
    assert not re.fullmatch(expression, "model.vision_tower.encoder.layers.1.mlp.fc1")


Q_PROJ = "llm/layers/self_attn/q_proj"


@pytest.mark.parametrize(
    ("change", "ranks", "error", "message"),
    [
        (lambda x: x, {"vision": 2, "projector": 3}, ConfigError, r"holds 4 columns, and the rank of 'llm' is None"),
        (
            lambda x: x,
            RANKS | {"llm": 9},
            ConfigError,
            r"holds 4 columns, and the rank of 'llm' is 9; it must be 0.*to 4",
        ),
        (
            lambda x: x,
            RANKS | {"llm": 3},
            ConfigError,
            r"not zero beyond rank 3.*Give the ranks that it was trained with",
        ),
        (lambda x: x, RANKS | {"audio": 3}, ConfigError, r"Modules with a rank but no adapter: audio"),
        (lambda x: x, dict.fromkeys(RANKS, 0), ConfigError, r"Linears with a rank above 0: 0"),
        (lambda x: edit(x, f"{Q_PROJ}/b", lambda b: b * np.nan), RANKS, NoValidResultError, r"q_proj' holds NaN"),
        (
            lambda x: edit(x, f"{Q_PROJ}/b", lambda b: b[..., :5]),
            RANKS,
            ConfigError,
            r"is for a kernel \[2, 32, 5\]; the configuration has \[2, 32, 32\]",
        ),
        (
            lambda x: edit(x, f"{Q_PROJ}/scale", lambda s: s + np.array([0.0, 1.0])),
            RANKS,
            ConfigError,
            r"scales .* differ between layers",
        ),
        (
            lambda x: edit(x, f"{Q_PROJ}/scale", lambda s: s + 1),
            RANKS,
            ConfigError,
            r"have different scales: \[2.0, 3.0\]",
        ),
        (
            lambda x: x | {"llm": x["llm"] | {"lm_head": x["projector"]["linear_1"]}},
            RANKS,
            ConfigError,
            r"what PEFT has no linear for: llm/lm_head",
        ),
    ],
)
def test_adapters_that_cannot_be_exported(change, ranks, error, message, base, tmp_path):
    config, params = base
    with pytest.raises(error, match=message):
        export(tmp_path / "out", change(tiny_llava.random_adapters(params, RANKS)), ranks, config)
    assert not (tmp_path / "out").exists()


A_KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


ODD_RANKS = [0, -1, 2.5, True, "8", [8], math.inf, math.nan]
ODD_ALPHAS = [0, -1, True, "8", [8], math.inf, -math.inf, math.nan, 1e300, 1e-300]
STRAYS = [
    "base_model.model.lm_head.lora_A.weight",
    "base_model.model.model.language_model.embed_tokens.lora_embedding_A",
    "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    "base_model.model.model.language_model.layers.0.self_attn.q_proj.base_layer.bias",
    "base_model.model.model.multi_modal_projector.linear_1.weight",
    A_KEY.replace("layers.0", "layers.2"),
    A_KEY.replace("language_model", "audio_tower"),
    A_KEY.replace("q_proj", "qkv"),
]


@pytest.mark.parametrize(
    ("settings_change", "tensors_change", "message"),
    [
        ({"peft_type": "LOHA"}, {}, r"peft_type is 'LOHA'; only 'LORA' is read here"),
        ({"peft_type": None}, {}, r"peft_type is None; only 'LORA'"),
        ({"use_dora": True}, {}, r"use_dora is True; only None, False, .* is read here: plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "lora_only"}, {}, r"bias is 'lora_only'; only 'none', None"),
        ({"fan_in_fan_out": True}, {}, r"fan_in_fan_out is True"),
        ({"trainable_token_indices": [3]}, {}, r"trainable_token_indices is \[3\]"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, r"init_lora_weights is 'pissa_niter_4'; only True, False, None"),
        ({"set_by_a_later_peft": {"x": 1}}, {}, r"set_by_a_later_peft is {'x': 1}"),
        ({"r": None}, {}, r"r is None; a whole number above 0 is needed"),
        ({"rank_pattern": {}}, {}, r"has shape \[.*; rank 4, which adapter_config.json gives it, .* make it \[4"),
        ({"r": 5}, {}, r"has shape .*; rank 5, which"),
        *(({"r": odd}, {}, rf"r is {re.escape(repr(odd))}; a whole number above 0 is needed") for odd in ODD_RANKS),
        *(
            ({"lora_alpha": odd}, {}, rf"lora_alpha is {re.escape(repr(odd))}; a finite number above 0 is needed")
            for odd in ODD_ALPHAS
        ),
        ({"rank_pattern": {".*": math.inf}}, {}, r"rank_pattern\['\.\*'\] is inf; a whole number above 0 is needed"),
        ({"rank_pattern": {".*": "8"}}, {}, r"rank_pattern\['\.\*'\] is '8'; a whole number"),
        ({"alpha_pattern": {".*": -4}}, {}, r"alpha_pattern\['\.\*'\] is -4; a finite number above 0 is needed"),
        (
            {"rank_pattern": [".*", 3]},
            {},
            r"rank_pattern is \['\.\*', 3\]; an object of patterns and numbers",
        ),
        ({"alpha_pattern": "all"}, {}, r"alpha_pattern is 'all'; an object of patterns and numbers is needed"),
        ({"rank_pattern": {"(": 3}}, {}, r"rank_pattern: '\(' is not a regular expression: missing \), .* position 0"),
        # Right alone, and not where it is matched: behind the path of a linear.
        ({"rank_pattern": {"(?i)abc": 8}}, {}, r"rank_pattern: '\(\?i\)abc' is not a regular expression: global flags"),
        ({"alpha_pattern": {"a" * 9_995: 8}}, {}, r"alpha_pattern: 'a.*a' has 1000\d characters; allowed are 10000"),
        (
            {"rank_pattern": {"(?=a)": 3}},
            {},
            r"can't be matched in linear time: invalid perl operator: \(\?= at",
        ),
        (
            {},
            {A_KEY: np.full((4, 32), np.nan, np.float32)},
            r"q_proj.lora_A.weight' holds NaN, .*, in 128 of 128 numbers",
        ),
        ({}, {A_KEY: np.full((4, 32), -np.inf, np.float16)}, r"lora_A.weight' holds NaN, infinity or what float32"),
        ({}, {A_KEY: np.full((4, 32), 1e300)}, r"lora_A.weight' holds NaN, infinity or what float32 can't hold"),
        ({}, {A_KEY: np.ones((4, 32), np.int64)}, r"lora_A.weight' is stored as int64; float16, bfloat16, float32 and"),
        ({}, {A_KEY: np.ones((4, 32), np.uint8)}, r"lora_A.weight' is stored as uint8"),
        ({}, {A_KEY: np.ones((4, 32), bool)}, r"lora_A.weight' is stored as bool"),
        ({"alpha_pattern": {r".*layers\.0\..*": 5}}, {}, r"one rank and one alpha for each module"),
        ({}, {A_KEY: np.ones((4, 31), np.float32)}, r"q_proj.lora_A.weight' has shape \[4, 31\]; .* make it \[4, 32\]"),
        ({}, {A_KEY: None}, r"'llm/layers/self_attn/q_proj' lacks lora_A in layers \[0\] of 2"),
        (
            {},
            {A_KEY.replace("lora_A", "lora_A.other"): np.ones((4, 32), np.float32)},
            r"q_proj.lora_A.*q_proj.lora_A.* are the same tensor of two adapters or in two key layouts",
        ),
        *(({}, {name: np.ones((4, 32), np.float32)}, f"'{name}' is no LoRA tensor of a linear") for name in STRAYS),
    ],
)
def test_adapters_that_cannot_be_read(settings_change, tensors_change, message, base, tmp_path):
    config, params = base
    written = export(tmp_path, tiny_llava.random_adapters(params, RANKS), RANKS, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | settings_change))
    tensors = load_file(tmp_path / WEIGHTS) | tensors_change
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path, config)


def test_an_adapter_of_what_the_model_never_reads_is_refused(base, tmp_path):
    config, params = base
    export(tmp_path, tiny_llava.random_adapters(params, {"vision": 2}), {"vision": 2}, config)
    of_layer_1 = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if "layers.1" in key}
    save_file(of_layer_1, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=r"holds no tensor that the model would read"):
        read_adapter(tmp_path, replace(config, vision_feature_layers=(1,)))


def test_a_pattern_that_backtracks_without_end_ends_at_once(base, tmp_path):
    config, params = base
    written = export(tmp_path, tiny_llava.random_adapters(params, RANKS), RANKS, config)
    endless = {f"({'(a|[a-z._])+' * 3})+$x": 3}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(written | {"rank_pattern": endless | written["rank_pattern"]})
    )
    start = time.monotonic()
    assert read_adapter(tmp_path, config)[1] == RANKS
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "empty", "gone", "folder"])
def test_damaged_weights_are_refused_by_file(base, tmp_path, damage):
    config, params = base
    export(tmp_path, tiny_llava.random_adapters(params, RANKS), RANKS, config)
    file = tmp_path / WEIGHTS
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes({"truncated": content[:-9], "zeroed": bytes(len(content)), "empty": b""}[damage])
    with pytest.raises(ConfigError, match=rf"{WEIGHTS}: (no such file; found|not a complete safetensors file)"):
        read_adapter(tmp_path, config)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_settings_that_are_no_regular_file_are_refused_and_not_waited_for(base, tmp_path, kind):
    config, params = base
    export(tmp_path, tiny_llava.random_adapters(params, RANKS), RANKS, config)
    file = tmp_path / "adapter_config.json"
    file.unlink()
    {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](file)
    with pytest.raises(ConfigError, match=r"adapter_config\.json: is not there, or no regular file\."):
        read_adapter(tmp_path, config)


def test_pickled_weights_are_not_read(base, tmp_path):
    config, params = base
    export(tmp_path, tiny_llava.random_adapters(params, RANKS), RANKS, config)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no such file; found: .*adapter_model.bin.*Only safetensors are read"):
        read_adapter(tmp_path, config)


def test_a_directory_that_is_no_adapter(tmp_path, base):
    with pytest.raises(ConfigError, match=r"adapter_config.json: is not there, or no regular file"):
        read_adapter(tmp_path, base[0])
