"""Writes docs/performance.md, evidence.md and laws.md from benchmarks/results/*.json and templates; measures nothing.

The first line of a script's docstring is what it measures, in the table of all results; the paragraphs up to the usage
are the text of its section. Which rows are shown, and what they mean, is in benchmarks/lib/pages.py and, for
evidence.md and laws.md, benchmarks/evidence/page.py. A result without an entry there shows its `detail.tables`: title
-> rows.

    python -m benchmarks.lib.tables [--results FOLDER] [--out FOLDER]
"""

import argparse
import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.evidence import page as evidence_page
from benchmarks.lib import pages
from benchmarks.lib.markdown import Row, cell, number, table
from benchmarks.lib.results import MAX_FOREIGN_CORES, RESULTS
from mars_jax.runtime.jsonfiles import read_json, write_text

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent
ROOT = BENCHMARKS.parent
PAGES = {
    "evidence": ("evidence", "law_forms", "beginnings", "perturbed", "noise"),
    "laws": ("law_fits", "coverage", "planted"),
}
"""Pages and their results; all others are on `performance`."""

ORDER = (
    "evidence",
    "beginnings",
    "perturbed",
    "law_forms",
    "probe_grid",
    "step_beside_peft",
    "gpu_step",
    "search_beside_grid",
    "useful_steps",
    "compiles",
    "lanes_together",
    "xla_flops",
    "lanes_beside_processes",
    "accelerator_plans",
    "remat",
    "real_checkpoint",
    "kills",
    "fuzz",
    "adapter_matrix",
)
SECTIONS = {**pages.SECTIONS, **evidence_page.SECTIONS}


def main() -> None:
    """Writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pages")
    options = parser.parse_args()
    documents = {file.stem: read_json(file) for file in sorted(options.results.glob("*.json"))}
    for name, text in texts(documents).items():
        write_text(options.out / f"{name}.md", text)
        print(f"wrote {options.out / name}.md")


def texts(documents: Mapping[str, Row]) -> dict[str, str]:
    """The text of each page that some of the results belong to, by its name."""
    of_page: dict[str, dict[str, Row]] = {}
    for key, value in documents.items():
        of_page.setdefault(page_of(key), {})[key] = value
    return {name: page(of_page[name], name) for name in ("performance", *PAGES) if name in of_page}


def page_of(result: str) -> str:
    """The page that shows a result."""
    return next((name for name, results in PAGES.items() if result in results), "performance")


def page(documents: Mapping[str, Row], name: str = "performance") -> str:
    """The page of some results, by id; those of `ORDER` come first."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"number": number, "cell": cell}
    ids = [*(key for key in ORDER if key in documents), *(key for key in documents if key not in ORDER)]
    text = environment.get_template(f"{name}.md.j2").render(
        results=[shown(documents[name]) for name in ids],
        missing=[key for key in ORDER if key not in documents and page_of(key) == name],
        busy_cores=MAX_FOREIGN_CORES,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shown(document: Row) -> dict[str, Any]:
    """A result as the templates want it."""
    detail, versions = document["detail"], document["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "peft") if versions.get(name))
    device = f"{detail['device']}, " if "device" in detail else ""
    script = script_of(document["command"])
    what, _, about = introduction(script).partition("\n")
    of_page = SECTIONS.get(document["id"], lambda detail: pages.Section(detail["tables"]))(detail)
    return {
        **document,
        "what": what.removesuffix("."),
        "about": about.strip(),
        "script": f"../{script.relative_to(ROOT)}",
        "machine": f"{device}{versions['cores']} cores of {versions['cpu']}, Python {versions['python']}, {packages}",
        "reached": reached(document["figure"], document["goal"]),
        "form": detail.get("form", "full"),
        "tables": [{"title": title, "text": table(rows)} for title, rows in of_page.tables.items() if rows],
        "meaning": of_page.meaning,
        "losses": of_page.losses,
    }


def reached(figure: float, goal: str) -> str:
    """Whether a figure is what its goal says: "at least 5, aim for 10", "at most 4", "above 1", "below 0.5"."""
    found = re.match(r"(at least|at most|above|below) ([\d.]+)", goal)
    if not found:
        return ""
    limit = float(found[2])
    held = {"at least": figure >= limit, "at most": figure <= limit, "above": figure > limit, "below": figure < limit}
    return "yes" if held[found[1]] else "no"


def script_of(command: str) -> Path:
    """The script that a command line runs: "python -m benchmarks.speed.compiles" is benchmarks/speed/compiles.py."""
    _, _, module, *_ = command.split()
    return ROOT / f"{module.replace('.', '/')}.py"


def introduction(script: Path) -> str:
    """The docstring of a script up to its usage."""
    document = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return document.partition("\n\n    python ")[0].strip()


if __name__ == "__main__":
    main()
