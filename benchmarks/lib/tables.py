"""Writes docs/performance.md and docs/evidence.md from benchmarks/results/*.json and templates. It measures nothing.

What a benchmark measures is told by the docstring of its script. Its tables are `detail.tables`, a mapping of titles to
rows; where a result has none, every number of its detail is listed.

    python -m benchmarks.lib.tables [--results FOLDER] [--out FOLDER]
"""

import argparse
import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.lib.results import RESULTS
from mars_jax.runtime.jsonfiles import read_json, write_text

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent
EVIDENCE = ("law_fits", "planted", "evidence")
ORDER = (
    "probe_grid",
    "step_beside_peft",
    "compiles",
    "xla_flops",
    "lanes_together",
    "search_beside_grid",
    "lanes_beside_processes",
    "accelerator_plans",
    "useful_steps",
    "gpu_step",
    "kills",
    "adapter_matrix",
)

Row = Mapping[str, Any]


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=BENCHMARKS.parent / "docs", help="folder of the pages")
    options = parser.parse_args()
    documents = {file.stem: read_json(file) for file in sorted(options.results.glob("*.json"))}
    for name in ("performance", "evidence"):
        shown = {key: value for key, value in documents.items() if (key in EVIDENCE) == (name == "evidence")}
        if shown:
            write_text(options.out / f"{name}.md", page(shown, name))
            print(f"wrote {options.out / name}.md from {len(shown)} results")


def page(documents: Mapping[str, Row], name: str = "performance") -> str:
    """The page of some results, by id; those of `ORDER` come first."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.filters["number"] = number
    template = environment.from_string((HERE / f"{name}.md.j2").read_text(encoding="utf-8"))
    ids = [*(key for key in ORDER if key in documents), *(key for key in documents if key not in ORDER)]
    text = template.render(
        results=[shown(documents[name]) for name in ids],
        missing=[key for key in ORDER if key not in documents],
        losses=losses(documents),
        floor=floor(documents["xla_flops"]["detail"]["demo"]["minimum_flops"]) if "xla_flops" in documents else "",
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def shown(document: Row) -> dict[str, Any]:
    """A result as the template wants it."""
    detail, versions = document["detail"], document["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "peft") if versions.get(name))
    device = f"{detail['device']}, " if "device" in detail else ""
    tables = detail.get("tables") or {"": [{"what": what, "value": value} for what, value in leaves(detail)]}
    return {
        **document,
        "about": about(script_of(document["id"])),
        "machine": f"{device}{versions['cores']} cores of {versions['cpu']}, Python {versions['python']}, {packages}",
        "note": detail.get("note", ""),
        "reached": reached(document["figure"], document["goal"]),
        "form": detail.get("form", "full"),
        "tables": [{"title": title, "text": table(rows)} for title, rows in tables.items() if rows],
    }


def reached(figure: float, goal: str) -> str:
    """Whether a figure is what its goal says: "at least 5, aim for 10", "at most 4", "above 1", "below 0.5"."""
    found = re.match(r"(at least|at most|above|below) ([\d.]+)", goal)
    if not found:
        return ""
    limit = float(found[2])
    held = {"at least": figure >= limit, "at most": figure <= limit, "above": figure > limit, "below": figure < limit}
    return "yes" if held[found[1]] else "no"


def losses(documents: Mapping[str, Row]) -> list[str]:
    """Cells in which another way is cheaper, whatever the figure says."""
    found = []
    if "search_beside_grid" in documents:
        detail = documents["search_beside_grid"]["detail"]
        needed = detail["final_steps_for_the_goal"]
        share = detail["ratios"][str(detail["final_steps"])]["share of the search"]
        found.append(
            f"search_beside_grid: the search costs {100 * share:.0f} % of search and final run at "
            f"{detail['final_steps']} steps of a final run, the length that is measured. "
            + (
                f"Of the lengths counted, the goal is reached from {needed} on."
                if needed
                else "None counted reaches the goal."
            )
        )
        failed = detail["tables"]["Searches without a valid result, left out above"]
        if failed:
            found.append(
                f"search_beside_grid: {len(failed)} of {len(failed) + len(detail['runs'])} searches gave no valid "
                "result."
            )
    if "lanes_beside_processes" in documents:
        detail = documents["lanes_beside_processes"]["detail"]
        for lanes, ours in detail["ours"].items():
            theirs = detail["peft"].get(lanes)
            if theirs and ours["compiling"]["peak_bytes"] > theirs["peak_bytes"]:
                found.append(
                    f"lanes_beside_processes: {lanes} lanes take more memory than {lanes} PEFT processes while XLA "
                    "compiles."
                )
        fewest = min(detail["ours"], key=int)
        if detail["ours"][fewest]["from disk"]["peak_bytes"] > detail["peft"]["1"]["peak_bytes"]:
            found.append(f"lanes_beside_processes: one PEFT process takes less memory than ours with {fewest} lanes.")
    for base in documents["adapter_matrix"]["detail"]["bases"] if "adapter_matrix" in documents else []:
        if base.get("positions") == "given":
            found.append(
                f"adapter_matrix: transformers {base['pair'][0]} places pictures of {base['base']} otherwise than we "
                "do, without any adapter too; adapters were compared with our positions given to it."
            )
    return found


def floor(minimum: Mapping[str, float]) -> str:
    """The closed form by part."""
    rows = [
        {"part": part, "MFLOP": flops / 1e6, "share": flops / minimum["total"]}
        for part, flops in sorted(minimum.items(), key=lambda item: item[0] == "total")
    ]
    return table(rows)


def script_of(name: str) -> Path:
    """The script that measures a result, by its id."""
    (script,) = [*BENCHMARKS.glob(f"*/{name}.py"), *BENCHMARKS.glob(f"{name}/run.py")]
    return script


def about(script: Path) -> str:
    """The docstring of a script, without its usage."""
    document = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return document.partition("\n\n    python ")[0].strip()


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and truth of a document with the way to it; of repeated timings the median alone, no lists."""
    if isinstance(value, Mapping):
        if "median" in value and "all" in value:
            yield f"{prefix}, median", value["median"]
            return
        for name, item in value.items():
            yield from leaves(item, f"{prefix}, {name}" if prefix else str(name))
    elif not isinstance(value, list):
        yield prefix, value


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown; a column is there if any row has it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(value: Any) -> str:
    """A value as text that can't end its cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = number(value) if isinstance(value, int | float) else str(value)
    return " ".join(text.split()).replace("|", r"\|")


def number(value: float) -> str:
    """Whole numbers in full up to a million; others with four digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


if __name__ == "__main__":
    main()
