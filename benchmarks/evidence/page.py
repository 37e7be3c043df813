"""What docs/evidence.md and docs/laws.md show of each result: rows that a reader needs, and what they mean."""

from collections.abc import Callable, Sequence

from benchmarks.lib.markdown import Row, number
from benchmarks.lib.pages import Section


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
    """The goals in words, and the strategies."""
    rows = [
        {
            "strategy": row["strategy"],
            "final runs begun": "its default" if row["begun"] is None else row["begun"],
            "compute, final runs": row["runs"],
            "excess, %": 100 * row["excess"],
            "interval, %": f"{number(100 * row['interval'][0])} to {number(100 * row['interval'][1])}",
            "worst cell, %": 100 * row["worst cell"],
        }
        for row in detail["tables"]["Strategies"]
    ]
    cells, one_seed = detail["cells"], detail["tasks_with_one_seed"]
    tasks = len({name.rsplit("-seed", 1)[0] for name in cells})
    table = f"From {len(cells)} cells of {tasks} tasks"
    if one_seed:
        table += f"; {len(one_seed)} of the tasks have one recorded seed, so their excess is too high by their noise"
    return Section({"Strategies": rows}, " ".join([f"{table}.", *_goals(detail["strategy"], detail["goals"])]))


def _goals(strategy: str, goals: Row) -> Sequence[str]:
    first, second, third, sixth = (goals[name] for name in ("G1", "G2", "G3", "G6"))
    said = [
        f"G1: `{strategy}` ends {_percent(first['excess'])} above an average run of the best configuration "
        f"({_between(first)}) for {number(first['runs'])} final runs; aimed at: at most 0, at most 2 % at the upper "
        "end, for 3.6.",
        f"G2: {_percent(second['share'])} of the cells are within one run-to-run deviation "
        f"({_percent(second['deviation'])}) of that; aimed at: 95 %.",
    ]
    if third is None:
        said.append("G3 was not measured.")
    elif third["share"] is None:
        said.append(
            f"G3: none of TPE, GP and Hyperband ends as low within what was replayed, so it takes at most "
            f"{number(third['at most, where null'])} of their compute; aimed at: 0.5."
        )
    else:
        best = max((share, name) for name, share in third["peers"].items() if share is not None)[1]
        said.append(
            f"G3: it takes {number(third['share'])} of the compute at which the best of TPE, GP and Hyperband ({best}) "
            "ends as low; aimed at: 0.5."
        )
    said += [
        f"G4: of the gap from {name} at the default learning rate, {_percent(gap['gap'])}, it closes "
        f"{_percent(gap['closed'])}; aimed at: 90 %, from rank 16."
        for name, gap in goals["G4"].items()
    ]
    fifth = goals["G5"]
    said.append(
        f"G5: beside {number(fifth['runs of the restarts'])} restarts of the middle configuration it ends "
        f"{_percent(fifth['difference'])} higher ({_between(fifth)}); aimed at: at most 0."
    )
    said.append(
        f"G6: the order of ranks at their best rates has a Kendall tau of {number(sixth['tau'])} with that at eight "
        "times the steps; aimed at: 0.4."
        if sixth
        else "G6, the order at eight times the steps, is not recorded yet."
    )
    return said


def _between(goal: Row) -> str:
    low, high = goal["interval"]
    return f"{_percent(low)} to {_percent(high)}"


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"


def law_forms(detail: Row) -> Section:
    """Orders after half of a run, a row for each form."""
    half = [row for row in detail["tables"]["Order and pick by form"] if row["part"] == 0.5]
    rows = [
        {
            "form": form,
            **{f"order, {row['runs']} runs": row["order"] for row in half if row["form"] == form},
            **{f"pick, {row['runs']} runs, %": 100 * row["pick"] for row in half if row["form"] == form},
        }
        for form in dict.fromkeys(row["form"] for row in half)
    ]
    parts = [
        {
            "part of the run": row["part"],
            "order": row["order"],
            "lowest ends above the lowest by, %": 100 * row["pick"],
            "at most, %": 100 * row["worst pick"],
        }
        for row in detail["tables"]["Order of the losses themselves"]
    ]
    return Section({"After half of a run": rows, "Order of the losses themselves": parts}, "")


def beginnings(detail: Row) -> Section:
    """Excess from drawn beginnings."""
    rows = [
        {
            "begun": row["begun"],
            "proposed": row["proposed"],
            "compute, final runs": row["runs"],
            "excess, %": 100 * row["excess"],
        }
        for row in detail["tables"]["Beginnings"]
    ]
    return Section({"Means over cells and beginnings": rows}, f"{detail['draws']} beginnings in each cell.")


SECTIONS: dict[str, Callable[[Row], Section]] = {
    "law_fits": law_fits,
    "planted": planted,
    "noise": noise,
    "evidence": evidence,
    "law_forms": law_forms,
    "beginnings": beginnings,
}
