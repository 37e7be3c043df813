"""Greedy generation with a cache against transformers' `generate`, token by token, for every family."""

from functools import partial
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mars_jax.data.examples import ExampleSource
from mars_jax.data.formats.base import Turn
from mars_jax.data.images import load_rgb
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import Record, load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.evals.generation import generate
from mars_jax.hub.adapter import write_adapter
from mars_jax.hub.read import read_checkpoint
from mars_jax.models.families.registry import build_model, family_of
from mars_jax.models.shardings import base_shardings
from mars_jax.runtime.sharding import make_mesh, place, row_sharding
from tests.helpers import tiny_data, tiny_job, tiny_llava, tiny_qwen
from tests.models.families import test_llava

TOLERANCE = 1e-4
# Every program is compiled to run once: the time goes to the compiler.
QUICK = {"xla_backend_optimization_level": 0}
RANKS = {"vision": 2, "projector": 3, "llm": 4}
MOST = 12
PAD = 0

# peft 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """What a tiny model's products take is less than what it takes to share them out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CHECKPOINTS = {
    "llava": lambda directory: test_llava.KINDS["clip, llama"].checkpoint(directory),
    "llava_onevision": lambda directory: tiny_job.checkpoint(directory, decoder_layers=2),
    "qwen2_5_vl": lambda directory: tiny_qwen.checkpoint(
        directory, tiny_qwen.torch_model(vision={"depth": 1, "fullatt_block_indexes": [0]})
    ),
}


def source_of(records, preprocessor):
    return ExampleSource(records, preprocessor, plan_shapes(records, preprocessor).shapes)


def stacked(examples):
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


class Reference:
    """transformers' model of a checkpoint, which generates for one prompt at a time, without padding."""

    def __init__(self, directory, adapter=None):
        model = AutoModelForImageTextToText.from_pretrained(directory).eval()
        model.generation_config.eos_token_id = None
        self.model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
        self.preprocessor = load_preprocessor(directory)

    def answer(self, record: Record, prompt: dict[str, Any], **settings: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] and logits [n, V] of the answer."""
        tokens = prompt["tokens"][None, : prompt["target_positions"][0] + 1]
        inputs = {"input_ids": tokens.astype(np.int64), "attention_mask": np.ones_like(tokens, np.int64)}
        if record.images:
            inputs |= self.preprocessor.pictures.torch_inputs([[load_rgb(path) for path in record.images]])
        if self.preprocessor.axes > 1:
            inputs["mm_token_type_ids"] = (tokens == self.preprocessor.image_token_id).astype(np.int32)
        made = self.model.generate(
            **{name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()},
            **{"do_sample": False, "max_new_tokens": MOST, "pad_token_id": PAD, **settings},
            return_dict_in_generate=True,
            output_logits=True,
        )
        return made.sequences[0, tokens.shape[1] :].numpy(), torch.cat(made.logits).numpy()


def counting(model, steps):
    """The model, which notes every step that it decodes."""

    class Counting(type(model)):
        def decode(self, *arguments):
            jax.debug.callback(lambda: steps.append(None))
            return super().decode(*arguments)

    return Counting(model.config)


@pytest.mark.parametrize(
    ("family", "adapted", "devices", "ends_of"),
    # Row and place of the tokens that are made to end answers.
    [
        ("llava", False, 4, {0: 5}),
        ("llava_onevision", True, 1, {0: 3, 1: 9, 2: 6, 3: 5}),
        ("qwen2_5_vl", False, 1, {3: 4, 1: 7}),
    ],
)
def test_tokens_are_those_of_transformers(family, adapted, devices, ends_of, tmp_path):
    base = tmp_path / "base"
    CHECKPOINTS[family](base)
    config, params = read_checkpoint(base, "float32")
    adapters: dict[str, Any] = {}
    if adapted:
        tree = tiny_llava.random_adapters(params, RANKS, padded=8)
        adapters = {"lora": tree}
        write_adapter(tmp_path / "adapter", tree, RANKS, config, base_name="base", provenance={})
    reference = Reference(base, tmp_path / "adapter" if adapted else None)
    records = load_records(tiny_data.conversations(tmp_path))
    source = source_of(records, reference.preprocessor)
    prompts = [source.prompt(i) for i in range(len(records))]
    assert [len(record.images) for record in records] == [1, 2, 0, 2]
    assert len({int(prompt["target_positions"][0]) for prompt in prompts}) >= 3

    free, logits = map(np.stack, zip(*map(reference.answer, records, prompts), strict=True))
    # Nothing trivial: rows have different answers, no token again and again, and each by more than rounding.
    assert free.shape == (4, MOST)
    assert len({tuple(row) for row in free}) == 4
    assert min(len(set(row)) for row in free) > MOST / 3
    second, first = np.sort(logits, axis=-1)[..., -2:].transpose(2, 0, 1)
    assert (first - second).min() > 10 * TOLERANCE
    if adapted:
        with reference.model.disable_adapter():
            assert (reference.answer(records[0], prompts[0])[0] != free[0]).any()

    ends = [int(free[row, place]) for row, place in ends_of.items()]
    answers = [reference.answer(*pair, eos_token_id=ends)[0] for pair in zip(records, prompts, strict=True)]
    expected = np.stack([np.pad(tokens, (0, MOST - len(tokens)), constant_values=PAD) for tokens in answers])
    lengths = [len(tokens) for tokens in answers]
    assert len(set(lengths)) > 1

    steps: list[None] = []
    model, batch = build_model(config), stacked(prompts)
    if devices > 1:
        mesh = make_mesh({"lane": 2, "data": -1}, jax.devices()[:devices])
        params, batch = place(params, base_shardings(config, mesh)), place(batch, row_sharding(mesh))
    else:
        model = counting(model, steps)
    program = jax.jit(
        partial(generate, model, max_new_tokens=MOST, end_tokens=ends, pad_token=PAD), compiler_options=QUICK
    )
    tokens = np.asarray(program(params, adapters, batch))
    np.testing.assert_array_equal(tokens, expected)
    if devices == 1:  # the prompts give the first token
        jax.effects_barrier()
        assert len(steps) == max(lengths) - 1


def encoded(examples, config):
    """The batch of examples with random numbers for what the encoder makes of pictures, which then isn't compiled."""
    batch = stacked(examples)
    shape = (*batch["pixels"].shape[:3], config.vision.hidden_size)
    features = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    dropped = family_of(config).encoder_inputs
    return {name: array for name, array in batch.items() if name not in dropped} | {"features": features}


