"""The adapter matrix's judgement: what passes, and what is reported of a combination that doesn't."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.compat import adapter_matrix as matrix
from benchmarks.compat.adapter_bases import make_base


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A base, and the file of an export."""
    folder = tmp_path_factory.mktemp("matrix")
    base = make_base(folder, "LLaVA, CLIP, Llama")
    exports = matrix.export(base, folder)
    return base, exports[matrix.Case(("vision", "projector", "llm"), "different ranks, rsLoRA, alpha = 4")][0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda held: held, None),
        (lambda held: dict(list(held.items())[1:]), "1 unused"),
        (lambda held: held | {"base_model.model.lm_head.lora_A.default.weight": np.zeros(1)}, "1 not in the file"),
        (lambda held: {name: value + (i == 0) for i, (name, value) in enumerate(held.items())}, "1 with other values"),
    ],
)
def test_tensors_that_peft_does_not_hold_as_they_are(exported, change, fault, tmp_path):
    base, directory = exported
    file = directory / "adapter_model.safetensors"
    # As PEFT holds them: with its adapter's name, under the names of the newest transformers.
    held = {
        name.replace("vision_model.", "").replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(change(held), tmp_path / "held")
    found = matrix.fault_of_tensors(file, tmp_path / "held", base)
    assert found is None if fault is None else f"of {len(held)} tensors: {fault}" in found


@pytest.mark.parametrize(
    ("own", "given", "positions", "reason"),
    [
        (0.0, 0.0, "own", None),
        (1.0, 0.0, "given", None),
        (1.0, 0.5, None, "base: its logits are 0.5 from ours"),
        (np.nan, np.nan, None, "base: its logits are nan from ours"),
    ],
)
def test_adapters_are_compared_where_the_base_computes_what_ours_does(
    exported, own, given, positions, reason, tmp_path
):
    base, _ = exported
    ours = np.zeros((*base.inputs["input_ids"].shape, 4), np.float32)
    base = base._replace(program=lambda variables, batch: ours)
    save_file({"own": ours + np.float32(own), "given": ours + np.float32(given)}, tmp_path / "base.logits")
    found = matrix.judged_base({"astray": {}}, tmp_path, base)
    assert (found["positions"], found["reason"]) == (positions, reason)
    assert matrix.judged_base({"astray": {"missing_keys": ["x"]}}, tmp_path, base)["reason"].startswith(
        "base: {'missing"
    )
    assert matrix.judged_base({"error": "E"}, tmp_path, base)["reason"] == "base: E"


@pytest.mark.parametrize(
    ("apart", "moved", "fault"),
    [
        (9e-5, 1.0, None),
        (2e-4, 1.0, "logits 0.0002 apart"),
        (np.nan, 1.0, "logits nan apart"),
        (0.0, 0.001, "logits moved by 0.001 only"),
        (0.0, np.nan, "logits moved by nan only"),
    ],
)
def test_logits_that_are_not_ours_or_not_moved(apart, moved, fault):
    assert matrix.fault_of_logits(apart, moved) == fault


def test_what_does_not_pass_is_in_the_tables_with_its_reason():
    row = {"base": "B", "pair": ("5.0", "0.18"), "direction": "ours", "modules": "llm", "setting": "S", "reason": None}
    bad = row | {"reason": "of 4 tensors: 2 unused"}
    placed = {"base": "B", "pair": ("5.0", "0.18"), "positions": "given", "differences": {"own": 1.5, "given": 1e-6}}
    tables = matrix.tables([row | {"logits_difference": 1e-5, "moved": 1.0}, bad], [placed])
    title = "transformers 5.0, PEFT 0.18"
    assert tables["Passed, by base and direction"] == [{"base": "B", "direction": "ours", title: "1 of 2"}]
    assert [fault["reason"] for fault in tables["What does not pass"]] == ["of 4 tensors: 2 unused"]
    assert [base["difference from our logits"] for base in tables[list(tables)[3]]] == [1.5]
