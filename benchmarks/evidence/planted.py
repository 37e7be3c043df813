"""How often the best convergence rule notices a module that was slowed on purpose.

Joint lanes of ranks 8 on the demo's task, one pass over the data at a constant rate. In each condition one thing is
changed for one searched module: its learning rate is divided by 3 or by 10 (the truth is known: it, and not the other,
takes longer), its rank is cut from 8 to 2, or its shift is made smaller, a quarter of the rotation of hues or one
German answer in place of five (what should follow isn't known beforehand, so no verdict is given). Every seed has its
own order of data and its own adapters. The same curves are read by all rules at their default thresholds;
`loss_fraction` reads lanes of its own that adapt the one module alone, under the same handicap. "splice, Shapley" reads
the module swaps of the rule `splice` as shares of the loss that is still to fall, which add up to it.

For each rule: `order` is the share of slowed lanes in which t(slowed) / t(other) is larger than in the balanced lane of
the same seed; a module without a time, or two that are both censored, counts as not known. `factor` is the median of
how much larger (a censored time is a lower bound), `other` the median of t(other) over its balanced time: 1 if the rule
isolates modules. `cost` is the FLOPs of what a rule needs over those of the joint lane.

The second part asks how much of gamma, the exponent of a rank in its time, is the alpha rule: ranks 2, 8 and 32 of each
module with the other at 8, with alpha = 2r, rsLoRA (scale 4 sqrt 2 / sqrt r) and alpha = 16, which agree at rank 8. And
how far a module's time depends on the other's rank: `cross`, the exponent of the other's rank.

figure = `order` of the rule in which it is highest.

    python -m benchmarks.evidence.planted [--short] [--anyway] [--out FOLDER] [--work FOLDER]

`--work` keeps lanes, so that a stopped run goes on.
"""

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib.child import Document, argument_parser, publish
from benchmarks.lib.trials import RULES, Curves, make_data, probe_curves, records_by, task_job
from mars_jax.config.load import Config
from mars_jax.job.job import Job
from mars_jax.lanes.eval_points import EvalPoint, Points
from mars_jax.lanes.lane import Lane
from mars_jax.runtime import compile_cache
from mars_jax.search.probes.swaps import swapped

SEARCHED = ("vision", "llm")
OTHER = {"vision": "llm", "llm": "vision"}
SHAPLEY = "splice, Shapley"
JUDGED = {**RULES, SHAPLEY: RULES["splice"]}
ALPHA_RULES = {
    "alpha = 2r": ("proportional", 2.0),
    "rsLoRA": ("rslora", 4 * math.sqrt(2)),
    "alpha = 16": ("fixed", 16.0),
}
ALPHA_RANKS = (2, 8, 32)


class Condition(NamedTuple):
    """What is changed, and for which module; the truth is known where the learning rate is."""

    module: str | None = None
    rate: float = 1.0
    rank: int = 8
    shift: str = "whole"


CONDITIONS = {
    "balanced": Condition(),
    **{f"{m} rate / {n}": Condition(m, rate=1 / n) for m in SEARCHED for n in (3, 10)},
    **{f"{m} rank 2": Condition(m, rank=2) for m in SEARCHED},
    **{f"{m} shift smaller": Condition(m, shift=m) for m in SEARCHED},
}
SHIFTS = {
    "whole": ["--eye", "1", "--tongue", "0.4"],
    "vision": ["--eye", "0.25", "--tongue", "0.4"],
    "llm": ["--eye", "1", "--tongue", "0.1"],
}


class Form(NamedTuple):
    """How much is run."""

    seeds: int
    alpha_seeds: int
    samples: int
    steps: int
    validation_samples: int


FULL = Form(seeds=5, alpha_seeds=1, samples=3072, steps=192, validation_samples=128)
SHORT = Form(seeds=1, alpha_seeds=1, samples=128, steps=32, validation_samples=32)


