"""Which tokens end an answer, and when it is refused that none does."""

import json

import pytest

from mars_jax.errors import ConfigError
from mars_jax.hub.end_tokens import load_end_tokens
from tests.helpers import given_job, tiny_data, tiny_job


@pytest.mark.parametrize(("stored", "expected"), [(7, (2, 7)), ([9, 2, 7], (2, 7, 9)), (None, (2,))])
def test_end_tokens_are_those_of_the_file_and_the_tokenizers(stored, expected, tmp_path):
    tokenizer = tiny_data.tokenizer()
    assert load_end_tokens(tmp_path, tokenizer) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    assert load_end_tokens(tmp_path, tokenizer) == expected


def test_a_checkpoint_that_says_no_end_is_refused(tmp_path):
    tokenizer = tiny_data.tokenizer()
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(
        ConfigError, match=r"generation_config.json: eos_token_id is '</s>'; an integer or a list expected"
    ):
        load_end_tokens(tmp_path, tokenizer)
    path.write_text("{}")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"neither generation_config.json nor the tokenizer has .* Set eos_token"):
        load_end_tokens(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("</s>", "'</s>'; an integer or a list expected"),
        (True, "true; an integer or a list expected"),
        (2.0, "2.0; an integer or a list expected"),
        ({"a": 2}, "{'a': 2}; an integer or a list expected"),
        (-1, "-1; 0 or more or a list expected"),
        (10**30, "1000000000000000000000000000000; less than 16777216 or a list expected"),
        ([2, -5], "-5; 0 or more expected"),
        ([[2]], "[2]; an integer expected"),
        ([2] * 2000, "[2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, ...]; an integer or at most 1024 items expected"),
    ],
)
def test_an_impossible_end_token_ended_the_run_after_all_training(stored, expected, tmp_path):
    base = tiny_job.checkpoint(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    config = tiny_job.config(tmp_path / "a.yaml", base, tiny_job.records(tmp_path, 60), tmp_path / "run")
    for command in ("check", "plan"):
        code, _, error = given_job.mars(command, config)
        assert code == 2
        assert expected in error
        assert f"{base / 'generation_config.json'}: eos_token_id" in error
