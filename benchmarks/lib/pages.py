"""What docs/performance.md shows of each result: a few rows, and what they mean. The rest stays in the result's JSON.

A function for each benchmark, by its id, takes the result's `detail`. Every number comes from there, and sentences are
written to hold for any numbers. What docs/evidence.md shows is in benchmarks/evidence/page.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.lib.markdown import Row, columns, listed, number, percent

_DIRECTIONS = "passed: ours in PEFT / PEFT's in ours"


class Section(NamedTuple):
    """What a page shows of a result.

    Attributes:
        tables: title -> rows; tables without rows aren't shown.
        meaning: a few sentences on them.
        losses: comparisons in which another way is better, whatever the figure.
    """

    tables: Mapping[str, Sequence[Row]]
    meaning: str = ""
    losses: Sequence[str] = ()


def probe_grid(detail: Row) -> Section:
    """The ways to the cells, with their seconds."""
    ways = {
        "peft": "PEFT, one run after the other",
        "one_lane": "ours, one lane at a time",
        "cores": "ours, a lane on each core",
        "nested": "ours, and every D read off one run",
        "cross": "ours, and only the laws' pairs",
    }
    rows = []
    for name, way in ways.items():
        side, ratios = detail["sides"][name], detail["ratios"].get(name, {})
        rows.append(
            {
                "way": way,
                "cells": detail["cells"][name],
                "steps": side["lane_steps"],
                "seconds": side["wall_seconds"]["median"],
                "PEFT / it": ratios.get("compile_apart"),
                "PEFT / it, compiling included": ratios.get("compile_included"),
            }
        )
    by_rate, cells = detail["gate"]["steps_by_rate_factor"], detail["gate"]["cells"]["nested"]
    slow, whole = min(by_rate, key=float), max(by_rate, key=float)

    def apart(rate: str, side: str) -> str:
        return number(max(lane[side]["largest_relative_difference"] for lane in by_rate[rate].values()))

    saved = detail["if_peft_saved_too"]
    return Section(
        {"": rows},
        f"If PEFT read every D off one run as well, it would take {number(saved['nested'])} times our seconds, and "
        f"{number(saved['cross'])} times for the laws' pairs alone. Whether both sides train the same: at {slow} of "
        f"the learning rate the losses of single steps differ by at most {apart(slow, 'ours')}, relative. At the whole "
        f"rate rounding adds up, to {apart(whole, 'ours')} between the sides and to "
        f"{apart(whole, 'peft_with_other_rounding')} between PEFT and itself with another attention kernel. "
        f"Convergence times lie more than an eval point apart in {cells['disagreements']} of {cells['cells']} cells, "
        f"of which {cells['censored_cells']} have not converged.",
    )


def step_beside_peft(detail: Row) -> Section:
    """Milliseconds of a step of each side."""
    sides = {
        "peft_head_all": "PEFT, logits at all positions",
        "peft_head_supervised": "PEFT, logits at supervised positions",
        "ours": "ours, a lane on each core",
        "ours_block_1": "ours, one lane on all cores",
        "ours_block_2": "ours, a block of two lanes on all cores",
    }
    rows = [
        {
            "side": side,
            "ms of a step": detail["milliseconds_of_a_lane_step"][name]["median"],
            "PEFT / it": detail["ratios"].get(f"peft_head_all / {name}", {}).get("median"),
        }
        for name, side in sides.items()
    ]
    apart = max(detail["largest_relative_difference_of_losses_from_peft_head_all"].values())
    return Section(
        {"": rows},
        f"Losses of single steps differ by at most {number(apart)}, relative. The first use of our program took "
        f"{number(detail['first_use_seconds']['ours'])} s more, most of it compiling, which isn't in the table.",
    )


def compiles(detail: Row) -> Section:
    """Compiles of both processes."""
    first, second = detail["first_process"], detail["second_process"]
    names = {
        "process": "process",
        "compiled": "compiled",
        "read from the cache": "read from disk",
        "seconds compiling or reading": "seconds of compiling or reading",
        "seconds in all": "seconds in all",
    }
    lanes = first["lanes"]["lanes"]
    return Section(
        {"": columns(detail["tables"][""], names)},
        f"The {lanes} lanes, of all ranks and data sizes, use {listed(f'`{name}`' for name in first['programs'])}. The "
        f"second process compiled {second['compiles']} programs.",
    )


def xla_flops(detail: Row) -> Section:
    """Counts over the minimum, and the minimum by part."""
    models = {"llava_onevision_05b": "LLaVA-OneVision 0.5B", "demo": "demo"}
    there = {title: detail[name] for name, title in models.items() if name in detail}
    counts = [
        {
            "model": title,
            "step": step,
            "XLA's count / minimum": ratios.get("xla"),
            "matrix products / minimum": ratios["products"],
        }
        for title, case in there.items()
        for step, ratios in case["over_minimum"].items()
    ]
    minima = []
    for title, case in there.items():
        parts = dict(case["minimum_flops"])
        total = parts.pop("total")
        shares = ", ".join(f"{part} {percent(flops / total)}" for part, flops in parts.items())
        minima.append(f"{number(total / 1e9)} GFLOP for {title} ({shares})")
    return Section(
        {"": counts},
        f"What XLA counts beyond matrix products is elementwise work. The fewest of a step are {' and '.join(minima)}.",
    )


def lanes_together(detail: Row) -> Section:
    """Milliseconds of a lane-step at the larger batch, by way and number of lanes."""
    ways = {
        "sequential": "ours, in turn",
        "vmap": "ours, one vectorised block (`vmap`)",
        "loop": "ours, one call, one after the other (`loop`)",
        "cores": "ours, one call, a lane on each core (`cores`)",
        "peft_loop": "PEFT, in turn",
        "torch_vmap": "torch.func, vectorised",
    }
    *others, largest = sorted(detail["by_batch_size"], key=int)
    load = detail["by_batch_size"][largest]
    times, tokens = load["milliseconds_of_a_lane_step"], load["tokens_of_a_lane_step"]
    rows = []
    for name, way in ways.items():
        medians = {f"K = {lanes}": times[lanes].get(name, {}).get("median") for lanes in sorted(times, key=int)}
        rows.append({f"ms of a step of {tokens} tokens, K lanes": way, **medians})
    gains = []
    for batch in (*others, largest):
        over = detail["by_batch_size"][batch]["sequential_over"]
        most = max(over, key=int)
        read = detail["by_batch_size"][batch]["tokens_of_a_lane_step"]
        gains.append(f"{number(over[most]['cores'])} with {most} lanes and {read} tokens a step")
    slower = detail["slower_than_sequential"]
    return Section(
        {"": rows},
        f"The time in turn over that with a lane on each core is {listed(gains)}.",
        [f"Slower than lanes in turn (the time in turn over theirs): {'; '.join(slower)}."] if slower else [],
    )


def search_beside_grid(detail: Row) -> Section:
    """The ratio by length of the final run, the picks, and wall time."""
    tables, ratios = detail["tables"], detail["ratios"]
    picks = {
        "task": "task",
        "pick": "pick",
        "loss": "its loss",
        "place of 16": "its place in the grid",
        "best pair": "best pair",
        "regret": "regret",
        "regret of random 4": "regret of the best of four random pairs",
    }
    (wall,) = [title for title in tables if title.startswith("Wall seconds")]
    timed = [row for title in tables if title.startswith("Nested sizes") for row in tables[title]]
    notes = [
        f'on "{row["task"]}" with {number(row["its FLOPs / those of the other"])} times the FLOPs a pick of loss '
        f"{number(row['its loss'])} in place of {number(row['loss'])}"
        for row in timed
        if "its loss" in row
    ]
    seconds = "; ".join(f"{row['what']} {number(row['seconds'])}" for row in tables[wall])
    meaning = f"A search for nothing and a final run of average cost would give {detail['ceiling']}. {wall}: {seconds}."
    if notes:
        meaning += f" A search with lanes for each module, and runs for each D, found {listed(notes)}."
    needed = detail["final_steps_for_the_goal"]
    share = ratios[str(detail["final_steps"])]["share of the search"]
    losses = [
        f"The search costs {percent(share)} of search and final run at {detail['final_steps']} steps of a final run, "
        "the length that is measured. "
        + (f"Of the lengths counted, the goal is reached from {needed} on." if needed else "None reaches the goal.")
    ]
    failed, done = tables["Searches without a valid result, left out above"], detail["runs"]
    if failed:
        losses.append(f"{len(failed)} of {len(failed) + len(done)} searches gave no valid result.")
    return Section(
        {
            "FLOPs over those of search and final run, by the steps of the final run": [
                {"final steps": int(steps), **row} for steps, row in ratios.items()
            ],
            "Validation loss of the picks, nats": columns(tables["Validation loss of the pick, nats"], picks),
        },
        meaning,
        losses,
    )


def lanes_beside_processes(detail: Row) -> Section:
    """Peaks by number of lanes, and what a lane more takes."""
    peaks = {
        "lanes": "lanes",
        "ours, compiling": "ours while it compiles, MiB",
        "ours, programs from disk": "ours, programs from disk, MiB",
        "PEFT processes, sum of peaks": "PEFT, MiB",
        "PEFT processes, sum of shares (Pss)": "PEFT, shared memory in proportion, MiB",
    }
    (more,) = detail["tables"]["A lane more, MiB"]
    ours, peft = detail["ours"], detail["peft"]
    losses = [
        f"{lanes} lanes take more memory than {lanes} PEFT processes while XLA compiles."
        for lanes in ours
        if lanes in peft and ours[lanes]["compiling"]["peak_bytes"] > peft[lanes]["peak_bytes"]
    ]
    fewest = min(ours, key=int)
    if ours[fewest]["from disk"]["peak_bytes"] > peft["1"]["peak_bytes"]:
        losses.append(f"One PEFT process takes less memory than ours with {fewest} lanes.")
    meaning = ""
    if more["measured"] is not None:
        meaning = (
            f"A lane more takes {number(more['measured'])} MiB (from {more['lanes']} lanes), where `mars plan` expects "
            f"{number(more['planned'])}."
        )
    return Section({"": columns(detail["tables"]["Peak memory, MiB"], peaks)}, meaning, losses)


def accelerator_plans(detail: Row) -> Section:
    """A row for each device, split and policy."""
    exchanges = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
    rows = [
        {
            "devices": f"{row['devices']} x {row['target']}",
            "split by": row["axis"],
            "remat": row["remat"],
            "arguments, GiB": row["arguments, GiB"],
            "temporary, GiB": row["temporary, GiB"],
            "share of memory": row["share of memory"],
            "exchanges of data": ", ".join(f"{row[kind]} {kind}" for kind in exchanges if row[kind]) or "none",
        }
        for row in detail["tables"][""]
    ]
    return Section(
        {"": rows}, "Exchanges are counted in the text of the program, where those in a loop are written once."
    )


def useful_steps(detail: Row) -> Section:
    """Groups of lanes, and the host's work."""
    groups = detail["tables"]["Groups of lanes"]
    names = {
        "lanes": "lanes",
        "samples": "samples",
        "left early": "stopped early",
        "lane-steps": "lane-steps",
        "executed": "executed",
        "useful": "useful",
        "seconds": "seconds",
        "seconds a call": "seconds a call",
    }
    (share,) = [title for title in detail["tables"] if title.startswith("Share of the probe phase")]
    (reading,) = [row for title in detail["tables"] if title.startswith("Reading") for row in detail["tables"][title]]
    work = "; ".join(f"{row['host work']} {percent(row['share'])}" for row in detail["tables"][share])
    return Section(
        {"": columns(groups, names)},
        f"{share}: {work}. Reading the batches of a call takes {number(reading['pictures read'])} s, and "
        f"{number(reading['pictures cached'])} s once pictures are cached, while the call before computes for "
        f"{number(groups[0]['seconds a call'])} s. The host waits for the device once a call, "
        f"{number(detail['host_syncs_per_1000_lane_steps'])} times in a thousand lane-steps.",
    )


