"""Tables of `evidence`, from the documents of its cells. Nothing is fitted or trained here."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.evidence.replay import key
from mars_jax.runtime.jsonfiles import Document

ENOUGH = 0.005


def tables(cells: Sequence[Document]) -> Document:
    """The result's tables."""
    names = list(dict.fromkeys(method["name"] for cell in cells for method in cell["methods"]))
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    by_task = {task: [cell for cell in cells if cell["task"] == task] for task in tasks}
    return {
        "Methods, over the cells that have them": [of_method(name, cells) for name in names],
        "Mean regret and expected regret by task": [
            {"method": name}
            | {task: _mean(regrets(name, some)) for task, some in by_task.items()}
            | {f"{task}, expected": _mean(expected_regrets(name, some)) for task, some in by_task.items()}
            for name in names
        ],
        "Grids": [of_grid(cell) for cell in cells],
        "Spread of ranks and of seeds": [noise(task, some) for task, some in by_task.items() if len(some) > 1],
        "P(best) of the pick, and how often it is": calibration(cells),
        "Kendall tau of predicted and true order of the grid": order(cells),
        "Correlation of imbalance and final loss over the grid": balanced(cells),
        "Exponent of the other module's rank in a module's time": cross(cells),
        "Learning rates tuned for each pair": tuned(cells),
    }


def of_method(name: str, cells: Sequence[Document]) -> Document:
    """Mean regret of a method with its range, and what it costs."""
    having = [cell for cell in cells if any(method["name"] == name for method in cell["methods"])]
    found = [method for cell in having for method in cell["methods"] if method["name"] == name]
    return {
        "method": name,
        "cells": len(found),
        "mean regret": _mean(regrets(name, cells)),
        "worst": max(regrets(name, cells)),
        f"within {ENOUGH:.1%}": share_within(having, name),
        "mean test regret": _mean(method["test_regret"] for method in found),
        "mean expected regret": _mean(expected_regrets(name, cells)),
        "compute, final runs": _mean(method["compute"] for method in found),
    }


def share_within(cells: Sequence[Document], name: str) -> float:
    """Share of cells in which a method's regret is at most `ENOUGH`; a cell in which it has none counts against it."""
    return statistics.mean(any(m["name"] == name and m["regret"] <= ENOUGH for m in cell["methods"]) for cell in cells)


def regrets(name: str, cells: Sequence[Document]) -> list[float]:
    """Of a method, one for each cell that has it."""
    return [method["regret"] for cell in cells for method in cell["methods"] if method["name"] == name]


def expected_regrets(name: str, cells: Sequence[Document]) -> list[float]:
    """Regrets of a method's picks in losses that are means over a task's seeds: what isn't the luck of one run.

    None for methods that don't pick ranks, and for tasks with a single seed.
    """
    found = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        if len(of_task) > 1:
            means = mean_losses(of_task)
            picks = [m["ranks"] for cell in of_task for m in cell["methods"] if m["name"] == name]
            found += [means[key(pick)] / min(means.values()) - 1.0 for pick in picks if pick]
    return found


def mean_losses(cells: Sequence[Document]) -> dict[tuple[int, ...], float]:
    """Pair -> mean validation loss over the seeds of a task."""
    losses = [{key(run["ranks"]): run["loss"] for run in cell["grid"]} for cell in cells]
    return {pair: statistics.mean(loss[pair] for loss in losses) for pair in losses[0]}


def of_grid(cell: Document) -> Document:
    """The best and the worst pair of a cell, and how far apart they are."""
    best, worst = (choose(cell["grid"], key=lambda run: run["loss"]) for choose in (min, max))
    return {
        "task": cell["task"],
        "seed": cell["seed"],
        "best": _words(best["ranks"]),
        "loss": best["loss"],
        "worst": _words(worst["ranks"]),
        "worst / best": worst["loss"] / best["loss"],
    }


