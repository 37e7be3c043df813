"""Exports checked in PyTorch: what is written loads and computes what we compute, and a bad export is caught."""

import shutil
import sys
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.hub.adapter import write_adapter
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.verify import verify_adapter, verify_merged
from mars_jax.hub.write import write_merged
from mars_jax.models.families.llava.model import LlavaOnevision
from tests.helpers import tiny_llava

# peft 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RANKS = {"vision": 2, "projector": 3, "llm": 4}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("export"))


def export(root, head=1.0):
    """A base, an adapter and a merged checkpoint on disk, with a batch and our logits: (root, arguments)."""
    model = tiny_llava.torch_model()
    model.lm_head.weight.data *= head
    model.save_pretrained(root / "base")
    theirs, ours = tiny_llava.inputs(model, [[(31, 57)], [(28, 28)]])
    config, params = read_checkpoint(root / "base", "float32")
    adapters = tiny_llava.random_adapters(params, RANKS, scale=1.7, padded=8)
    write_adapter(root / "adapter", adapters, RANKS, config, base_name="base", provenance={})
    write_merged(root / "merged", root / "base", adapters)
    logits = jax.jit(
        partial(LlavaOnevision(config).apply, method="logits"), compiler_options={"xla_backend_optimization_level": 0}
    )
    zeros = jax.tree.map(np.zeros_like, adapters)
    adapted, plain = (np.asarray(logits({"params": params, "lora": lora}, ours)) for lora in (adapters, zeros))
    return root, {"batch": theirs, "our_logits": adapted, "base_logits": plain}


def test_an_adapter_computes_in_torch_what_it_computes_here(exported):
    root, arguments = exported
    result = verify_adapter(root / "adapter", root / "base", **arguments)
    assert result["tensors"] == 2 * (2 * 6 + 2 + 2 * 7)
    assert max(result["logits_difference"], result["base_difference"]) <= 1e-4
    assert result["moved"] > 0.1


def test_a_merged_checkpoint_computes_in_torch_what_the_adapter_computes_here(exported):
    root, arguments = exported
    result = verify_merged(root / "merged", root / "base", **arguments)
    assert max(result["logits_difference"], result["base_difference"]) <= 1e-4
    assert result["moved"] > 0.1


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_tensors_that_peft_only_warns_about_are_an_error(exported, tmp_path):
    root, arguments = exported
    adapter = shutil.copytree(root / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    save_file({key.replace("language_model", "elsewhere"): value for key, value in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(NoValidResultError, match=r"PEFT placed 28 of 56 tensors. Not assigned: .*elsewhere.layers.0"):
        verify_adapter(adapter, root / "base", **arguments)


def test_an_adapter_that_does_nothing_is_an_error(exported, tmp_path):
    root, arguments = exported
    adapter = shutil.copytree(root / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: value * ("lora_A" in key) for key, value in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(NoValidResultError, match=r"does not change the logits: .*moved .*, tolerance 0.0001"):
        verify_adapter(adapter, root / "base", **arguments | {"our_logits": arguments["base_logits"]})


@pytest.mark.parametrize("wrong", [0.001, np.nan])
def test_other_logits_are_an_error(wrong, exported):
    root, arguments = exported
    arguments = arguments | {"our_logits": arguments["our_logits"] + wrong}
    message = (
        r"its logits in PyTorch are not ours: logits_difference (0.001|nan), base_difference \d.*the export is wrong"
    )
    with pytest.raises(NoValidResultError, match=message):
        verify_merged(root / "merged", root / "base", **arguments)


def test_rounding_of_large_logits_is_not_an_error(tmp_path):
    """A real model's export was refused: logits of tens differ by more than 1e-4 without anything being wrong."""
    root, arguments = export(tmp_path, head=1000.0)
    result = verify_adapter(root / "adapter", root / "base", **arguments)
    assert result["logits_difference"] > 1e-4
    assert result["largest_logit"] > 1000
    wrong = arguments["our_logits"] + 2e-4 * result["largest_logit"]
    with pytest.raises(NoValidResultError, match="its logits in PyTorch are not ours"):
        verify_adapter(root / "adapter", root / "base", **arguments | {"our_logits": wrong})


def test_a_merged_checkpoint_with_tensors_astray_is_an_error(exported, tmp_path):
    root, arguments = exported
    merged = shutil.copytree(root / "merged", tmp_path / "merged")
    tiny_llava.rewrite(merged, lambda tensors: {key: value for key, value in tensors.items() if key != "image_newline"})
    with pytest.raises(NoValidResultError, match=r"could not assign every tensor: .*missing_keys.*image_newline"):
        verify_merged(merged, root / "base", **arguments)


def test_without_torch_the_remedy_is_named(exported, monkeypatch):
    root, arguments = exported
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft is not installed.*pip install 'mars_jax\[torch\]'"):
        verify_adapter(root / "adapter", root / "base", **arguments)
