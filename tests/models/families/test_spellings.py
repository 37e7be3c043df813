"""Odd spellings of config.json that change what is computed: our logits against those of transformers."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from mars_jax.hub.read import read_checkpoint, read_config
from mars_jax.models.families.registry import build_model
from tests.helpers import tiny_llava, tiny_qwen

TOLERANCE = 1e-4
QUICK = {"xla_backend_optimization_level": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = np.asarray([[5, 9, 17, 33, 21, 40, 11, 60, 71, 4, 8, 90], [7, 7, 6, 50, 41, 13, 12, 99, 3, 5, 80, 31]])


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    directory = tmp_path_factory.mktemp("onevision")
    tiny_llava.torch_model(text={"num_hidden_layers": 1, "head_dim": 16}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    model = tiny_qwen.torch_model(text={"num_hidden_layers": 1}, vision={"depth": 2, "fullatt_block_indexes": [1]})
    return tiny_qwen.checkpoint(directory, model)


def edited(source, target, change):
    """A copy of a checkpoint whose config.json is changed by a function."""
    directory = shutil.copytree(source, target)
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    return directory


def their_logits(directory):
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(directory):
    config, params = read_checkpoint(directory, "float32")
    batch = {
        "tokens": TOKENS.astype(np.int32),
        "image_index": np.full((*TOKENS.shape, 1), -1, np.int32),
        "image_weight": np.zeros((*TOKENS.shape, 1), np.float32),
        "features": np.zeros((len(TOKENS), 1, config.vision.num_positions, config.feature_width), np.float32),
    }
    model = build_model(config)
    program = jax.jit(lambda: model.apply({"params": params}, batch, method="logits"), compiler_options=QUICK)
    return np.asarray(program())


def of_text(**values):
    def change(settings):
        for key, value in values.items():
            settings["text_config"].pop(key, None)
            if value is not None:
                settings["text_config"][key] = value

    return change


LINEAR = {"type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "change",
    [
        of_text(rope_parameters=DEFAULT, rope_scaling=LINEAR),
        of_text(rope_parameters={**LINEAR, "rope_theta": 500.0}, rope_scaling={}),
        of_text(rope_parameters=None, rope_scaling=LINEAR, rope_theta=500.0),
        of_text(rope_parameters={**LLAMA3, "rope_theta": 500.0}),
        of_text(rope_parameters={"rope_type": "default", "type": "linear", "factor": 4.0, "rope_theta": 500.0}),
    ],
    ids=["both spellings", "empty scaling", "scaling of transformers 4", "llama3", "both types"],
)
def test_rotary_scaling_is_that_of_transformers(change, onevision, tmp_path):
    directory = edited(onevision, tmp_path / "base", change)
    expected, plain = their_logits(directory), their_logits(onevision)
    assert np.abs(expected - plain).max() > 0.1  # the setting matters
    np.testing.assert_allclose(our_logits(directory), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(
    "scaling",
    [{"type": "linear", "factor": 4.0}, LLAMA3],
    ids=["linear", "llama3"],
)
def test_rotary_scaling_of_three_axes_is_that_of_transformers(scaling, qwen, tmp_path):
    scaling = {**scaling, "mrope_section": [1, 1, 2], "rope_theta": 500.0}
    directory = edited(qwen, tmp_path / "base", of_text(rope_parameters=scaling))
    expected, plain = their_logits(directory), their_logits(qwen)
    assert np.abs(expected - plain).max() > 0.01  # the setting matters
    np.testing.assert_allclose(our_logits(directory), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("where", ["rope_parameters", "rope_theta"])
def test_the_base_of_the_encoders_rotations_is_read(where, qwen, tmp_path):
    def change(settings):
        settings["vision_config"].pop("rope_parameters", None)
        settings["vision_config"][where] = {"rope_theta": 100.0} if where == "rope_parameters" else 100.0

    directory = edited(qwen, tmp_path / "base", change)
    assert read_config(directory).vision.rope_theta == 100.0
    if where == "rope_parameters":
        case = tiny_qwen.case(tmp_path, directory)
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
        with torch.no_grad():
            expected = model.eval()(**case.torch_inputs).logits.numpy()[case.mask]
        config, params = read_checkpoint(directory, "float32")
        program = jax.jit(
            lambda batch: build_model(config).apply({"params": params}, batch, method="logits"), compiler_options=QUICK
        )
        ours = np.asarray(program(case.batch))[case.mask]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_a_head_tied_by_the_text_part_alone_is_tied(qwen, tmp_path):
    def change(settings):
        settings["tie_word_embeddings"] = False
        settings["text_config"]["tie_word_embeddings"] = True

    directory = edited(qwen, tmp_path / "base", change)
    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    expected = their_logits(directory)
    np.testing.assert_allclose(our_logits(directory), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