def noise(task: str, cells: Sequence[Document]) -> Document:
    """How far pairs lie apart in their means over seeds, and one pair's runs among each other.

    So also how far the pair that is best on average is above the best run of each seed: no pick can know better.
    """
    means = mean_losses(cells)
    by_pair = {
        pair: [run["loss"] for cell in cells for run in cell["grid"] if key(run["ranks"]) == pair] for pair in means
    }
    best = min(means, key=lambda pair: means[pair])
    lowest = [min(run["loss"] for run in cell["grid"]) for cell in cells]
    above = [loss / least - 1.0 for loss, least in zip(by_pair[best], lowest, strict=True)]
    return {
        "task": task,
        "seeds": len(cells),
        "best pair (vision, llm)": ", ".join(map(str, best)),
        "worst mean / best mean": max(means.values()) / means[best],
        "pairs within 2 %": sum(mean <= 1.02 * means[best] for mean in means.values()),
        "sd of a pair over seeds / its mean": _mean(
            statistics.stdev(some) / means[pair] for pair, some in by_pair.items()
        ),
        "mean regret of the best pair": _mean(above),
        f"its seeds within {ENOUGH:.1%}": _mean(regret <= ENOUGH for regret in above),
    }


def calibration(cells: Sequence[Document]) -> list[Document]:
    """P(best) of picks beside the share of picks within `ENOUGH` of the best of the means over seeds."""
    rows = []
    names = dict.fromkeys(m["name"] for cell in cells for m in cell["methods"] if m["p_best"] is not None)
    for name in names:
        right = [regret <= ENOUGH for regret in expected_regrets(name, cells)]
        stated = [m["p_best"] for cell in cells for m in cell["methods"] if m["name"] == name]
        rows.append({"method": name, "picks": len(stated), "mean P(best)": _mean(stated), "best": _mean(right)})
    return rows


def order(cells: Sequence[Document]) -> list[Document]:
    """Mean, lowest and highest Kendall tau of each form."""
    found: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        for sampling, claims in cell["claims"].items():
            for form, tau in claims["order"].items():
                found.setdefault((sampling, form), []).append(math.nan if tau is None else tau)
    return [
        {"probes": sampling, "form": form, "cells": len(some)} | _range([tau for tau in some if not math.isnan(tau)])
        for (sampling, form), some in found.items()
    ]


def balanced(cells: Sequence[Document]) -> list[Document]:
    """Whether imbalance goes with a higher loss, by itself and given ranks and parameters."""
    found: dict[tuple[str, str], list[Document]] = {}
    for cell in cells:
        for sampling, claims in cell["claims"].items():
            for rule, of_rule in claims["balance"].items():
                found.setdefault((sampling, rule), []).append(of_rule)
    rows = []
    for (sampling, rule), some in found.items():
        partial = [of_rule["partial"] for of_rule in some if of_rule["partial"]]
        rows.append(
            {
                "probes": sampling,
                "rule": rule,
                "cells where both times are known": len(some),
                "mean correlation": _mean(o["correlation"] for o in some if o["correlation"] is not None),
                "given ranks and parameters": _mean(found["value"] for found in partial),
                "cells whose 95 % interval is above zero": sum(found["interval"][0] > 0 for found in partial),
                "below zero": sum(found["interval"][1] < 0 for found in partial),
            }
        )
    return rows


def cross(cells: Sequence[Document]) -> list[Document]:
    """Exponents of the module's own rank and of the other's, mean and range over cells."""
    found: dict[tuple[str, str, str], list[Document]] = {}
    for cell in cells:
        for sampling, claims in cell["claims"].items():
            for rule, modules in claims["cross_exponents"].items():
                for module, exponents in modules.items():
                    found.setdefault((sampling, rule, module), []).append(exponents)
    return [
        {"probes": sampling, "rule": rule, "module": module, "cells": len(some)}
        | {"of its own rank": _mean(o["own"] for o in some)}
        | {f"of the other's, {name}": value for name, value in _range([o["other"] for o in some]).items()}
        for (sampling, rule, module), some in found.items()
    ]


def tuned(cells: Sequence[Document]) -> list[Document]:
    """Losses of a few pairs at the config's learning rate and at the best of three."""
    rows = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        found = [row for cell in cells if cell["task"] == task for row in cell["retuned"]]
        for pair in dict.fromkeys(row["ranks"] for row in found):
            some = [row for row in found if row["ranks"] == pair]
            rows.append(
                {"task": task, "vision, llm": pair, "seeds": len(some)}
                | {name: _mean(row[name] for row in some) for name in ("loss", "tuned loss")}
                | {"factors": ", ".join(f"{row['factor']:.2g}" for row in some)}
            )
    return rows


def _words(ranks: Document) -> str:
    return ", ".join(f"{module} {rank}" for module, rank in ranks.items() if module != "projector")


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return statistics.mean(listed) if listed else None


def _range(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "lowest": None, "highest": None}
    return {"mean": statistics.mean(values), "lowest": min(values), "highest": max(values)}
