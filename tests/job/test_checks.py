"""What `mars check` refuses or warns of: weights that can't be loaded, tokens without a row, untrained modules."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mars_jax.cli import app
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import load_records
from mars_jax.data.shapes import encode_text
from mars_jax.data.tokenizer import load_tokenizer
from mars_jax.errors import ConfigError, DataError
from mars_jax.hub.read import check_weights, read_checkpoint
from tests.helpers import tiny_job, tiny_qwen

LORA = {"modules": {"llm": {"targets": ["llm/layers/self_attn/v_proj"], "ranks": [1, 2]}}}
ROWS = 300  # of the embedding of tiny_job's checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_job.checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def check(config, *overrides):
    """Exit code, error message and warnings of the command."""
    result = CliRunner().invoke(app, ["check", str(config), *overrides, "--json"])
    error = json.loads(result.stdout).get("error", {"message": ""})
    return result.exit_code, error["message"], " ".join(result.stderr.split())


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        is_linear = tensor.ndim == 2 and "layers" in name and "proj" in name
        tensors |= change(name, tensor) if is_linear else {name: tensor}
    save_file(tensors, file, metadata={"format": "pt"})


def of_bitsandbytes(name, tensor):
    packed = {name: np.zeros((tensor.size // 2, 1), np.uint8), f"{name}.absmax": np.zeros(4, np.uint8)}
    return packed | {f"{name}.quant_state.bitsandbytes__nf4": np.zeros(8, np.uint8)}


def of_awq(name, tensor):
    stem = name.removesuffix(".weight")
    return {f"{stem}.{part}": np.zeros((4, 4), np.int32) for part in ("qweight", "qzeros")}


# Weights, by their headers alone.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_bitsandbytes, r"the weights are quantised \(bitsandbytes: .*\.absmax\).*that they were quantised from"),
        (of_awq, r"the weights are quantised \(AWQ or GPTQ: .*qweight\)"),
        (lambda name, t: {name: t.astype(ml_dtypes.float8_e4m3fn)}, r"quantised \(stored as F8_E4M3: "),
        (
            lambda name, t: {name: t.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale": np.ones((1, 1), np.float32)},
            r"the weights are quantised \(FP8 or INT8: .*weight_scale\)",
        ),
        (lambda name, t: {name: t.astype(np.int8)}, r"the weights are quantised \(stored as I8: "),
        (
            lambda name, t: {},
            r"the tensors do not fit config.json. Missing 11: .*, \.\.\.\. Not part of the model 0: none",
        ),
        (lambda name, t: {name: t[:5]}, r"proj.weight' has shape \[5, .*asks for .* 10 more have another shape"),
        (lambda name, t: {f"module.{name}": t}, r"saved inside a wrapper \(torch.compile, DDP\)"),
        (lambda name, t: {f"base_model.model.{name}": t}, r"saved with a PEFT adapter inside: merge it"),
    ],
    ids=["bitsandbytes", "awq", "fp8", "fp8 with scales", "int8", "absent", "shapes", "ddp", "peft"],
)
def test_weights_that_cannot_be_loaded_are_refused_by_check_and_run_alike(change, message, copy):
    rewrite(copy, change)
    for work in (check_weights, lambda directory: read_checkpoint(directory, "float32")):
        with pytest.raises(ConfigError, match=message):
            work(copy)


def test_check_reads_no_tensor(copy):
    rewrite(copy, lambda name, tensor: {name: np.full_like(tensor, np.nan)})
    check_weights(copy)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floats_are_read(dtype, copy):
    rewrite(copy, lambda name, tensor: {name: tensor.astype(dtype)})
    check_weights(copy)
    read_checkpoint(copy, "float32")


def test_a_missing_head_names_the_setting_that_ties_it(tmp_path):
    model = tiny_qwen.torch_model(text={"num_hidden_layers": 1}, vision={"depth": 1})
    directory = tiny_qwen.checkpoint(tmp_path, model)
    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"Missing 1: lm_head.weight.*set tie_word_embeddings to true in config.json"):
        check_weights(directory)


def test_an_adapter_in_place_of_a_model_is_named(copy):
    (copy / "config.json").rename(copy / "adapter_config.json")
    with pytest.raises(ConfigError, match=r"copy: holds a PEFT adapter \(adapter_config.json\), no model. Point"):
        check_weights(copy)


def test_a_name_of_the_hub_without_its_scheme_is_recognised(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no such file.*If you mean the model on the hub, write hf://llava-hf/tiny\."
    ):
        check_weights(tmp_path / "llava-hf" / "tiny")


def test_quantised_weights_are_refused_by_the_command(copy, tmp_path):
    rewrite(copy, of_bitsandbytes)
    config = tiny_job.config(tmp_path / "a.yaml", copy, tiny_job.records(tmp_path, 6), tmp_path / "run")
    code, message, _ = check(config)
    assert code == 2
    assert message.startswith(f"{copy}: the weights are quantised (bitsandbytes: ")


# Tokens.


def with_tokens(directory, added, **special):
    """Adds tokens to a tokenizer, the first of them without a row in the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([f"<x{number}>" for number in range(ROWS - len(tokenizer))])
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_token_without_a_row_is_refused_with_its_sample(copy, tmp_path):
    with_tokens(copy, ["<medicine>"])
    path = tiny_job.records(tmp_path, 3)
    rows = json.loads(path.read_text())
    for turn in (0, 1):
        changed = json.loads(json.dumps(rows))
        changed[1]["conversations"][turn]["value"] += " <medicine>"
        path.write_text(json.dumps(changed))
        records, preprocessor = load_records(path, tmp_path), load_preprocessor(copy)
        encode_text(records[0], preprocessor)
        with pytest.raises(
            DataError,
            match=r"item 1 \(id 'train1'\): has token 300 '<medicine>', but the base's embedding has 300 rows",
        ):
            encode_text(records[1], preprocessor)


