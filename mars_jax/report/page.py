"""Writes `report/` of a run directory: index.html, an SVG file for each figure, and report.json."""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mars_jax.job import files
from mars_jax.report import words
from mars_jax.report.collect import RunRecord, read_run
from mars_jax.report.facts import CONDITIONS, build_report, picked_candidate
from mars_jax.report.figures_curves import finetune_curves, probe_curves, probe_groups
from mars_jax.report.figures_laws import law_c, law_p, rank_grid
from mars_jax.report.figures_steps import step_law
from mars_jax.report.laws_data import joint_lanes, searched_modules
from mars_jax.report.style import DARK, LIGHT, figure_style, inline_svg, to_svg
from mars_jax.runtime.jsonfiles import Document, write_json, write_text
from mars_jax.runtime.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUS_WORDS = {"converged": "converged", "horizon": "not converged", "diverged": "diverged"}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        section: part of the page that it belongs to.
        name: name of its file, without `.svg`.
        title: heading, also the description for screen readers.
        caption: text below it.
        svg: standalone SVG text.
    """

    section: str
    name: str
    title: str
    caption: str
    svg: str

    @property
    def inline(self) -> str:
        """SVG element for the page, with a description and the colours of the theme."""
        return inline_svg(self.svg, self.title)


def write_report(run_directory: Path) -> Path:
    """Writes `report/{index.html, *.svg, report.json}` from those files of a run directory that exist.

    The same files give the same bytes. The page names the parts whose files are absent.

    Returns:
        The path of index.html.

    Raises:
        ConfigError: the directory does not exist, or has no file of a run.
        DataError: a file of the run is not valid.
    """
    run = read_run(run_directory)
    drawings = draw(run)
    report = build_report(run) | {"figures": {drawing.name: f"{drawing.name}.svg" for drawing in drawings}}
    text = render(run, report, drawings)
    folder = run_directory / files.REPORT
    shutil.rmtree(folder, ignore_errors=True)  # figures of an earlier state of the run must not stay
    for drawing in drawings:
        write_text(folder / f"{drawing.name}.svg", drawing.svg)
    write_json(folder / "report.json", report)
    page = folder / "index.html"
    write_text(page, text)
    return page


def draw(run: RunRecord) -> tuple[Drawing, ...]:
    """All figures for which the run has files, in the order of the page."""
    with figure_style():
        return tuple(
            Drawing(section, name, title, caption, to_svg(figure, name))
            for section, name, title, caption, figure in _figures(run)
            if figure is not None
        )


def _figures(run: RunRecord) -> "Iterator[tuple[str, str, str, str, Figure | None]]":
    """Section, name, title, caption and figure of each drawing."""
    from mars_jax.laws.fit import Laws

    for group in probe_groups(run):
        yield (
            "probe_curves",
            f"probe_curves_{'_'.join(re.sub(r'[^A-Za-z0-9_]', '-', module) for module in group)}",
            f"Probe lanes that adapt {words.listing(list(group))}",
            "Validation loss, a panel for each number of training samples D."
            + (" A dot is where the module has converged." if len(group) == 1 else ""),
            probe_curves(run, group),
        )
    yield (
        "finetune",
        "finetune_curves",
        "Final fine-tune",
        "Train loss of single steps and validation loss of each eval point.",
        finetune_curves(run),
    )
    if run.laws:
        laws = Laws.from_json(dict(run.laws))
        yield (
            "laws",
            "law_c",
            "Law-C: how long each module takes to converge",
            "Each point is a lane; a hollow triangle had not converged at its last step, so its time is a lower limit. "
            "Lines are the fitted law, bands the central 95% of the bootstrap refits.",
            law_c(run, laws.convergence),
        )
        yield (
            "laws",
            "law_p",
            "Law-P: the loss that ranks and data size lead to",
            "Left: on the diagonal the law is exact; bars are the central 95% of the bootstrap refits. "
            "Right: lines are the fitted law, points the lanes.",
            None if laws.performance is None else law_p(run, laws.performance),
        )
    yield (
        "laws",
        "step_law",
        "Law-P in step sizes: the loss that ranks and learning rates lead to",
        "Points are final runs, hollow where they were stopped, by how much they were above the lowest at their last "
        "step. Lines are the fitted law, with the other modules as picked; a dotted line is the pick.",
        step_law(run),
    )
    largest = max((lane["num_samples"] for lane in joint_lanes(run)), default=None)
    measured = f" In brackets: the loss measured with {largest} samples." if largest else ""
    yield (
        "grid",
        "rank_grid",
        "Predicted loss over the rank grid",
        f"Predicted validation loss with {run.selection.get('target_num_samples')} training samples; darker is lower. "
        f"The outline holds the balanced candidates, the orange frame is the pick.{measured}",
        rank_grid(run),
    )


def render(run: RunRecord, report: Document, drawings: tuple[Drawing, ...]) -> str:
    """HTML text of the page; every value from the run is escaped, and its control characters are shown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mars_jax.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    for name in ("number", "count", "percent", "duration", "size", "ranks_text"):
        environment.filters[name] = getattr(words, name)
    environment.filters["ratio"] = lambda log_ratio: f"{math.exp(log_ratio):.2f}\u00d7"
    searched = searched_modules(run)
    figures: dict[str, list[dict[str, str]]] = {}
    for drawing in drawings:
        entry = {"title": drawing.title, "caption": drawing.caption, "svg": Markup(drawing.inline)}
        figures.setdefault(drawing.section, []).append(entry)
    return environment.get_template("page.html.j2").render(
        report=report,
        conditions=[
            (label, report["evaluation"]["conditions"][name])
            for name, label in CONDITIONS.items()
            if report["evaluation"] and name in (report["evaluation"].get("conditions") or {})
        ],
        titles=CONDITIONS,
        picked=picked_candidate(run),
        searched=searched,
        fixed={module: rank for module, rank in (run.selection.get("pick") or {}).items() if module not in searched},
        lane_modules=list(dict.fromkeys(module for lane in run.lanes for module in lane["adapted"])),
        lane_timed=list(dict.fromkeys(module for lane in run.lanes for module in lane["convergence_steps"])),
        status_words=STATUS_WORDS,
        figures=figures,
        usage=usage(run),
        config_text=run.config_text,
        light=LIGHT,
        dark=DARK,
    )


def usage(run: RunRecord) -> dict[str, str | bool]:
    """Commands and code that use the run's adapter, by kind, and whether the adapter is exported."""
    base = (
        run.adapter.get("base_model_name_or_path") or (run.config.get("model") or {}).get("checkpoint") or "BASE_MODEL"
    )
    return {
        "exported": bool(run.adapter),
        "peft": (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f"base = {str(base)!r}\n"
            "processor = AutoProcessor.from_pretrained(base)\n"
            "model = AutoModelForImageTextToText.from_pretrained(base)\n"
            f"model = PeftModel.from_pretrained(model, {str(run.directory / files.ADAPTER)!r})"
        ),
        "merge": f"mars export {quote(str(run.directory))} --merged --verify",
        "serve": f"vllm serve {quote(str(run.directory / files.MERGED))}",
    }