def gpu_step(detail: Row) -> Section:
    """Milliseconds of a step of each variant; `detail.note` has what else is to be known."""
    tables = {title: rows for title, rows in detail["tables"].items() if title != "Losses"}
    steps = list(zip(*(row["losses"] for row in detail["rows"] if "losses" in row), strict=True))
    apart = max(max(losses) - min(losses) for losses in steps)
    same = f"The losses of the first {len(steps)} steps differ by at most {number(apart)} nats between variants."
    return Section(tables, " ".join(filter(None, [same, detail.get("note")])))


def real_checkpoint(detail: Row) -> Section:
    """Reading and both steps."""
    (found,) = detail["tables"]["One fresh process"]
    row = {
        "parameters, millions": found["parameters"] / 1e6,
        "seconds to read": found["seconds to read"],
        "peak / parameters": found["peak over parameters"],
        "training step, s": found["training step, seconds"],
        "evaluation step, s": found["evaluation step, seconds"],
        "resident GiB at the end": found["resident GiB at the end"],
    }
    compiling = (found[f"{step} step, seconds to compile"] for step in ("training", "evaluation"))
    return Section({"": [row]}, f"Compiling the two steps took {listed(compiling)} s.")


def kills(detail: Row) -> Section:
    """The kills and power cuts, and what was going on."""
    tables = detail["tables"]
    during = listed(f"{row['phase']} {row['kills and cuts']}" for row in tables["What was going on at the end"])
    alone = detail["seconds_of_a_job"]["programs from disk"]
    return Section(
        {"": tables[""]},
        f"Kills and power cuts by phase: {during}. A job that nobody stops takes {number(alone)} s with its programs "
        "on disk.",
    )


