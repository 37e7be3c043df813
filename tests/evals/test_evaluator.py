"""Evaluation: candidate answers, accuracy of a model whose answers are known, the controls, intervals."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mars_jax.data.examples import ExampleSource
from mars_jax.data.formats.base import Turn
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import Record, load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.evals.controls import image_blind, shuffle_images
from mars_jax.evals.evaluator import Evaluator, EvaluatorSettings, candidate_answers
from mars_jax.evals.generation import generate
from mars_jax.evals.summary import scoring_name
from mars_jax.hub.read import read_checkpoint
from mars_jax.models.families.llava.model import LlavaOnevision
from mars_jax.models.families.registry import build_model
from mars_jax.runtime.sharding import make_mesh, row_sharding
from tests.helpers import tiny_data, tiny_job, tiny_qwen

LETTERS = {"red": "A", "green": "B", "blue": "C"}


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    return load_preprocessor(tiny_data.checkpoint(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven pictures of noisy red, green and blue in turn; every third record has two questions."""
    path = tiny_job.records(tmp_path_factory.mktemp("data"), 7)
    return load_records(path, path.parent)


def answered(record: Record, answer: str) -> Record:
    return replace(record, turns=(*record.turns[:-1], Turn("assistant", answer)))


# Candidate answers.


def token_losses(model, params, example):
    """-log p of each target of one example [S]."""
    logits = model.apply({"params": params}, {name: array[None] for name, array in example.items()})
    return optax.softmax_cross_entropy_with_integer_labels(logits[0], example["targets"]) * example["target_weights"]


@pytest.mark.parametrize("template", [tiny_data.TYPED_CHATML, tiny_data.STRING_CHATML, tiny_data.PICTURES_FIRST])
def test_answers_in_one_sequence_lose_what_each_loses_in_its_own_record(tmp_path, records, template):
    config, params = read_checkpoint(tiny_job.checkpoint(tmp_path), "float32")
    model = LlavaOnevision(config)
    preprocessor = load_preprocessor(tmp_path)
    preprocessor = replace(preprocessor, tokenizer=tiny_data.tokenizer(template))
    text_only = Record(
        "t", (), (Turn("system", "be brief"), Turn("user", "why?"), Turn("assistant", "so")), "", "text:t", ()
    )
    rows = [records[0], records[1], text_only]
    assert [len(record.turns) for record in rows] == [2, 4, 3]
    compare_answers(model, params, preprocessor, rows)


def test_answers_go_on_in_three_axes_where_positions_have_them(tmp_path):
    base = tiny_qwen.checkpoint(
        tmp_path / "base", tiny_qwen.torch_model(text={"num_hidden_layers": 1}, vision={"depth": 2})
    )
    config, params = read_checkpoint(base, "float32")
    rows = load_records(tiny_data.conversations(tmp_path))
    assert [len(record.images) for record in rows] == [1, 2, 0, 2]
    compare_answers(build_model(config), params, load_preprocessor(base), rows)


def compare_answers(model, params, preprocessor, rows):
    """Losses of answers in one sequence, against those of records of their own."""
    tokenizer = preprocessor.tokenizer
    answers = ["red", "a rather longer answer", "7"]
    every = [answered(record, answer) for record in rows for answer in answers]
    source = ExampleSource(rows, preprocessor, plan_shapes(rows, preprocessor).shapes)
    expected = ExampleSource(every, preprocessor, plan_shapes(every, preprocessor).shapes)
    token_ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
    losses = jax.jit(partial(token_losses, model, params))
    for i in range(len(rows)):
        together = np.split(losses(source.with_answers(i, token_ids)), np.cumsum([len(ids) + 1 for ids in token_ids]))
        for k, ids in enumerate(token_ids):
            example = expected[i * len(answers) + k]
            alone = losses(example)[example["target_weights"] > 0][-len(ids) - 1 :]
            np.testing.assert_allclose(together[k], alone, rtol=0, atol=1e-4)
            assert np.ptp(alone) > 0.1


def test_candidates_are_the_last_answers_most_frequent_first(records):
    assert candidate_answers(records, 3) == ("red", "blue", "green")  # 3, 2 and 2 of 7; "yes" is no last answer
    assert candidate_answers(records, 2) == ()


@pytest.mark.parametrize(
    ("candidates", "name"),
    [
        (("A", "B"), "letter_loglik"),
        (("A", "b"), "string_loglik"),
        (("A", "AB"), "string_loglik"),
        (("red",), "string_loglik"),
    ],
)
def test_the_scoring_is_named_after_the_candidates(candidates, name):
    assert scoring_name(candidates) == name