def test_a_token_without_a_row_that_the_template_writes_was_looked_for_in_the_text(copy, tmp_path):
    with_tokens(copy, ["<hdr>"])
    template = copy / "chat_template.jinja"
    template.write_text("<hdr>" + template.read_text())
    records, preprocessor = load_records(tiny_job.records(tmp_path, 3), tmp_path), load_preprocessor(copy)
    with pytest.raises(DataError) as error:
        encode_text(records[0], preprocessor)
    assert (
        "has token 300 '<hdr>', which the chat template writes, but the base's embedding has 300 rows. Take the "
        "tokenizer and the chat template that belong to the checkpoint." in str(error.value)
    )


def test_files_of_a_checkpoint_that_the_tokenizers_reader_refuses_were_called_a_broken_tokenizer(copy):
    settings = json.loads((copy / "config.json").read_text())
    odd = {**settings, "text_config": {**settings["text_config"], "rms_norm_eps": 0}}
    (copy / "config.json").write_text(json.dumps(odd))
    with pytest.raises(ConfigError, match=r"config\.json: transformers refuses it: .*rms_norm_eps"):
        load_tokenizer(copy)
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "chat_template.jinja").write_bytes("{{ 'r\xe9ponse' }}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not UTF-8 \(.*\)\. Save it as UTF-8, or copy it"):
        load_tokenizer(copy)


def test_a_padding_token_without_a_row_is_replaced_and_said(copy, tmp_path):
    with_tokens(copy, [], pad_token="[PAD]")
    assert load_preprocessor(copy).pad_token_id == 0
    config = tiny_job.config(tmp_path / "a.yaml", copy, tiny_job.records(tmp_path, 60), tmp_path / "run")
    code, _, said = check(config)
    assert code == 0
    assert "the padding token '[PAD]' has no row in the base's embedding; token 0 pads instead" in said


# Modules that get no gradient.


@pytest.fixture
def text_only(tmp_path):
    rows = [
        {
            "id": str(number),
            "conversations": [{"from": "human", "value": f"what is {number}?"}, {"from": "gpt", "value": "red"}],
        }
        for number in range(60)
    ]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    return tmp_path / "text.json"


def test_modules_that_no_sample_reaches_are_refused_unless_frozen(base, text_only, tmp_path):
    config = tiny_job.config(tmp_path / "a.yaml", base, text_only, tmp_path / "run")
    code, message, _ = check(config)
    assert code == 2
    assert message == (
        "no training sample has a picture, so vision and projector would get no gradient: freeze them "
        "(lora.modules.vision.ranks: [0], lora.modules.projector.ranks: [0]), or give samples with pictures."
    )
    code, message, _ = check(config, "lora.modules.vision.ranks=[0]")
    assert (code, "so projector would get no gradient: freeze it" in message) == (2, True)
    assert check(config, "lora.modules.vision.ranks=[0]", "lora.modules.projector.ranks=[0]")[0] == 0


def test_probes_of_sizes_without_a_picture_failed_after_they_had_run(base, text_only, tmp_path):
    rows = json.loads(text_only.read_text())
    pictured = json.loads(tiny_job.records(tmp_path, 3).read_text())
    for row in pictured:  # the same picture would put them into one split
        rows += [row]
    text_only.write_text(json.dumps(rows))
    config = tiny_job.config(tmp_path / "a.yaml", base, text_only, tmp_path / "run")
    settings = ["probe.num_samples=[1, 40]", "data.test_fraction=0.05", "data.validation_fraction=0.05"]
    for command in ("check", "plan", "run"):
        result = CliRunner().invoke(app, [command, str(config), *settings])
        assert result.exit_code == 2
        assert re.search(
            r"none of the training samples that probes of D = 1 read has a picture \(of all 5\d, \d have\), so vision "
            "and projector would get no gradient there. Give larger probe.num_samples or more samples with pictures",
            result.stderr,
        )
    assert not (tmp_path / "run" / "probes").exists()
    # Without probes their sizes don't matter.
    assert check(config, *settings, "selection.method=random")[0] == 0


def test_pictures_without_the_tokens_of_the_family_around_them_are_said(tmp_path):
    model = tiny_qwen.torch_model(text={"num_hidden_layers": 1}, vision={"depth": 1, "fullatt_block_indexes": [0]})
    directory = tiny_qwen.checkpoint(tmp_path / "base", model)
    settings = json.loads((directory / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    settings |= {"vision_start_token_id": start, "vision_end_token_id": end}
    (directory / "config.json").write_text(json.dumps(settings))
    path = tiny_job.config(tmp_path / "a.yaml", directory, tiny_job.records(tmp_path, 60), tmp_path / "run", lora=LORA)
    warning = "the chat template renders pictures without <|vision_start|> and <|vision_end|> around them"
    code, message, said = check(path)
    assert (code, message, warning in said) == (0, "", False)
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|vision_start|>", "").replace("<|vision_end|>", ""))
    code, _, said = check(path)
    assert (code, warning in said) == (0, True)