def main() -> None:
    """Writes results/planted.json; about half an hour on two cores."""
    parser = argument_parser(__doc__)
    parser.add_argument("--work", type=Path, help="folder that keeps the lanes of a stopped run")
    options = parser.parse_args()
    compile_cache.enable()
    form = SHORT if options.short else FULL
    with _folder(options.work) as folder:
        trials = [trial for seed in range(form.seeds) for trial in run_conditions(folder, form, seed)]
        alphas = [row for seed in range(form.alpha_seeds) for row in run_alphas(folder, form, seed)]
    rules = {name: judge(name, trials) for name in JUDGED}
    known = [rule for rule in rules.values() if rule["order"] is not None]
    publish(
        options,
        "planted",
        max((rule["order"] for rule in known), default=math.nan),
        "share of lanes in which the best rule notices the slowed module",
        "none: this is what the default rule is chosen by",
        {
            "steps": form.steps,
            "seeds": form.seeds,
            "tables": {
                "Rules, over the lanes whose truth is known": [{"rule": name, **rule} for name, rule in rules.items()],
                "Times by condition (medians of seeds)": by_condition(trials),
                "Exponents of ranks by alpha rule": exponents(alphas),
            },
            "trials": trials,
            "alphas": alphas,
        },
    )


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work:
        yield work
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder)


# Running.


def run_conditions(folder: Path, form: Form, seed: int) -> list[Document]:
    """One row for each condition and rule: times of the two modules, whether they are censored, and costs."""
    found = []
    for shift, arguments in SHIFTS.items():
        job = _job(folder, form, arguments)
        names = [name for name, condition in CONDITIONS.items() if condition.shift == shift]
        lanes: list[Lane] = []
        rates: list[dict[str, float]] = []
        places = {}
        for name in names:
            for adapted in (None, *SEARCHED):
                # A lane that adapts the other module alone is that of the balanced condition.
                own = CONDITIONS[name] if adapted in (None, CONDITIONS[name].module) else CONDITIONS["balanced"]
                trial = _lane(own, form.samples, seed, adapted), _rates(job.config, own)
                alike = [k for k, other in enumerate(zip(lanes, rates, strict=True)) if other == trial]
                places[name, adapted] = alike[0] if alike else len(lanes)
                if not alike:
                    lanes.append(trial[0])
                    rates.append(trial[1])
        file = folder / f"conditions-{shift}-s{seed}.json"
        curves = probe_curves(file, job, lanes, rates)
        print(f"seed {seed}, shift {shift}: {len(lanes)} lanes", file=sys.stderr)
        for rule in JUDGED:
            times = _times(rule, job.config, lanes, curves)
            for name in names:
                read = {m: places[name, m if rule == "loss_fraction" else None] for m in SEARCHED}
                of = {module: times[k].get(module) for module, k in read.items()}
                cost = _cost(rule, job, curves[places[name, None]], form)
                found.append({"condition": name, "seed": seed, "rule": rule, "times": of, "cost": cost})
    return found


def run_alphas(folder: Path, form: Form, seed: int) -> list[Document]:
    """One row for each alpha rule, ranks and rule: the times of the two modules."""
    found = []
    vectors = list(dict.fromkeys([(r, 8) for r in ALPHA_RANKS] + [(8, r) for r in ALPHA_RANKS]))
    for name, (alpha, value) in ALPHA_RULES.items():
        settings = (f"lora.alpha.rule={alpha}", f"lora.alpha.value={value}")
        job = _job(folder, form, SHIFTS["whole"], *settings)
        lanes = [Lane({"vision": v, "projector": 8, "llm": r}, form.samples, seed) for v, r in vectors]
        alone = [
            Lane({**dict.fromkeys(lanes[0].ranks, 0), module: rank}, form.samples, seed)
            for module in SEARCHED
            for rank in ALPHA_RANKS
        ]
        curves = probe_curves(folder / f"{alpha}-s{seed}.json", job, [*lanes, *alone])
        print(f"seed {seed}, {name}: {len(curves)} lanes", file=sys.stderr)
        for rule in JUDGED:
            found_times = _times(rule, job.config, [*lanes, *alone], curves)
            for lane, times in zip([*lanes, *alone], found_times, strict=True):
                if times and (len(lane.adapted) == 1) == (rule == "loss_fraction"):
                    ranks = {module: lane.ranks[module] for module in SEARCHED}
                    found.append({"alpha": name, "seed": seed, "rule": rule, "ranks": ranks, "times": times})
    return found