# A model whose answers are known.


class ColourReader(nn.Module):
    """Gives the letter of the picture's strongest channel, moved on by the adapter's `shift`, a logit of 10.

    Zero pixels have no strongest channel; argmax then takes the first.
    """

    letters: tuple[int, ...]
    vocabulary: int

    @nn.compact
    def __call__(self, batch):
        shift = self.get_variable("lora", "shift")
        channel = jnp.argmax(batch["pixels"].mean((1, 3, 4)), axis=1)
        letter = jnp.asarray(self.letters)[(channel + shift) % len(self.letters)]
        logits = 10.0 * jax.nn.one_hot(letter, self.vocabulary)
        return jnp.broadcast_to(logits[:, None, :], (*batch["targets"].shape, self.vocabulary))


@pytest.fixture(scope="module")
def lettered(records):
    return tuple(answered(record, LETTERS[record.turns[-1].text]) for record in records)


@pytest.fixture(scope="module")
def outcomes(preprocessor, lettered):
    letters = tuple(preprocessor.tokenizer.convert_tokens_to_ids(letter) for letter in "ABC")
    evaluator = Evaluator(
        ColourReader(letters, len(preprocessor.tokenizer)),
        {},
        lettered,
        preprocessor,
        EvaluatorSettings(batch_size=4, candidates=("C", "A", "B"), seed=3),
    )
    reported = []
    models = {"right": {"lora": {"shift": np.int32(0)}}, "wrong": {"lora": {"shift": np.int32(1)}}}
    found = evaluator.evaluate(models, lambda number, text: reported.append(number))
    assert sum(reported) == evaluator.num_reads == 14
    return found


def responses(outcome) -> str:
    return "".join("CAB"[k] for k in outcome.choices)


def truth(records) -> str:
    return "".join(record.turns[-1].text for record in records)


def test_every_model_is_seen_under_every_condition(outcomes):
    assert list(outcomes) == ["right", "wrong", "right_blind", "wrong_blind", "right_shuffled", "wrong_shuffled"]


def test_samples_split_over_devices_score_the_same(outcomes, preprocessor, lettered):
    mesh = make_mesh({"lane": 4, "data": 2})
    letters = tuple(preprocessor.tokenizer.convert_tokens_to_ids(letter) for letter in "ABC")
    model = ColourReader(letters, len(preprocessor.tokenizer))
    options = {"candidates": ("C", "A", "B"), "batch_size": 4, "controls": True, "seed": 3}
    evaluator = Evaluator(model, {}, lettered, preprocessor, EvaluatorSettings(**options), row_sharding(mesh))
    found = evaluator.evaluate({"right": {"lora": {"shift": np.int32(0)}}, "wrong": {"lora": {"shift": np.int32(1)}}})
    assert found.keys() == outcomes.keys()
    for name, outcome in found.items():
        assert responses(outcome) == responses(outcomes[name])
        np.testing.assert_allclose(outcome.losses, outcomes[name].losses, rtol=1e-6)


def test_accuracy_is_of_the_likeliest_candidate(outcomes, lettered):
    assert truth(lettered) == "ABCABCA"
    assert responses(outcomes["right"]) == "ABCABCA"
    assert responses(outcomes["wrong"]) == "BCABCAB"
    assert outcomes["right"].to_json()["accuracy"] == 1
    assert outcomes["wrong"].to_json()["accuracy"] == 0
    assert outcomes["right"].to_json()["accuracy_ci"] == pytest.approx([0.6457, 1.0], abs=1e-4)


def test_the_blind_control_sees_zero_pixels(outcomes):
    assert responses(outcomes["right_blind"]) == "A" * 7
    assert responses(outcomes["wrong_blind"]) == "B" * 7
    assert outcomes["right_blind"].correct.tolist() == [letter == "A" for letter in "ABCABCA"]


def test_the_shuffled_control_keeps_the_answers_and_swaps_the_pictures(outcomes, lettered):
    shuffled = shuffle_images(lettered, 3)
    letter_of = {record.digests: record.turns[-1].text for record in lettered}
    shown = "".join(letter_of[record.digests] for record in shuffled)
    assert shown != truth(lettered) == truth(shuffled)
    outcome = outcomes["right_shuffled"]
    assert responses(outcome) == shown
    assert outcome.correct.tolist() == [a == b for a, b in zip(shown, truth(lettered), strict=True)]


