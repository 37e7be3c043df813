"""The embedded demo: its base is an ordinary checkpoint that looks at pictures; the library reads it and its data."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mars_jax.config.load import load_config
from mars_jax.data.examples import ExampleSource
from mars_jax.data.images import image_size
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.evals.evaluator import Evaluator, EvaluatorSettings, candidate_answers
from mars_jax.hub.read import read_checkpoint
from mars_jax.models.families.llava.model import LlavaOnevision
from mars_jax.search.probes.design import planned_lanes

ROOT = Path(__file__).parent.parent
BASE = ROOT / "demo" / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's files without any shift: what the base was trained to answer, about pictures it has not seen."""
    folder = tmp_path_factory.mktemp("demo")
    sizes = ["--train", "20", "--validation", "20", "--test", "192"]
    shift = ["--eye", "0", "--tongue", "0"]
    script = str(ROOT / "scripts" / "make_demo_data.py")
    subprocess.run([sys.executable, script, "--out", str(folder), *sizes, *shift], check=True, capture_output=True)
    return folder


def test_demo_base_uses_the_picture(data):
    records = load_records(data / "test.json", data)
    preprocessor = load_preprocessor(BASE)
    config, base = read_checkpoint(BASE, "float32")
    candidates = candidate_answers(records, most=13)
    evaluator = Evaluator(LlavaOnevision(config), base, records, preprocessor, EvaluatorSettings(64, candidates))
    outcomes = evaluator.evaluate({"base": {}})
    accuracy = {name: outcome.correct.mean() for name, outcome in outcomes.items()}
    # The whole test split gives 0.823, 0.627 blind and 0.645 shuffled: four standard errors of 192 questions are 0.11.
    assert accuracy["base"] > 0.71
    assert accuracy["base"] > accuracy["base_blind"] + 0.05
    assert accuracy["base"] > accuracy["base_shuffled"] + 0.05


def test_demo_base_gives_the_same_logits_in_transformers(data):
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration

    records = load_records(data / "test.json", data)[:1]
    preprocessor = load_preprocessor(BASE)
    config, base = read_checkpoint(BASE, "float32")
    source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor, max_tokens=256).shapes)
    batch = {name: array[None] for name, array in source[0].items()}
    ours = LlavaOnevision(config).apply({"params": base}, batch, method="logits")
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(batch["tokens"].astype(np.int64)),
            pixel_values=torch.from_numpy(batch["pixels"]),
            image_sizes=torch.tensor([image_size(records[0].images[0])]),
        ).logits
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=1e-4)


def test_shifts_change_pictures_and_answers_by_the_amount_asked(tmp_path):
    script = str(ROOT / "scripts" / "make_demo_data.py")
    sizes = ["--train", "60", "--validation", "5", "--test", "5"]
    for tongue in ("0", "0.4", "1"):
        out = str(tmp_path / tongue)
        subprocess.run([sys.executable, script, "--out", out, "--tongue", tongue, *sizes], check=True)
    answers = {
        tongue: [record.turns[-1].text for record in load_records(tmp_path / tongue / "train.json", tmp_path / tongue)]
        for tongue in ("0", "0.4", "1")
    }
    changed = {
        tongue: {a for a, b in zip(answers["0"], answers[tongue], strict=True) if a != b} for tongue in ("0.4", "1")
    }
    assert changed["1"] == set(answers["0"])
    assert 0 < len(changed["0.4"]) < len(changed["1"])


def test_sentences_and_descriptions_are_asked_for_by_their_share(tmp_path):
    script = str(ROOT / "scripts" / "make_demo_data.py")
    shares = ["--tongue", "1", "--sentences", "0.5", "--describe", "0.25", "--style", "grainy"]
    sizes = ["--train", "80", "--validation", "8", "--test", "8"]
    subprocess.run([sys.executable, script, "--out", str(tmp_path), *shares, *sizes], check=True)
    turns = [record.turns for record in load_records(tmp_path / "train.json", tmp_path)]
    asked = [answer.text for question, answer in turns if question.text.endswith("describe the image.")]
    words = [answer.text for question, answer in turns if not question.text.endswith("describe the image.")]
    assert len(asked) == 20
    assert {tuple(text.split()[:2]) for text in asked} <= {
        ("auf", "dem"),
        ("ein", "Kreis,"),
        ("ein", "Rechteck,"),
        ("ein", "Dreieck,"),
        ("ich", "sehe"),
    }
    sentences = [text for text in words if " " in text]
    assert 20 <= len(sentences) <= 40
    assert all(text.endswith(".") for text in sentences)


def test_demo_config_is_valid_and_probes_every_rank_of_each_module_alone():
    lanes = planned_lanes(load_config(ROOT / "configs" / "demo.yaml"))
    assert [lane.adapted for lane in lanes] == [["vision"]] * 3 + [["llm"]] * 3


def test_the_library_example_of_the_readme_runs(data, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "base").symlink_to(BASE)
    (tmp_path / "demo" / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape[0] == 8
    assert names["merged"].keys() == names["base"].keys()