def _job(folder: Path, form: Form, shift: Sequence[str], *settings: str) -> Job:
    data = make_data(folder / "-".join(shift).replace("--", ""), [*shift, "--train", str(form.samples)])
    return task_job(
        data,
        f"probe.num_samples=[{form.samples // 2},{form.samples}]",
        "probe.sampling=separate",
        f"probe.steps={form.steps}",
        f"probe.validation_samples={form.validation_samples}",
        "probe.looks_per_doubling=4",
        *settings,
    )


def _lane(condition: Condition, samples: int, seed: int, adapted: str | None) -> Lane:
    """The joint lane of a condition, or the one that adapts one module only."""
    ranks = {"vision": 8, "projector": 8, "llm": 8}
    if condition.module:
        ranks[condition.module] = condition.rank
    return Lane({m: rank if adapted in (None, m) else 0 for m, rank in ranks.items()}, samples, seed)


def _rates(config: Config, condition: Condition) -> dict[str, float]:
    rates = config.learning_rates()
    return {m: rate * (condition.rate if m == condition.module else 1.0) for m, rate in rates.items()}


def _times(rule: str, config: Config, lanes: Sequence[Lane], curves: Curves) -> list[Document]:
    """By lane: module -> steps (None if undefined) and whether censored."""
    if rule == SHAPLEY:
        curves = [[_shared(point) for point in points] for points in curves]
    return [
        {m: {"steps": steps, "censored": record.censored[m]} for m, steps in record.convergence_steps.items()}
        for record in records_by(JUDGED[rule], config, lanes, curves)
    ]


def _shared(point: EvalPoint) -> EvalPoint:
    """An eval point in which what remained is split by Shapley values of the two modules."""
    if point.swaps is None or "llm+vision" not in point.swaps.losses:
        return point
    losses = point.swaps.losses
    shares = {m: ((losses[""] - losses[m]) + (losses[OTHER[m]] - losses["llm+vision"])) / 2 for m in ("vision", "llm")}
    return replace(point, swaps=replace(point.swaps, remaining=shares))


def _cost(rule: str, job: Job, points: Points, form: Form) -> float:
    """FLOPs of all that a rule needs for a joint lane, over those of the lane's steps, without its eval points."""
    if rule == "drift":
        return 1.0
    ranks = {"vision": 8, "projector": 8, "llm": 8}
    joint = form.steps * job.prices.step(ranks)
    if rule == "loss_fraction":
        alone = (
            job.prices.step({"vision": 8, "projector": 0, "llm": 0}),
            job.prices.step({"vision": 0, "projector": 0, "llm": 8}, cached_encoder=True),
        )
        return 1.0 + form.steps * sum(alone) / joint
    measured = sum(any(point.remaining.values()) for point in points)
    swaps = measured * len(swapped(SEARCHED))
    return 1.0 + swaps * job.prices.eval_point(ranks, form.validation_samples) / joint


# Judging.