def test_losses_are_sums_over_the_supervised_tokens_of_each_record(outcomes, preprocessor):
    rest = math.log(math.exp(10) + len(preprocessor.tokenizer) - 1)
    # Letter and end token; records 1 and 4 are also asked "a square?", whose answer "yes" is three letters and an end.
    unlikely = preprocessor.tokenizer.encode("yes", add_special_tokens=False)
    extra = [(len(unlikely) + 1) * rest if i % 3 == 1 else 0.0 for i in range(7)]
    np.testing.assert_allclose(outcomes["right"].losses, [rest - 10 + rest + more for more in extra], rtol=1e-5)
    np.testing.assert_allclose(outcomes["wrong"].losses, [rest + rest + more for more in extra], rtol=1e-5)
    document = outcomes["right"].to_json()
    tokens = 7 * 2 + 2 * (len(unlikely) + 1)
    assert document["supervised_tokens"] == tokens
    assert document["loss"] == pytest.approx((7 * (2 * rest - 10) + sum(extra)) / tokens, rel=1e-5)
    assert document["perplexity"] == pytest.approx(math.exp(document["loss"]))


def test_without_candidates_only_the_loss_is_measured(preprocessor, lettered, outcomes):
    letters = tuple(preprocessor.tokenizer.convert_tokens_to_ids(letter) for letter in "ABC")
    model = ColourReader(letters, len(preprocessor.tokenizer))
    # One picture: nothing to shuffle.
    evaluator = Evaluator(model, {}, lettered[:1], preprocessor, EvaluatorSettings(batch_size=4))
    found = evaluator.evaluate({"right": {"lora": {"shift": np.int32(0)}}})
    assert list(found) == ["right", "right_blind"]
    document = found["right"].to_json()
    assert document["accuracy"] is document["accuracy_ci"] is None
    np.testing.assert_allclose(found["right"].losses, outcomes["right"].losses[:1], rtol=1e-6)


# What the model writes itself.


def test_answers_are_what_the_model_writes_to_each_record_alone(tmp_path, records):
    config, params = read_checkpoint(tiny_job.checkpoint(tmp_path), "float32")
    model, preprocessor = LlavaOnevision(config), load_preprocessor(tmp_path)
    some = records[:3]
    written = {"max_new_tokens": 3, "end_tokens": [preprocessor.tokenizer.eos_token_id]}
    evaluator = Evaluator(model, params, some, preprocessor, EvaluatorSettings(batch_size=2, **written))
    outcomes = evaluator.evaluate({"base": {}})
    pad = preprocessor.tokenizer.pad_token_id
    source = ExampleSource(some, preprocessor, plan_shapes(some, preprocessor).shapes)
    alone = jax.jit(partial(generate, model, pad_token=pad, **written))

    def text(example) -> str:
        tokens = alone(params, {}, {name: array[None] for name, array in example.items()})
        return preprocessor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()

    prompts = [source.prompt(number) for number in range(len(some))]
    assert list(outcomes["base"].answers) == [text(prompt) for prompt in prompts]
    blind = [text(image_blind(prompt)) for prompt in prompts]
    assert list(outcomes["base_blind"].answers) == blind
    assert any(blind), blind
    assert len(outcomes["base_shuffled"].answers) == 3


def test_answers_went_on_behind_the_end_that_was_trained_where_the_tokenizer_has_another(tmp_path, records):
    config, params = read_checkpoint(tiny_job.checkpoint(tmp_path), "float32")
    model, preprocessor = LlavaOnevision(config), load_preprocessor(tmp_path)
    some, settings = records[:1], EvaluatorSettings(batch_size=1, max_new_tokens=4)
    end = preprocessor.tokenizer.eos_token_id
    prompt = ExampleSource(some, preprocessor, plan_shapes(some, preprocessor).shapes).prompt(0)
    batch = {name: array[None] for name, array in prompt.items()}
    going_on = generate(model, params, {}, batch, max_new_tokens=4, end_tokens=(), pad_token=0)[0].tolist()
    assert end not in going_on
    # The token that the model writes third, or first, becomes the template's end.
    for place in (going_on.index(going_on[2]), 0):
        swapped = np.asarray(params["llm"]["lm_head"]["kernel"]).copy()
        swapped[:, [end, going_on[place]]] = swapped[:, [going_on[place], end]]
        other = {**params, "llm": {**params["llm"], "lm_head": {"kernel": swapped}}}
        evaluator = Evaluator(model, other, some, preprocessor, replace(settings, end_tokens=()))
        expected = preprocessor.tokenizer.decode(going_on[:place]).strip()
        assert evaluator.evaluate({"base": {}})["base"].answers == (expected,)
