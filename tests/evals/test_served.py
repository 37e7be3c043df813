"""What an inference engine would ask and answer, beside what we train and answer: differences are refused."""

from pathlib import Path

import numpy as np
import pytest

from mars_jax.data.examples import ExampleSource
from mars_jax.data.formats.base import Turn
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import plan_shapes
from mars_jax.errors import NoValidResultError
from mars_jax.evals.served import compare_answers, torch_prompts
from tests.helpers import tiny_job

RECORD = Record("a7", (), (Turn("user", "what colour?"), Turn("assistant", "red")), "", "text:a7", (), "llava", (), ())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_job.checkpoint(tmp_path_factory.mktemp("base"))


def prompts_of(base, checkpoint):
    preprocessor = load_preprocessor(base)
    source = ExampleSource([RECORD], preprocessor, plan_shapes([RECORD], preprocessor).shapes)
    return torch_prompts([RECORD], [source.prompt(0)], checkpoint, preprocessor), preprocessor


def test_prompts_of_the_template_are_those_that_are_trained(base):
    (inputs,), preprocessor = prompts_of(base, base)
    text = preprocessor.tokenizer.decode(inputs["input_ids"][0])
    assert "what colour?" in text
    assert "red" not in text
    assert inputs["attention_mask"].all()


def test_another_prompt_than_was_trained_is_refused_at_its_first_token(base, tmp_path):
    other = tiny_job.checkpoint(tmp_path / "other")
    file = other / "chat_template.jinja"
    file.write_text(file.read_text() + "{% if add_generation_prompt %}red{% endif %}")
    with pytest.raises(NoValidResultError) as error:
        prompts_of(base, other)
    assert "the prompt that the chat template of" in str(error.value)
    assert "the trained one ends" in str(error.value)


def theirs(*tokens, gap):
    """Answers of PyTorch with logits in which token 9 is `gap` below the largest."""
    logits = np.zeros((len(tokens), 10), np.float32)
    logits[np.arange(len(tokens)), tokens] = 2.0
    logits[:, 9] = 2.0 - gap
    return [(np.asarray(tokens), logits)]


def test_equal_answers_are_counted_and_ties_are_named():
    folder, ours = Path("adapter"), np.asarray([[3, 4, 0]])
    assert compare_answers(folder, [RECORD], ours, theirs(3, 4, gap=1.0), str) == {
        "samples": 1,
        "tokens": 2,
        "ties": [],
    }
    tied = compare_answers(folder, [RECORD], np.asarray([[3, 9, 5]]), theirs(3, 4, 5, gap=1e-4), str)
    assert tied == {"samples": 1, "tokens": 1, "ties": ["a7"]}


def test_another_answer_than_ours_is_refused_with_both_texts():
    with pytest.raises(
        NoValidResultError, match=r"PyTorch answers '\[3 4\]', we answer '\[3 9\]'.*differ at token 1.*0\.5"
    ):
        compare_answers(Path("adapter"), [RECORD], np.asarray([[3, 9, 0]]), theirs(3, 4, gap=0.5), str)