def judge(rule: str, trials: Sequence[Document]) -> Document:
    """How often a rule notices, by how much, and what it costs."""
    own = [trial for trial in trials if trial["rule"] == rule]
    balanced = {trial["seed"]: trial["times"] for trial in own if trial["condition"] == "balanced"}
    right, factors, others, unknown, total = 0, [], [], 0, 0
    for trial in own:
        condition = CONDITIONS[trial["condition"]]
        if condition.rate == 1.0 or condition.module is None:
            continue
        total += 1
        slow, other = condition.module, OTHER[condition.module]
        now, before = trial["times"], balanced[trial["seed"]]
        if not all(_known(times[m]) for times in (now, before) for m in SEARCHED) or _both_censored(now):
            unknown += 1
            continue
        factor = (now[slow]["steps"] / now[other]["steps"]) / (before[slow]["steps"] / before[other]["steps"])
        right += factor > 1.0
        factors.append((factor, round(1 / condition.rate)))
        others.append(now[other]["steps"] / before[other]["steps"])
    return {
        "order": right / total if total else None,
        "not told": unknown,
        "lanes": total,
        **{f"factor at rate / {n}": _median([f for f, by in factors if by == n]) for n in (3, 10)},
        "other": _median(others),
        "cost": _median([trial["cost"] for trial in own]),
    }


def by_condition(trials: Sequence[Document]) -> list[Document]:
    """Medians over seeds of each rule's times, and how many of them are censored or missing."""
    table = []
    for name in CONDITIONS:
        row: Document = {"condition": name}
        for rule in JUDGED:
            for module in SEARCHED:
                times = [t["times"][module] for t in trials if (t["condition"], t["rule"]) == (name, rule)]
                median = _median([time["steps"] for time in times if _known(time)])
                late = sum(bool(time and time["censored"]) for time in times)
                none = sum(not _known(time) for time in times)
                notes = [f"{late} censored"] * bool(late) + [f"{none} undefined"] * bool(none)
                text = "none" if median is None else f"{median:.0f}"
                row[f"{rule}, {module}"] = f"{text} ({', '.join(notes)})" if notes else text
        table.append(row)
    return table


def exponents(rows: Sequence[Document]) -> list[Document]:
    """Exponents of the own rank (gamma) and of the other's (cross) in times that aren't censored, least squares."""
    table = []
    for alpha in ALPHA_RULES:
        for rule in JUDGED:
            for module in SEARCHED:
                points = [
                    (math.log(row["ranks"][module]), math.log(max(row["ranks"][OTHER[module]], 1)), row["seed"], time)
                    for row in rows
                    if (row["alpha"], row["rule"]) == (alpha, rule)
                    for time in [row["times"].get(module)]
                    if _known(time) and not time["censored"]
                ]
                table.append({"alpha rule": alpha, "rule": rule, "module": module, **_slopes(points)})
    return table


def _slopes(points: Sequence[tuple[float, float, int, Mapping[str, Any]]]) -> Document:
    seeds = sorted({seed for *_, seed, _ in points})
    columns = [[own, other, *(float(seed == s) for s in seeds)] for own, other, seed, _ in points]
    unknown: Document = {"points": len(points), "gamma": None, "gamma s.e.": None, "cross": None, "cross s.e.": None}
    if not points:
        return unknown
    design = np.asarray(columns)
    varied = [0, 1] if np.ptp(design[:, 1]) else [0]
    used = design[:, [*varied, *range(2, design.shape[1])]]
    if len(points) <= used.shape[1] or np.linalg.matrix_rank(used) < used.shape[1]:
        return unknown
    log_times = np.log([time["steps"] for *_, time in points])
    solution, *_ = np.linalg.lstsq(used, log_times, rcond=None)
    variance = float(np.sum((log_times - used @ solution) ** 2)) / (len(points) - used.shape[1])
    errors = np.sqrt(np.diag(np.linalg.pinv(used.T @ used)) * variance)
    found: Document = {"points": len(points), "gamma": float(solution[0]), "gamma s.e.": float(errors[0])}
    crossed = len(varied) == 2
    return found | {
        "cross": float(solution[1]) if crossed else None,
        "cross s.e.": float(errors[1]) if crossed else None,
    }


def _known(time: Mapping[str, Any] | None) -> bool:
    return time is not None and time["steps"] is not None


def _both_censored(times: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(times[module]["censored"] for module in SEARCHED)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    main()