def test_logits_with_a_cache_are_those_without(tmp_path):
    base = CHECKPOINTS["qwen2_5_vl"](tmp_path / "base")
    config, params = read_checkpoint(base, "float32")
    model = build_model(config)
    records = load_records(tiny_data.conversations(tmp_path))
    source = source_of(records, load_preprocessor(base))
    answers = np.random.default_rng(0).integers(4, 300, (len(records), MOST), dtype=np.int32)
    whole = encoded([source.with_answers(i, [answer]) for i, answer in enumerate(answers)], config)
    prompts = encoded([source.prompt(i) for i in range(len(records))], config)
    places = whole["positions"][:, -MOST:].max(axis=-1)

    @partial(jax.jit, compiler_options=QUICK)
    def cached(params, batch, answers, positions):
        def step(cache, token):
            logits, cache = model.apply({"params": params}, *token, cache, method="decode")
            return cache, logits

        logits, cache = model.apply({"params": params}, batch, MOST, method="prefill")
        assert cache.keys.shape[3] == config.text.num_kv_heads < config.text.num_heads
        return logits, jax.lax.scan(step, cache, (answers.T, positions.T))[1]

    start, rest = cached(params, prompts, answers, places)
    expected = np.asarray(jax.jit(model.apply, compiler_options=QUICK)({"params": params}, whole))
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(start, expected[:, 0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(rest).swapaxes(0, 1), expected[:, 1:], rtol=0, atol=TOLERANCE)


def test_a_prompt_is_what_training_sees_before_the_last_answer(tmp_path):
    preprocessor = load_preprocessor(tiny_data.checkpoint(tmp_path / "base"))
    tokenizer = preprocessor.tokenizer
    picture = tiny_data.save_picture(tmp_path / "a.png", 28, 28)
    turns = (("user", "<image>what?"), ("assistant", "a square"), ("user", "red?"), ("assistant", "it is red"))
    record = Record("r", (picture,), tuple(Turn(*turn) for turn in turns), "", "picture:a", ("a",))
    source = source_of([record], preprocessor)
    whole, prompt = source[0], source.prompt(0)
    (end,) = prompt["target_positions"]

    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns[:3]]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "what?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    shown = tokenizer.decode(prompt["tokens"][: end + 1])
    image = tokenizer.decode([preprocessor.image_token_id])
    count = shown.count(image)
    assert count > 1
    assert shown.replace(image * count, image) == text
    answer = tokenizer.encode("it is red", add_special_tokens=False)
    np.testing.assert_array_equal(whole["tokens"][end + 1 :][: len(answer)], answer)
    for name in ("image_index", "image_weight", "pixels"):
        np.testing.assert_array_equal(prompt[name], whole[name])
    assert (prompt["tokens"][end + 1 :] == tokenizer.pad_token_id).all()
    np.testing.assert_array_equal(prompt["segments"], np.where(np.arange(len(prompt["tokens"])) <= end, 0, -1))
