"""A tiny job from config to report, by the command: every file of the run, skipping, stopping and going on, exports."""

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from mars_jax.cli import app
from mars_jax.evals.stats import share
from tests.helpers import tiny_job

LANE_KEYS = [
    "lane", "run", "ranks", "num_samples", "seed", "learning_rate", "adapted", "steps", "convergence_steps", "censored",
    "best_loss", "best_step", "update_norm", "status", "reason",
]  # fmt: skip
PHASES = ["data", "plan", "probe", "fit", "select", "finetune", "evaluate", "export"]


@dataclass(frozen=True)
class Job:
    """Files of the tiny job; `document` and `stderr` are of its first `mars run --json`."""

    config: Path
    base: Path
    train: Path
    cache: Path
    run: Path
    document: dict[str, Any]
    stderr: str

    def mars(self, *arguments: object, torch: bool = False) -> dict[str, Any]:
        done = tiny_job.mars(*arguments, "--json", cache=self.cache, torch=torch)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    base = tiny_job.checkpoint(folder / "base")
    train = tiny_job.records(folder / "data", 60)
    config = tiny_job.config(folder / "a.yaml", base, train, folder / "run")
    done = tiny_job.mars("run", config, "--json", cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return Job(config, base, train, folder / "cache", folder / "run", json.loads(done.stdout), done.stderr)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def in_process(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def copy_of(job: Job, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The run elsewhere, as if it had been made with other settings."""
    shutil.copytree(job.run, path)
    config = yaml.safe_load((path / "config.resolved.yaml").read_text())
    change(config)
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    state = read(path / "state.json")
    del state["config"]
    (path / "state.json").write_text(json.dumps(state))
    return path


def rewrite(run: Path, name: str, content: str) -> None:
    """Puts another content into a file of a finished phase, as if the phase had left it."""
    (run / name).write_text(content)
    state = read(run / "state.json")
    for record in state["phases"].values():
        if name in record.get("outputs", {}):
            encoded = content.encode()
            record["outputs"][name] = {"sha256": hashlib.sha256(encoded).hexdigest(), "bytes": len(encoded)}
    (run / "state.json").write_text(json.dumps(state))


# One whole run.


def test_a_run_leaves_every_file_and_says_what_it_found(job):
    files = {str(path.relative_to(job.run)) for path in job.run.rglob("*") if path.is_file()}
    assert files >= {
        "config.resolved.yaml", "state.json", "events.jsonl", "data.json", "plan.json", "probes/lanes.jsonl",
        "probes/curves.jsonl", "laws.json", "selection.json", "sweep/runs.json", "finetune/metrics.jsonl",
        "finetune/summary.json", "evaluation.json", "samples.jsonl", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "report/index.html", "report/report.json",
    }  # fmt: skip
    assert not (job.run / "sweep" / "checkpoints").exists()
    assert not any((job.run / "probes" / "checkpoints").iterdir())  # only the state of probes in progress
    state = read(job.run / "state.json")
    assert list(state["phases"]) == [*PHASES, "report"]
    assert {record["status"] for record in state["phases"].values()} == {"done"}
    assert state["peak_memory_bytes"] > 2**26
    assert job.document["pick"] == read(job.run / "selection.json")["pick"]
    assert job.document["test"].keys() == read(job.run / "evaluation.json")["conditions"].keys()
    assert Path(job.document["adapter"]) == job.run / "adapter"
    assert Path(job.document["report"]).is_file()


def test_the_main_path_neither_needs_torch_nor_asks_for_it(job):
    # The run was made with torch hidden.
    assert "PyTorch" not in job.stderr


def test_the_data_are_split_and_counted(job):
    # The report had asked for it since it tells tokens, and no run had it.
    assert 3 < read(job.run / "data.json")["tokens_per_sample"] < read(job.run / "data.json")["shapes"]["max_tokens"]
    assert read(job.run / "report" / "report.json")["costs"]["finetune"]["tokens"] > 0
    data = read(job.run / "data.json")
    assert data["train"] + data["validation"] + data["test"] == 60
    assert min(data["train"], data["validation"], data["test"]) > 0
    assert data["dropped"] == []
    assert list(data["files"]) == [str(job.train)]


def test_lane_records_keep_to_the_contract(job):
    lanes = lines(job.run / "probes" / "lanes.jsonl")
    plan = read(job.run / "plan.json")
    assert len(lanes) == plan["lanes"] == len({lane["lane"] for lane in lanes}) == 18
    assert plan["lane_steps"] == 18 * 16
    for lane in lanes:
        assert list(lane) == LANE_KEYS
        assert lane["adapted"] == ["vision", "projector", "llm"]
        assert lane["convergence_steps"].keys() == lane["censored"].keys() == lane["update_norm"].keys()
        assert all(0 < steps <= 16 for steps in lane["convergence_steps"].values())
        assert min(lane["update_norm"].values()) > 0
        late = any(lane["censored"].values())
        assert (lane["status"], lane["reason"] is None) == ("horizon" if late else "converged", not late)
    assert {lane["num_samples"] for lane in lanes} == {8, 16, 32}
    curves = lines(job.run / "probes" / "curves.jsonl")
    steps = {lane["lane"]: [row["step"] for row in curves if row["lane"] == lane["lane"]] for lane in lanes}
    assert {tuple(of_lane) for of_lane in steps.values()} == {(0, 4, 6, 8, 11, 16)}
    best = {
        lane["lane"]: min(row["validation_loss"] for row in curves if row["lane"] == lane["lane"]) for lane in lanes
    }
    assert best == {lane["lane"]: lane["best_loss"] for lane in lanes}
    first, last = (
        [row["validation_loss"] for row in curves if row["step"] == step and row["lane"].endswith("D32-s0")]
        for step in (0, 16)
    )
    assert len(set(first)) == 1  # b = 0: every lane starts as the base
    assert max(last) < first[0] - 0.5


def test_laws_and_selection_keep_to_the_contract(job):
    laws, selection = read(job.run / "laws.json"), read(job.run / "selection.json")
    assert laws["convergence"].keys() == {"vision", "llm"}  # the projector has one rank
    for law in laws["convergence"].values():
        assert {"k", "gamma", "delta", "E", "ci", "points", "rmse_log", "censored"} <= law.keys()
        assert law["points"] == 18
    expected = {"form", "A", "alpha", "beta", "E", "overfit", "ci", "held_out_error", "order_tau"}
    assert expected <= laws["performance"].keys()
    ranks = [candidate["ranks"] for candidate in selection["candidates"]]
    assert sorted(map(str, ranks)) == sorted(
        str({"vision": v, "projector": 2, "llm": n}) for v in (1, 2, 4) for n in (1, 4)
    )
    assert selection["pick"] in ranks
    assert selection["target_num_samples"] == read(job.run / "data.json")["train"]
    assert selection["method"] == "local_sweep"


def test_the_final_runs_of_the_best_probes_are_halved_and_the_last_is_the_final_run(job):
    selection, curves = read(job.run / "selection.json"), read(job.run / "sweep" / "runs.json")["runs"]
    summary, metrics = read(job.run / "finetune" / "summary.json"), lines(job.run / "finetune" / "metrics.jsonl")
    probes = [lane for lane in lines(job.run / "probes" / "lanes.jsonl") if lane["num_samples"] == 32]
    best = sorted(probes, key=lambda lane: lane["best_loss"])[:3]
    assert [run["ranks"] for run in curves] == [lane["ranks"] for lane in best]
    probed = {str(c["ranks"]): c["probed_loss"] for c in selection["candidates"] if c["probed_loss"] is not None}
    assert probed == {str(lane["ranks"]): lane["best_loss"] for lane in probes}
    ends = {str(run["ranks"]): run["looks"] for run in curves}
    assert sorted(looks[-1][0] for looks in ends.values()) == [8, 16, 16]
    halfway = {ranks: min(loss for step, loss in looks if step <= 8) for ranks, looks in ends.items()}
    assert ends[max(halfway, key=halfway.get)][-1][0] == 8
    last = {ranks: min(loss for _, loss in looks) for ranks, looks in ends.items() if looks[-1][0] == 16}
    assert summary["from_sweep"]
    assert str(summary["ranks"]) == str(selection["pick"]) == min(last, key=last.get)
    assert summary["best_validation_loss"] == min(last.values())
    assert [[row["step"], row["validation_loss"]] for row in metrics] == ends[str(selection["pick"])]
    assert "finetune: the final run that the search kept is taken" in job.stderr


def test_the_final_run_lowers_the_loss_and_its_adapter_is_what_was_evaluated(job):
    summary, evaluation = read(job.run / "finetune" / "summary.json"), read(job.run / "evaluation.json")
    metrics = lines(job.run / "finetune" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 8, 16]
    assert summary["best_validation_loss"] == min(row["validation_loss"] for row in metrics)
    assert summary["ranks"] == job.document["pick"]
    conditions = evaluation["conditions"]
    assert list(conditions) == [
        "base",
        "finetuned",
        "base_blind",
        "finetuned_blind",
        "base_shuffled",
        "finetuned_shuffled",
    ]
    assert conditions["finetuned"]["loss"] < conditions["base"]["loss"] - 0.3
    assert conditions["finetuned"]["loss"] != conditions["finetuned_blind"]["loss"]
    assert evaluation["scoring"] == "string_loglik"
    assert evaluation["num_candidates"] == 3
    samples = lines(job.run / "samples.jsonl")
    assert len(samples) == evaluation["num_samples"] == read(job.run / "data.json")["test"]
    for name, condition in conditions.items():
        right = [sample[name]["response"] == sample["target"] for sample in samples]
        assert condition["accuracy"] == pytest.approx(sum(right) / len(right))


# Again, and elsewhere.


def test_a_second_run_skips_every_phase_and_reads_neither_weights_nor_pictures(job, tmp_path):
    watched = [p for p in job.run.rglob("*") if p.is_file() and p.parent.name != "report"]
    # sources.json gets the times of files that were still new when the first run began.
    watched = [p for p in watched if p.name not in ("state.json", "events.jsonl", "lock", "sources.json")]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in watched}
    digest = json.loads((job.run / "sources.json").read_text())["digest"]
    hidden = {job.base / "model.safetensors": tmp_path / "weights", job.train.parent / "images": tmp_path / "images"}
    for path, elsewhere in hidden.items():
        shutil.move(path, elsewhere)
    try:
        start = time.monotonic()
        done = tiny_job.mars("run", job.config, "--json", cache=job.cache)
        seconds = time.monotonic() - start
    finally:
        for path, elsewhere in hidden.items():
            shutil.move(elsewhere, path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == job.document
    assert [line for line in done.stderr.splitlines() if "skipped" in line] == [
        f"{phase}: done before, skipped" for phase in PHASES
    ]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in watched} == before
    assert json.loads((job.run / "sources.json").read_text())["digest"] == digest
    assert seconds < 30


def test_laws_are_fitted_again_from_the_lane_records_alone(job, tmp_path):
    run = tmp_path / "moved"
    (run / "probes").mkdir(parents=True)
    # The state says that the laws are fitted; they are not there.
    for name in ("config.resolved.yaml", "state.json", "probes/lanes.jsonl"):
        shutil.copy(job.run / name, run / name)
    shown = job.mars("fit", run)
    assert (run / "laws.json").read_bytes() == (job.run / "laws.json").read_bytes()
    laws = read(job.run / "laws.json")
    del laws["draws"]
    assert shown == laws


def test_another_pick_is_fine_tuned_from_the_start(job, tmp_path):
    run = copy_of(job, tmp_path / "copy", lambda config: config["finetune"].update(steps=2, look_every=1))
    selection = read(run / "selection.json")
    other = next(c["ranks"] for c in selection["candidates"] if c["ranks"] != selection["pick"])
    rewrite(run, "selection.json", json.dumps({**selection, "pick": other}))
    summary = job.mars("finetune", run)
    assert summary["ranks"] == other
    assert [row["step"] for row in lines(run / "finetune" / "metrics.jsonl")] == [0, 1, 2]


def test_a_sweep_in_which_every_run_diverges_is_no_result(job, tmp_path):
    run = copy_of(job, tmp_path / "copy", lambda config: config["finetune"].update(learning_rate=1e38))
    done = tiny_job.mars("select", run, cache=job.cache)
    assert done.returncode == 5
    assert "mars: no final run came to its end (vision" in done.stderr
    assert "Lower finetune.learning_rate (now {'vision': 1e+38," in done.stderr


def test_given_ranks_are_trained_without_a_search(job, tmp_path):
    modules = {"vision": {"ranks": [0]}, "projector": {"targets": ["projector/linear_2"], "ranks": [3]}}
    small = ["finetune={steps: 4, look_every: 2, warmup_steps: 1}", "evaluate.max_samples=3", "evaluate.controls=false"]
    document = job.mars("run", job.config, f"run_dir={tmp_path / 'run'}", f"lora.modules={json.dumps(modules)}", *small)
    assert document["pick"] == {"projector": 3}
    assert document["why"].startswith("lora.modules gives every module one rank")
    assert not (tmp_path / "run" / "probes").exists()
    assert read(tmp_path / "run" / "finetune" / "summary.json")["ranks"] == {"vision": 0, "projector": 3}
    assert "Use rank\u00a03 for projector." in (tmp_path / "run" / "report" / "index.html").read_text()


def test_rates_and_frozen_modules_are_searched_and_trained_as_they_were_picked(job, tmp_path):
    run, modules = tmp_path / "run", read_yaml(job.config)["lora"]["modules"]
    modules["vision"] |= {"ranks": [0, 2]}
    modules["llm"] |= {"ranks": [2], "rates": [0.3, 3.0]}
    document = job.mars(
        "run",
        job.config,
        f"run_dir={run}",
        f"lora.modules={json.dumps(modules)}",
        "selection={method: random, sweep: 4}",
        "evaluate={max_samples: 3, controls: false, batch_size: 4}",
    )
    runs = read(run / "sweep" / "runs.json")["runs"]
    tried = {(one["ranks"]["vision"], one["factors"]["llm"]) for one in runs}
    assert tried == {(0, 0.3), (0, 3.0), (2, 0.3), (2, 3.0)}
    selection = read(run / "selection.json")
    best = min(runs, key=lambda one: min(loss for _, loss in one["looks"]))
    assert (selection["pick"], selection["factors"]) == (best["ranks"], best["factors"])
    assert document["pick"] == best["ranks"]
    factor = best["factors"]["llm"]
    assert f"llm 2 at {factor:.3g} times its learning rate" in selection["explanation"]
    summary = read(run / "finetune" / "summary.json")
    assert summary["learning_rate"] == {"vision": 0.03, "projector": 0.03, "llm": pytest.approx(0.03 * factor)}
    page = (run / "report" / "index.html").read_text()
    assert "factor on the learning rate" in page
    assert "Final runs that the pick was chosen from" in page
    assert f"rank\u00a02 for llm at {factor:.3g} times its learning rate" in page
    # The final run that the search kept is gone: the pick is trained again, at the picked rates.
    _forget_final_run(run)
    again = job.mars("finetune", run)
    assert not again["from_sweep"]
    assert again["learning_rate"] == summary["learning_rate"]
    assert again["best_validation_loss"] == pytest.approx(summary["best_validation_loss"], rel=1e-3)


def test_restarts_are_drawn_anew_and_the_pick_keeps_its_draw(job, tmp_path):
    run, modules = tmp_path / "run", read_yaml(job.config)["lora"]["modules"]
    settings = [
        f"lora.modules={json.dumps(modules)}",
        "selection={method: restarts, sweep: 3}",
        "evaluate={max_samples: 3, controls: false, batch_size: 4}",
    ]
    job.mars("select", job.config, f"run_dir={run}", *settings)
    runs = read(run / "sweep" / "runs.json")["runs"]
    assert [one["seed"] for one in runs] == [0, 1, 2]
    assert len({json.dumps(one["looks"][1:]) for one in runs}) == 3
    assert len({json.dumps(one["ranks"]) for one in runs}) == 1
    selection, summary = read(run / "selection.json"), job.mars("finetune", run)
    assert summary["from_sweep"]
    best = min(runs, key=lambda one: min(loss for _, loss in one["looks"]))
    assert selection["seed"] == best["seed"]
    _forget_final_run(run)
    again = job.mars("finetune", run)
    assert not again["from_sweep"]
    assert again["best_validation_loss"] == pytest.approx(summary["best_validation_loss"], rel=1e-3)
    # The config's seed draws other adapters and another order.
    job.mars("select", job.config, f"run_dir={tmp_path / 'other'}", "seed=1", *settings)
    others = read(tmp_path / "other" / "sweep" / "runs.json")["runs"]
    assert {json.dumps(one["looks"][1:]) for one in runs}.isdisjoint(json.dumps(one["looks"][1:]) for one in others)


def test_a_race_is_decided_at_its_rungs_and_resumes_where_it_was(job, tmp_path):
    run, modules = tmp_path / "run", read_yaml(job.config)["lora"]["modules"]
    modules["llm"] |= {"rates": [0.01, 1.0, 10.0]}
    document = job.mars(
        "run",
        job.config,
        f"run_dir={run}",
        f"lora.modules={json.dumps(modules)}",
        "selection={method: race, sweep: 5}",
        "finetune={steps: 16, look_every: 8, warmup_steps: 1}",
        "evaluate={max_samples: 3, controls: false, batch_size: 4}",
    )
    runs = read(run / "sweep" / "runs.json")["runs"]
    assert len(runs) == 5
    assert {step for one in runs for step, _ in one["looks"]} == {0, 2, 4, 6, 8, 10, 12, 14, 16}
    ends = [one["looks"][-1][0] for one in runs]
    assert 16 in ends
    assert set(ends) <= {4, 6, 8, 10, 12, 14, 16}
    selection = read(run / "selection.json")
    assert selection["method"] == "race"
    whole = [one for one in runs if one["looks"][-1][0] == 16]
    assert document["pick"] in [one["ranks"] for one in whole]
    its = "its" if len(whole) == 1 else "their"
    assert selection["explanation"].startswith(f"5 final runs were begun; {len(whole)} came to {its} end.")


def test_laws_and_race_show_convergence_beside_a_pick_that_a_law_of_final_runs_helped(job, tmp_path):
    run, modules = tmp_path / "run", read_yaml(job.config)["lora"]["modules"]
    modules["llm"] |= {"rates": [0.1, 1.0]}
    settings = (
        *(f"run_dir={run}", f"lora.modules={json.dumps(modules)}", "selection={method: laws+race, sweep: 4}"),
        "convergence={rule: loss_fraction, epsilon: 0.5, sustain: 1}",
        "finetune={steps: 16, look_every: 8, warmup_steps: 1}",
        "evaluate={max_samples: 3, controls: false, batch_size: 4}",
    )
    document = job.mars("run", job.config, *settings)
    lanes = [json.loads(line) for line in (run / "probes" / "lanes.jsonl").read_text().splitlines()]
    assert {tuple(lane["adapted"]) for lane in lanes} == {("vision",), ("llm",)}  # each module alone
    laws, selection = (read(run / name) for name in ("laws.json", "selection.json"))
    assert laws["performance"] is None
    assert set(laws["convergence"]) | set(laws["untimed"]) == {"vision", "llm"}
    begun = read(run / "sweep" / "runs.json")["runs"]
    assert len(begun) == 4 + 2
    assert selection["method"] == "laws+race"
    assert set(selection["step_law"]["A"]) == {"vision", "llm"}
    assert set(selection["convergence_steps"]) == set(laws["convergence"])
    assert "By Law-P in step sizes, fitted to " in selection["explanation"]
    assert document["pick"] in [one["ranks"] for one in begun if one["looks"][-1][0] == 16]
    page = (run / "report" / "index.html").read_text()
    assert "Law-P in step sizes: the loss that ranks and learning rates lead to" in page
    plan = read(run / "plan.json")
    assert (plan["final_runs"], plan["final_steps"]) == (6, 6 * 16)
    assert plan["full_grid_steps"] == 3 * 2 * 2 * 16


def _forget_final_run(run):
    """Removes the final run that a search kept, so that the pick is trained again."""
    (run / "sweep" / "final.json").unlink()
    state = read(run / "state.json")
    del state["phases"]["select"]["outputs"]["sweep/final.json"]
    (run / "state.json").write_text(json.dumps(state))


def test_factors_that_belong_to_no_trained_module_are_refused(job, tmp_path):
    run = copy_of(job, tmp_path / "copy", lambda config: None)
    selection = read(run / "selection.json")
    for factors, named in (({"audio": 3.0}, "audio 3.0"), ({"llm": 0.0}, "llm 0.0"), ({"llm": -1.0}, "llm -1.0")):
        rewrite(run, "selection.json", json.dumps({**selection, "factors": factors}))
        code, _, error = in_process("finetune", run)
        assert code == 2
        assert f"selection.json: factors has {named}; a factor is above 0 and of a module that the pick trains" in error


def test_more_answers_than_the_limit_leave_what_the_model_writes_itself(job, tmp_path):
    more_answers = {"max_candidates": 2, "max_samples": 3, "max_new_tokens": 4}
    run = copy_of(job, tmp_path / "copy", lambda config: config["evaluate"].update(more_answers))
    done = tiny_job.mars("evaluate", run, "--json", cache=job.cache)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert "warning: answers are not scored: the training split has more than 2 distinct answers" in done.stderr
    assert (document["num_samples"], document["num_candidates"], document["scoring"]) == (3, 0, None)
    for condition in document["conditions"].values():
        assert condition["accuracy"] is condition["accuracy_ci"] is None
        assert condition["perplexity"] > 1
    samples = lines(run / "samples.jsonl")
    assert [sample["finetuned"]["response"] for sample in samples] == [None] * 3
    written = [sample["finetuned_blind"]["generated"] for sample in samples]
    assert all(isinstance(text, str) for text in written)
    right = [text.lower() == sample["target"] for text, sample in zip(written, samples, strict=True)]
    assert [row for row in document["generated"] if row["condition"] == "finetuned_blind"] == [
        {"condition": "finetuned_blind", "rule": "exact", **share(np.asarray(right)), "unread": 0}
    ]
    kept = {sample["id"]: sample["finetuned"]["loss"] for sample in lines(job.run / "samples.jsonl")}
    for sample in samples:
        assert sample["finetuned"]["loss"] == pytest.approx(kept[sample["id"]], rel=1e-4)


def test_check_shows_samples_as_the_model_sees_them_and_writes_nothing(job, tmp_path):
    code, out, err = in_process("check", job.config, "--show", "2", "--json", f"run_dir={tmp_path / 'never'}")
    assert code == 0, err
    document = json.loads(out)
    assert not (tmp_path / "never").exists()
    assert document["data"]["train"] == read(job.run / "data.json")["train"]
    assert [row["path"] for row in document["targets"]] == [
        "vision/layers/mlp/fc1", "vision/layers/mlp/fc2", "projector/linear_2", "llm/layers/self_attn/v_proj",
    ]  # fmt: skip
    first = {"module": "vision", "path": "vision/layers/mlp/fc1", "layers": 1, "in": 24, "out": 40}
    assert document["targets"][0] == first
    assert len(document["samples"]) == 2
    for sample in document["samples"]:
        assert "image tokens]" in sample["text"]
        assert "<pad>" not in sample["text"]
        assert sample["supervised"].endswith("<|im_end|>")
        assert sample["supervised"].removesuffix("<|im_end|>").rpartition("<|im_end|>")[2] in tiny_job.COLOURS


def test_status_and_plan_of_a_finished_run(job):
    code, out, err = in_process("status", job.config, "--json")
    status = json.loads(out)
    assert (code, status["process"], status["lanes_done"], status["lanes_planned"]) == (0, None, 18, 18), err
    code, out, err = in_process("plan", job.run, "--json")
    assert (code, json.loads(out)["rank_vectors"]) == (0, 6), err


# Beside its alternatives.


def test_any_strategies_are_compared_on_the_task_and_none_of_their_runs_twice(job, tmp_path):
    run = tmp_path / "run"
    settings = (
        *(
            f"run_dir={run}",
            "selection={method: race, sweep: 3}",
            "compare.strategies=[race,halving,restarts,laws+race]",
        ),
        "finetune={steps: 16, look_every: 8, warmup_steps: 1}",
        "evaluate={max_samples: 3, controls: false, batch_size: 4}",
    )
    job.mars("select", job.config, *settings)
    found = job.mars("compare", job.config, *settings)
    rows = {row["method"]: row for row in found["methods"]}
    assert {"race", "halving", "restarts", "laws+race"} < set(rows)
    assert all(rows[name]["runs"] == 1 and rows[name]["test_loss"] > 0 for name in ("race", "halving", "restarts"))
    assert rows["laws+race"]["compute"] > rows["race"]["compute"] * 0.5
    trials = (run / "compare" / "trials.jsonl").read_text()
    (run / "compare.json").unlink()
    assert job.mars("compare", job.config, *settings)["methods"] == found["methods"]
    assert (run / "compare" / "trials.jsonl").read_text() == trials
    code, _, error = in_process(
        "select", job.config, f"run_dir={tmp_path}/x", *settings[1:2], "compare.strategies=[laws]"
    )
    assert code == 2
    assert "compare.strategies has laws, which picks by probes of ranks, and selection.method: race runs none." in error


def test_the_pick_is_compared_with_alternatives_that_are_trained_as_it_was(job, tmp_path):
    run = copy_of(job, tmp_path / "copy", lambda config: None)
    found = job.mars("compare", run)
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows)[:3] == ["MARS", "uniform rank 1", "uniform rank 4"]
    assert list(rows)[3:-1] == [
        "largest ranks",
        "separate learning rates at rank 4",
        "random search, 6 runs",  # the search cost more than the whole grid has pairs
        "random ranks",
    ]
    halving = rows[list(rows)[-1]]
    assert list(rows)[-1].startswith(f"TPE and halving, {halving['runs']} runs and ")
    pick = rows["MARS"]
    # The same run as the one that `mars finetune` did, here as one lane of many.
    assert pick["validation_loss"] == pytest.approx(read(run / "finetune" / "summary.json")["best_validation_loss"])
    conditions = read(run / "evaluation.json")["conditions"]["finetuned"]
    assert pick["test_loss"] == pytest.approx(conditions["loss"], rel=1e-4)
    assert (pick["test_accuracy"], pick["test_loss_minus_picks"], pick["interval"]) == (
        conditions["accuracy"],
        0,
        [0, 0],
    )
    assert pick["search_seconds"] > 0
    lanes = lines(run / "probes" / "lanes.jsonl")
    assert pick["compute"] > len(lanes) * 16 / 16 / 4  # lanes have the final run's steps, and smaller ranks
    assert rows["uniform rank 4"]["ranks"] == {"vision": 4, "projector": 2, "llm": 4}
    assert rows["uniform rank 4"]["parameters"] > rows["uniform rank 1"]["parameters"]
    rated = rows["separate learning rates at rank 4"]
    assert (rated["runs"], rated["compute"]) == (5, pytest.approx(5 * rows["uniform rank 4"]["compute"]))
    assert rated["validation_loss"] <= rows["uniform rank 4"]["validation_loss"]
    for row in rows.values():
        assert row["interval"][0] <= row["test_loss_minus_picks"] <= row["interval"][1]
    trials = lines(run / "compare" / "trials.jsonl")
    assert len({trial["trial"] for trial in trials}) == len(trials)
    drawn = rows[next(name for name in rows if name.startswith("random search"))]
    assert drawn["validation_loss"] <= rows["random ranks"]["validation_loss"]
    assert not any((run / "compare" / "checkpoints").iterdir())
    # Again: nothing is trained, and a lost trial alone is.
    assert job.mars("compare", run) == found
    (run / "compare.json").unlink()
    rewrite(run, "compare/trials.jsonl", "".join(json.dumps(trial) + "\n" for trial in trials[1:]))
    assert job.mars("compare", run)["methods"][1:3] == found["methods"][1:3]


def test_larger_ranks_in_a_later_group_of_the_comparison_did_not_fit_the_program_of_the_first(job, tmp_path):
    def change(config: dict[str, Any]) -> None:
        config["probe"]["lanes_per_program"] = 1
        config["evaluate"]["max_samples"] = 3

    run = copy_of(job, tmp_path / "copy", change)
    job.mars("select", run)
    selection = read(run / "selection.json")
    smallest = min((c["ranks"] for c in selection["candidates"]), key=lambda ranks: sum(ranks.values()))
    rewrite(run, "selection.json", json.dumps({**selection, "pick": smallest}))
    rows = {row["method"]: row for row in job.mars("compare", run)["methods"]}
    assert rows["MARS"]["ranks"] == smallest
    assert rows["largest ranks"]["ranks"] == {"vision": 4, "projector": 2, "llm": 4}
    assert rows["largest ranks"]["diverged"] == 0


def test_tpe_stops_runs_of_a_comparison_and_does_not_train_them_again(job, tmp_path):
    run = tmp_path / "run"
    # A search so short that random search, with as much compute, can't pay for the whole grid.
    settings = [
        *("lora.modules.vision.ranks=[1,2,3,4]", "lora.modules.llm.ranks=[1,2,3,4]", "convergence.rule=null"),
        *("probe.num_samples=[8,16]", "probe.steps=4", "probe.corners=false", "selection.sweep=1"),
        *("finetune.steps=16", "finetune.look_every=2", "evaluate.max_samples=3", f"run_dir={run}"),
    ]
    found = job.mars("compare", job.config, *settings)
    halving = found["methods"][-1]
    trials = lines(run / "compare" / "trials.jsonl")
    stopped = [trial for trial in trials if trial["trial"].endswith(" (stopped)")]
    assert stopped
    assert {trial["looks"][-1][0] for trial in stopped} <= {4, 8}  # rungs
    assert not any("test_losses" in trial for trial in stopped)
    # Some had been trained to the end for other methods; TPE stops them at the rung all the same.
    assert halving["method"].startswith(f"TPE and halving, {halving['runs']} runs and ")
    assert halving["compute"] < found["methods"][-3]["compute"] + 1
    # Again from the records alone; and with one that was stopped lost, it is stopped again.
    (run / "compare.json").unlink()
    assert job.mars("compare", run) == found
    (run / "compare.json").unlink()
    kept = [trial for trial in trials if trial != stopped[-1]]
    rewrite(run, "compare/trials.jsonl", "".join(json.dumps(trial) + "\n" for trial in kept))
    assert job.mars("compare", run) == found


def test_without_a_rule_every_lane_adapts_all_modules_and_loss_alone_picks(job, tmp_path):
    config = job.config, "convergence.rule=null", "finetune.steps=4", "finetune.look_every=4", f"run_dir={tmp_path}/run"
    for phase in ("probe", "fit", "select"):
        job.mars(phase, *config)
    records = lines(tmp_path / "run" / "probes" / "lanes.jsonl")
    assert all(all(record["ranks"].values()) for record in records)
    assert {record["reason"] for record in records} == {"convergence is not measured"}
    assert not any(record["convergence_steps"] for record in records)
    laws, selection = read(tmp_path / "run" / "laws.json"), read(tmp_path / "run" / "selection.json")
    assert (laws["convergence"], laws["untimed"]) == ({}, {})
    assert (selection["fallback"], selection["tau"]) == (None, None)
    report = read(Path(job.mars("report", tmp_path / "run")["report"]).with_name("report.json"))
    assert not any("onverge" in text for text in [*report["verdict"]["sentences"], *report["verdict"]["warnings"]])


# Stopped and gone on with.


def start(job: Job, config: Path, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        tiny_job.command(command, config, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tiny_job.environment(job.cache),
    )


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    limit = time.monotonic() + 100
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_the_export_is_verified_in_pytorch(job, tmp_path):
    run = copy_of(job, tmp_path / "copy", lambda config: None)
    document = job.mars("export", run, "--verify", "--merged", torch=True)
    verified = document["verified"]
    assert document["merged"] == str(run / "merged")
    assert verified["adapter"]["tensors"] == 2 * 4  # a and b of four linears of one layer
    for result in verified.values():
        assert result["logits_difference"] < 1e-4
        assert result["base_difference"] < 1e-4
        assert result["moved"] > 0.1
    for answers in (document["answers"]["adapter"], document["answers"]["merged"]):
        assert answers["samples"] == 4
        assert answers["tokens"] >= 4
    state = read(run / "state.json")["phases"]
    assert {"export", "merge"} <= state.keys()
    # What is written is not written again, with or without the merged checkpoint.
    for arguments in (["--merged"], []):
        code, _, err = in_process("export", run, *arguments)
        assert (code, err.count("done before, skipped")) == (0, 1 + len(arguments)), err


# The other rule.


def test_the_loss_fraction_rule_plans_and_reads_lanes_of_one_module(job, tmp_path):
    run = tmp_path / "run"
    settings = {"corners": False, "num_samples": [8, 32]}
    rule = {"rule": "loss_fraction", "epsilon": None}
    slow = {"learning_rate": 0.003}
    config = tiny_job.config(
        tmp_path / "a.yaml", job.base, job.train, run, probe=settings, convergence=rule, optimizer=slow
    )
    assert job.mars("probe", config) == {"lanes": 18, "horizon": 18}
    lanes = lines(run / "probes" / "lanes.jsonl")
    alone = [lane for lane in lanes if len(lane["adapted"]) == 1]
    together = [lane for lane in lanes if len(lane["adapted"]) == 3]
    assert (len(alone), len(together)) == (2 * 5, 2 * 4)
    for lane in alone:
        (module,) = lane["adapted"]
        assert lane["ranks"] == {"vision": 0, "projector": 0, "llm": 0, module: lane["ranks"][module]}
        # Its loss still falls at the horizon.
        assert (lane["convergence_steps"], lane["censored"]) == ({module: 16}, {module: True})
        assert lane["update_norm"].keys() == {module}
    for lane in together:
        assert lane["convergence_steps"] == lane["censored"] == {}
        assert lane["reason"] == "the rule speaks of lanes that adapt one module"
    # No time was measured, and none is made up.
    assert in_process("fit", config)[0] == 0
    laws = read(run / "laws.json")
    assert laws["convergence"] == {}
    assert laws["untimed"]["vision"].startswith(
        "Law-C of module 'vision': 0 converged points for 3 parameters (6 points, 6 of them censored)"
    )
