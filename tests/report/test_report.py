"""The report: pages of whole and partial runs are complete and self-contained, and values are escaped."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import yaml

from mars_jax.errors import ConfigError, DataError
from mars_jax.report import write_report
from mars_jax.runtime.jsonfiles import append_jsonl, write_json, write_text
from mars_jax.runtime.text import visible
from tests.helpers.report_run import LOOKS, TARGET, make_lanes, make_run, steps_of


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails on tags that do not nest."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report_of(run: Path) -> tuple[str, dict[str, Any]]:
    """Writes the report of a run: the text of its page, and report.json."""
    page = write_report(run)
    return Page(page).text, json.loads((page.parent / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(run)
    return run


def test_the_verdict_names_the_pick_and_what_it_is_worth(whole: Path) -> None:
    page = Page(whole / "report/index.html").text
    assert "Use rank 32 for vision and rank 16 for llm (given: projector 8)." in page
    assert "In 86% of the bootstrap refits this choice has the lowest predicted validation loss of the 8" in page
    steps = [round(steps_of("vision", 32, TARGET)), round(steps_of("llm", 16, TARGET))]
    assert f"should converge together: vision after about {steps[0]} and llm after about {steps[1]} steps" in page
    assert "answers 88.2% correctly (41.3% with a blank image), the base model 5.2%" in page
    assert "1 of 44 probe lanes diverged and count for no law: vision16-llm16-projector8-D512-s0." in page
    assert "pruned as unbalanced, the lowest for vision 4, llm 64, projector 8" in page


def test_the_page_has_every_part(whole: Path) -> None:
    page = Page(whole / "report/index.html")
    links = {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")}
    ids = [value for name, value in page.attributes if name == "id"]
    assert {"results", "grid", "candidates", "laws", "curves", "probes", "data", "costs", "use", "versions"} <= links
    assert links <= set(ids)
    assert len(ids) == len(set(ids))
    assert ("class", "absent") not in page.attributes
    for text in (
        "fine-tuned, another sample's image 2.61 13.6 39.1% 34.6%",
        "17 pruned candidates",
        "validation loss not finite at step 225",
        "easy-000017 3 images but 1 <image>",
        "Peak memory of the process: 3.2 GiB",
        "probe 1 h 10 min done",
        "PeftModel.from_pretrained(model, ",
        f"mars export {whole} --merged --verify",
        f"vllm serve {whole / 'merged'}",
        "jax 0.10.1",
        "checkpoint: bases/tiny-onevision",
    ):
        assert text in page.text


def test_the_page_has_accuracies_by_rule_and_by_kind_of_question(whole: Path) -> None:
    page, dash = Page(whole / "report/index.html").text, "\N{EN DASH}"
    for text in (
        f"condition read by rule accuracy 95% interval not read base model exact 87.1% 84.0%{dash}90.0% 3",
        f"subject: shape & form string_loglik 256 50.0% 40.0%{dash}60.0% 51.0%",
        "average exact 77.0%",
        "By exact the fine-tuned model alone is right on 345 samples, the base alone on 12",
    ):
        assert text in page


def test_the_page_loads_nothing_from_elsewhere(whole: Path) -> None:
    page, source = Page(whole / "report/index.html"), (whole / "report/index.html").read_text(encoding="utf-8")
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    loading = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loading
    assert all(value.startswith("#") for value in loading)
    assert "@import" not in source
    assert set(re.findall(r"url\((.)", source)) <= {"#"}


def test_figures_are_files_and_follow_the_page_colours(whole: Path) -> None:
    folder = whole / "report"
    figures = json.loads((folder / "report.json").read_text())["figures"]
    assert set(figures) == {
        "finetune_curves",
        "law_c",
        "law_p",
        "probe_curves_llm",
        "probe_curves_vision",
        "probe_curves_vision_llm_projector",
        "rank_grid",
    }
    assert {path.name for path in folder.glob("*.svg")} == set(figures.values())
    for name in figures.values():
        ElementTree.parse(folder / name)
        assert "var(--" not in (folder / name).read_text(encoding="utf-8")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count('<svg role="img" aria-label="') == len(figures)
    assert "stroke: var(--ramp-0)" in page
    assert "0.364" in (folder / "rank_grid.svg").read_text(encoding="utf-8")  # the predicted loss of the pick


def test_report_json(whole: Path) -> None:
    report = json.loads((whole / "report/report.json").read_text(encoding="utf-8"))
    assert report["schema"] == 1
    assert report["verdict"]["pick"] == {"vision": 32, "llm": 16, "projector": 8}
    assert report["sources"]["absent"] == []
    assert report["probes"]["statuses"]["diverged"] == 1
    assert "draws" not in report["laws"]
    losses = [c["predicted_loss"] for c in report["selection"]["candidates"] if c["kept"]]
    assert losses == sorted(losses)
    assert len(report["selection"]["candidates"]) == 25
    search, grid = 44 * LOOKS[-1], 25 * 1200
    assert report["costs"]["search"] == {"steps": search, "samples": 16 * search, "tokens": round(16 * search * 55.5)}
    assert report["costs"]["full_grid"]["samples"] == 32 * grid
    assert report["costs"]["search_share_of_full_grid"] == pytest.approx(16 * search / (32 * grid))


def test_the_same_files_give_the_same_bytes_and_settings_stay(whole: Path) -> None:
    matplotlib.get_backend()  # resolves the one setting that matplotlib fills in when first asked
    settings = matplotlib.rcParams.copy()
    before = {path.name: path.read_bytes() for path in (whole / "report").iterdir()}
    write_text(whole / "report/rank_grid_old.svg", "left from an earlier state")
    write_report(whole)
    assert {path.name: path.read_bytes() for path in (whole / "report").iterdir()} == before
    assert matplotlib.rcParams == settings


def test_import_is_cheap() -> None:
    heavy = "{'matplotlib', 'jinja2', 'jax'} & set(sys.modules)"
    code = f"import sys, mars_jax.report; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def copy_of(whole: Path, run: Path, *names: str) -> Path:
    for name in names:
        write_text(run / name, (whole / name).read_text(encoding="utf-8"))
    return run


def test_probes_and_laws_only(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "part", "probes/lanes.jsonl", "probes/curves.jsonl", "laws.json")
    page, report = report_of(run)
    assert "No ranks are picked yet: the laws are fitted, the selection has not run." in page
    assert "Not in this run yet: config.resolved.yaml , state.json" in page
    for text in (
        "Not evaluated yet",
        "No candidates with a predicted loss yet",
        "No final fine-tune yet",
        "No data summary",
    ):
        assert text in page
    assert "The adapter is not exported yet" in page
    assert "rank_grid" not in report["figures"]
    assert {"law_c", "law_p"} <= set(report["figures"])
    assert report["evaluation"] is None
    assert report["costs"]["search"] == {"steps": 44 * LOOKS[-1], "samples": None, "tokens": None}


def test_lanes_only(whole: Path, tmp_path: Path) -> None:
    page, report = report_of(copy_of(whole, tmp_path / "part", "probes/lanes.jsonl"))
    assert "No ranks are picked yet: 44 probe lanes have finished, the laws are not fitted." in page
    assert "Not fitted yet: run mars fit." in page
    assert "No probe curves in this directory." in page
    assert report["figures"] == {}


def test_laws_without_lanes(whole: Path, tmp_path: Path) -> None:
    page, report = report_of(copy_of(whole, tmp_path / "part", "laws.json"))
    assert "the lanes they were fitted to are not in this directory" in page
    assert report["figures"] == {}


def test_state_only(tmp_path: Path) -> None:
    write_json(
        tmp_path / "state.json", {"phases": {"probe": {"status": "interrupted", "seconds": 3.0}}, "versions": {}}
    )
    page, report = report_of(tmp_path)
    assert "no probe lane has finished" in page
    assert report["verdict"]["warnings"] == ["The phase probe was interrupted."]


def test_values_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>"
    write_json(tmp_path / "data.json", {"train": 1, "dropped": [{"id": evil, "reason": f'"{evil}&amp;'}]})
    write_text(tmp_path / "config.resolved.yaml", f'run_dir: "{evil}"\n')
    page = write_report(tmp_path)
    assert "<script" not in page.read_text(encoding="utf-8")
    assert f'{evil} "{evil}&amp;' in Page(page).text


EVIL = "</script><img src=x onerror=a()>\"'><svg/onload=b()>]]>{{ 7*7 }}{% raw %}$x^{ \x1b[2J\x9b\u202e\x00 &lt; --> `"

# Texts that come from data, configs and checkpoints, and those that libraries and phases write.
EVIL_KEYS = {"id", "reason", "value", "tag", "category", "explanation", "base_model_name_or_path", "python", "jax"}


def test_no_hostile_name_of_any_file_adds_an_element_or_an_attribute(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run ;$(x) 'y' <b>"))
    plain = Page(write_report(run))

    def spoiled(value: Any, key: str = "") -> Any:
        """The same document, each text that isn't a key of the tool's own vocabulary replaced."""
        if isinstance(value, dict):
            return {name: spoiled(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item, key) for item in value]
        return EVIL if isinstance(value, str) and key in EVIL_KEYS else value

    for file in (*run.glob("*.json"), *run.glob("*/*.json")):
        write_json(file, spoiled(json.loads(file.read_text())))
    for file in run.glob("*/*.jsonl"):
        lines = [spoiled(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    write_text(run / "config.resolved.yaml", yaml.safe_dump({**config, "run_dir": EVIL, "x": {EVIL: EVIL}}))
    page = Page(path := write_report(run))
    text = path.read_text(encoding="utf-8")
    assert text.count(escape("<img src=x onerror=a()>")) > 10
    assert page.tags == plain.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert [value for name, value in page.attributes if name == "href"] == [
        value for name, value in plain.attributes if name == "href"
    ]
    assert visible(text) == text
    for figure in (run / "report").glob("*.svg"):
        ElementTree.parse(figure)
    usage = page.text[page.text.index("As one merged") :]
    assert f"mars export {shlex.quote(str(run))} --merged --verify" in usage


def test_modules_of_any_name_are_drawn_inside_the_report(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    names = {"vision": "../../../<v>$x^{", "llm": "]]>\x1b[1m\u202e"}
    for file in (*run.glob("*.json"), *run.glob("*/*.json"), *run.glob("*/*.jsonl")):
        text = file.read_text()
        for name, odd in names.items():
            text = text.replace(f'"{name}"', json.dumps(odd))
        file.write_text(text)
    page = write_report(run)
    assert sorted(path.name for path in (tmp_path).iterdir()) == ["run"]
    figures = list((run / "report").glob("*.svg"))
    assert len(figures) == len(list((whole / "report").glob("*.svg"))) or len(figures) > 4
    for figure in figures:
        texts = "".join(ElementTree.parse(figure).getroot().itertext())
        assert "\x1b" not in texts
    assert "../../../<v>$x^{" in Page(page).text


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("data.json", {"train": "many"}, "train is 'many' but must be a valid integer"),
        ("selection.json", {"candidates": [3]}, "candidates.0 is 3 but must be an object"),
        ("evaluation.json", {"conditions": ["base"]}, r"conditions is \['base'\] but must be an object"),
        ("laws.json", {"convergence": {"vision": None}}, "convergence.vision is None but must be an object"),
        ("plan.json", {"full_grid_steps": "x"}, "full_grid_steps is 'x' but must be a valid integer"),
        ("state.json", {"phases": [1]}, r"phases is \[1\] but must be an object"),
    ],
)
def test_a_file_of_other_values_is_refused_and_the_old_report_stays(whole, tmp_path, name, change, text) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    write_json(run / name, json.loads((run / name).read_text()) | change)
    before = (run / "report/index.html").read_bytes()
    with pytest.raises(DataError, match=rf"{name}: {text}"):
        write_report(run)
    assert (run / "report/index.html").read_bytes() == before


def test_a_lane_that_is_but_a_name_ended_in_a_traceback(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "part", "probes/lanes.jsonl")
    append_jsonl(run / "probes/lanes.jsonl", {"lane": "a"})
    with pytest.raises(DataError) as error:
        write_report(run)
    assert str(error.value) == f"{run / 'probes/lanes.jsonl'}, line 45: ranks is missing. Mend or delete the line."


def test_lanes_that_do_not_name_their_modules_ended_in_a_traceback(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "part", "probes/lanes.jsonl", "probes/curves.jsonl")
    lines = [json.loads(line) for line in (run / "probes/lanes.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "adapted"}) + "\n" for line in lines)
    (run / "probes/lanes.jsonl").write_text(text)
    _, report = report_of(run)
    _, expected = report_of(copy_of(whole, tmp_path / "same", "probes/lanes.jsonl", "probes/curves.jsonl"))
    assert report["probes"] == expected["probes"]
    assert report["figures"] == expected["figures"]


def test_a_torn_last_line_is_left_out_and_said(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "part", "probes/lanes.jsonl")
    with (run / "probes/lanes.jsonl").open("a") as file:
        file.write('{"lane": 44, "ranks"')
    _, report = report_of(run)
    assert len(report["probes"]["lanes"]) == 44
    assert "lanes.jsonl, line 45: incomplete, as after a kill" in report["verdict"]["warnings"][0]


@pytest.mark.parametrize(
    ("name", "change", "warning"),
    [
        ("selection.json", {"fallback": "no pair is balanced"}, "Fallback: no pair is balanced"),
        ("selection.json", {"p_best": 0.41}, "The laws do not settle this choice (P(best) 41%, 80% is required)"),
        (
            "selection.json",
            {
                "candidates": [
                    {
                        "ranks": {"vision": v, "llm": r, "projector": 8},
                        "kept": True,
                        "predicted_loss": loss,
                        "parameters": 9,
                    }
                    for (v, r), loss in {(8, 32): 2.0, (16, 32): 2.03, (16, 64): 2.035}.items()
                ],
                "pick": {"vision": 8, "llm": 32, "projector": 8},
            },
            "2 other candidates are predicted within 2% of the pick's loss",
        ),
        (
            "selection.json",
            {"pick": {"vision": 64, "llm": 4, "projector": 8}},
            "The picked vision rank 64 is the largest of its grid: larger ranks were not considered.",
        ),
        (
            "selection.json",
            {"pick": {"vision": 64, "llm": 4, "projector": 8}},
            "The picked llm rank 4 is the smallest of its grid: smaller ranks were not considered.",
        ),
        ("laws.json", {"performance": {"order_tau": 0.1}}, "in a poor order (Kendall tau 0.10; 1 is perfect)"),
        (
            "laws.json",
            {"convergence": {"llm": {"gamma": 0.04}}},
            "A larger llm rank does not converge sooner here (gamma +0.04; below 0 is expected)",
        ),
        (
            "evaluation.json",
            {"conditions": {"finetuned_blind": {"accuracy": 0.86}}},
            "With a blank image the fine-tuned model is about as accurate (86.0%) as with the right one (88.2%)",
        ),
        (
            "evaluation.json",
            {"conditions": {"finetuned": {"loss": 3.5}}},
            "Fine-tuning did not lower the test loss (3.50, base model 3.41).",
        ),
        ("finetune/summary.json", {"best_step": 1200}, "lowest at its last step: more steps may help"),
    ],
)
def test_warnings(whole: Path, tmp_path: Path, name: str, change: dict[str, Any], warning: str) -> None:
    run = copy_of(whole, tmp_path / "part", name)
    document = json.loads((run / name).read_text(encoding="utf-8"))
    assert not any(warning in text for text in report_of(run)[1]["verdict"]["warnings"])
    write_json(run / name, merged(document, change))
    page, report = report_of(run)
    assert any(warning in text for text in report["verdict"]["warnings"])
    assert warning in page


def merged(document: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    def value(key: str) -> Any:
        nested = isinstance(change[key], dict) and key != "pick"
        return merged(document[key], change[key]) if nested else change[key]

    return document | {key: value(key) for key in change}


def test_warnings_about_lanes(whole: Path, tmp_path: Path) -> None:
    for lane in make_lanes(np.random.default_rng(0)):
        short = {"num_samples": lane["num_samples"] // 4, "censored": dict.fromkeys(lane["censored"], True)}
        append_jsonl(tmp_path / "part/probes/lanes.jsonl", lane | short)
    warnings = report_of(copy_of(whole, tmp_path / "part", "selection.json"))[1]["verdict"]["warnings"]
    assert any("at 4096 samples reaches 16 times beyond the largest probe (256 samples)" in text for text in warnings)
    assert any("vision had not converged at the end of 32 of 32 lanes" in text for text in warnings)


def test_the_page_shows_the_losses_and_the_cost_of_a_sweep(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "part", "selection.json", "finetune/summary.json", "config.resolved.yaml")
    document = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    steps = json.loads((run / "finetune/summary.json").read_text(encoding="utf-8"))["steps"]
    others = [c["ranks"] for c in document["candidates"] if c["ranks"] != document["pick"]][:2]
    for candidate in document["candidates"]:
        candidate["probed_loss"] = 1.25 if candidate["ranks"] in [*others, document["pick"]] else None
    write_json(
        run / "selection.json", document | {"method": "local_sweep", "p_best": 0.5, "explanation": "It won 3 rungs."}
    )
    runs = [
        {"ranks": document["pick"], "looks": [[0, 2.0], [steps, 0.5]]},
        {"ranks": others[0], "looks": [[0, 2.0], [steps // 2, 0.8125]]},
        {"ranks": others[1], "looks": [[0, 2.0], [steps // 4, None]]},
    ]
    write_json(run / "sweep/runs.json", {"runs": runs})
    page, report = report_of(run)
    assert "3 of the 25 rank vectors were probed; the best 3 of these had final runs, and" in page
    assert "It won 3 rungs." in page
    assert not any("do not settle" in text for text in report["verdict"]["warnings"])
    assert report["costs"]["sweep"]["steps"] == steps // 2 + steps // 4
    assert [one["loss"] for one in report["sweep"]] == [0.5, 0.8125, None]
    assert f"1.25 0.812 {steps // 2:,}" in page


def test_steps_of_a_pass_that_is_read_at_three_sizes_were_counted_three_times(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "part", "config.resolved.yaml")
    for lane in make_lanes(np.random.default_rng(0))[:2]:
        for part in (4, 2, 1):
            append_jsonl(
                run / "probes/lanes.jsonl",
                lane | {"num_samples": 2048 // part, "steps": 128 // part, "lane": f"{lane['lane']}-{part}"},
            )
    nested = (
        (run / "config.resolved.yaml").read_text(encoding="utf-8").replace("probe:", "probe:\n  sampling: nested", 1)
    )
    (run / "config.resolved.yaml").write_text(nested, encoding="utf-8")
    assert report_of(run)[1]["costs"]["search"]["steps"] == 2 * 128


@pytest.mark.parametrize(
    ("grids", "texts"),
    [
        ({"vision": [4, 8], "projector": [2, 4], "llm": [8, 16]}, ["with llm 8", "with projector 2", "with vision 4"]),
        ({"llm": [8, 16, 32]}, ["llm rank"]),
    ],
)
def test_grids_of_other_sizes(tmp_path: Path, grids: dict[str, list[int]], texts: list[str]) -> None:
    candidates = [
        {
            "ranks": dict(zip(grids, ranks, strict=True)),
            "kept": i == 0,
            "predicted_loss": 0.3 + 0.01 * i,
            "reason": None,
        }
        for i, ranks in enumerate(product(*grids.values()))
    ]
    write_json(tmp_path / "selection.json", {"pick": candidates[0]["ranks"], "p_best": 0.9, "candidates": candidates})
    write_report(tmp_path)
    figure = (tmp_path / "report/rank_grid.svg").read_text(encoding="utf-8")
    assert all(f">{text}<" in figure for text in texts)


def test_errors_say_what_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: no such run directory\. Give the directory that `mars run` wrote"):
        write_report(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"not a run directory: it holds none of config\.resolved\.yaml, state\.json"):
        write_report(tmp_path)
    write_text(tmp_path / "data.json", "[1, 2]")
    with pytest.raises(DataError, match=r"data\.json holds a JSON list where a mapping of names is expected"):
        write_report(tmp_path)
    write_text(tmp_path / "data.json", "{")
    with pytest.raises(DataError, match=r"data\.json is not JSON"):
        write_report(tmp_path)
    write_text(tmp_path / "data.json", "{}")
    write_text(tmp_path / "config.resolved.yaml", "a: [")
    with pytest.raises(DataError, match=r"config\.resolved\.yaml is not YAML"):
        write_report(tmp_path)