def fuzz(detail: Row) -> Section:
    """The inputs by kind and outcome, and what is bad."""
    bad = [{name: trial[name] for name in ("kind", "number", "outcome", "damage")} for trial in detail["bad"]]
    slowest = detail["slowest"][0]
    return Section(
        {"": detail["tables"][""], "What is wrong": bad},
        f"The slowest input, {slowest['kind']} {slowest['number']} ({slowest['damage']}), took "
        f"{number(slowest['seconds'])} s.",
    )


def adapter_matrix(detail: Row) -> Section:
    """How many adapters pass, by base, versions and direction."""
    tables = detail["tables"]
    passed: dict[str, dict[str, str]] = {}
    for row in tables["Passed, by base and direction"]:
        of_base = passed.setdefault(row["base"], {_DIRECTIONS: row["base"]})
        for versions in (name for name in row if name not in ("base", "direction")):
            of_base[versions] = " / ".join(filter(None, [of_base.get(versions), row[versions]]))
    apart = max(row["largest difference from our logits"] for row in tables["Logits"])
    moved = min(row["least that an adapter moves logits"] for row in tables["Logits"])
    return Section(
        {"": list(passed.values()), "What does not pass": tables.get("What does not pass", [])},
        f"Logits of both sides differ by at most {number(apart)}; every adapter moves them by {number(moved)} or more.",
        [
            f"transformers {base['pair'][0]} places pictures of {base['base']} otherwise than we do, without any "
            "adapter too; adapters were compared with our positions given to it."
            for base in detail["bases"]
            if base.get("positions") == "given"
        ],
    )


SECTIONS: dict[str, Callable[[Row], Section]] = {
    "probe_grid": probe_grid,
    "step_beside_peft": step_beside_peft,
    "compiles": compiles,
    "xla_flops": xla_flops,
    "lanes_together": lanes_together,
    "search_beside_grid": search_beside_grid,
    "lanes_beside_processes": lanes_beside_processes,
    "accelerator_plans": accelerator_plans,
    "useful_steps": useful_steps,
    "gpu_step": gpu_step,
    "real_checkpoint": real_checkpoint,
    "kills": kills,
    "fuzz": fuzz,
    "adapter_matrix": adapter_matrix,
}
