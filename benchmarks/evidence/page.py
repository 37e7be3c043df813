"""What docs/evidence.md shows of each result: the rows that its text speaks of. All rows are in the result's JSON."""

import re
from collections.abc import Callable, Sequence

from benchmarks.lib.markdown import Row, number
from benchmarks.lib.pages import Section

# Whole names of methods, by what they are compared for.
_OTHERS = r"[^:]+"
_FIXED = r"uniform rank \d+|random pair|separate learning rates.*|successive halving.*"
_TOOL = r"(half |quarter )?nested: best probe, sweep of 4"
_BEST_PROBES = r"(.* )?nested: best probe(, sweep of \d+)?|separate: best probe(, sweep of 4)?"
_LAW_P = r"(half )?nested: loss alone, (chosen form|sweep of 4)|separate: loss alone, chosen form"
_BOTH = r"half nested: best probe and the laws' pick, sweep of 4"
_RULES = r"(nested|separate): (loss_fraction|splice), (chosen form|paper)"
METHODS = re.compile("|".join([_OTHERS, _BEST_PROBES, _LAW_P, _BOTH, _RULES]))
METHODS_BY_TASK = re.compile(f"{_FIXED}|{_TOOL}")


def law_fits(detail: Row) -> Section:
    """Whether P(best) holds."""
    tables = detail["tables"]
    (stated,) = tables["P(best)"]
    return Section(
        {title: rows for title, rows in tables.items() if title != "P(best)"},
        f"Over {stated['picks']} picks, P(best) is {number(stated['p_best'])} on average, and the pick is the best of "
        f"those kept in a share of {number(stated['truly_best'])}. The first call, which compiles, took "
        f"{number(detail['first_call_seconds'])} s.",
    )


def planted(detail: Row) -> Section:
    """Rules, times, and the exponents that could be fitted."""
    names = {"not told": "not known"}
    tables = {
        title: [{names.get(name, name): value for name, value in row.items()} for row in rows]
        for title, rows in detail["tables"].items()
    }
    exponents = tables.pop("Exponents of ranks by alpha rule")
    fitted = [row for row in exponents if row["gamma"] is not None]
    return Section(
        {**tables, "Exponents of ranks by alpha rule": fitted},
        f"Too few times are known for {len(exponents) - len(fitted)} of {len(exponents)} exponents.",
    )


def noise(detail: Row) -> Section:
    """Pooled deviations, and the spread that they are to be held against."""
    pooled = ", ".join(f"{name} {number(100 * value)} %" for name, value in detail["deviations"].items())
    beside = ""
    if spread := detail.get("spread"):
        median, worst = (number(100 * spread[name]) for name in ("median", "worst"))
        beside = (
            f" Of the configurations that the benchmark holds of the task, the median is {median} % above the lowest, "
            f"the worst {worst} %."
        )
    return Section(detail["tables"], f"Pooled standard deviations by what differs: {pooled}.{beside}")


def evidence(detail: Row) -> Section:
    """The methods that the page speaks of, and every other table."""
    shown, tables = {}, detail["tables"]
    for title, rows in tables.items():
        shown[title] = _of(METHODS_BY_TASK if title.startswith("Mean regret") else METHODS, rows)
    first = next(iter(tables))
    return Section(
        shown,
        f"Shown are {len(shown[first])} of {len(tables[first])} methods; benchmarks/results/evidence.json has all.",
    )


def _of(methods: re.Pattern[str], rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "method" not in row or methods.fullmatch(row["method"])]


SECTIONS: dict[str, Callable[[Row], Section]] = {
    "law_fits": law_fits,
    "planted": planted,
    "noise": noise,
    "evidence": evidence,
}
