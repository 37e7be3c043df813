"""Counts of the benchmarks that no machine changes: compiles, costs of search and grid, useful steps."""

import dataclasses
import json
import re
from itertools import pairwise

import pytest

from benchmarks.lib import child as own
from benchmarks.lib import costs, pages, tables
from benchmarks.speed import compiles, search_beside_grid
from mars_jax.config.load import load_config
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory
from mars_jax.job.job import make_job
from mars_jax.job.programs import covering_engine, probe_programs
from mars_jax.lanes.inputs import LaneInputs
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.stopping import Patience
from mars_jax.models.flops import BatchShape, evaluation_flops, lane_step_flops
from mars_jax.search.probes.design import planned_lanes
from tests.helpers import tiny_job, tiny_lanes

SIX = {"vision": 4, "projector": 2, "llm": 4}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """What two processes compiled for the probes of a tiny job, and the job and folder of the first."""
    folder = tmp_path_factory.mktemp("counts")
    base, train = tiny_job.checkpoint(folder / "base"), tiny_job.records(folder, 48)
    probe = {"num_samples": [8, 32], "steps": 8, "patience": None, "lanes_per_program": 5, "validation_samples": 3}
    config = tiny_job.config(folder / "job.yaml", base, train, folder / "first", probe=probe)
    found = compiles.two_processes(folder, [], config, JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_NUM_CPU_DEVICES="1")
    return found, job_on(load_config(config), 1), RunDirectory(folder / "first")


def job_on(config, devices):
    """A job with its lanes on some devices, one as it was in those processes."""
    job = make_job(config, own.Warnings())
    job.base.mesh = tiny_lanes.mesh({"lane": devices})
    return job


def test_a_probe_phase_compiles_one_program_a_bucket_and_three_more_at_most(probed):
    (first, _), _, _ = probed
    assert first["lanes"]["lanes"] == 12
    assert first["buckets"] == 1
    assert first["programs"]["jit(chunk)"] == 1
    assert 1 < first["compiles"] <= compiles.bound(1) == 4, first["programs"]


def test_a_second_process_compiles_nothing(probed):
    (first, second), _, _ = probed
    assert (second["compiles"], second["misses"]) == (0, 0)
    assert second["hits"] == first["compiles"]


def test_a_short_final_run_takes_the_program_of_the_probes_and_a_long_one_its_own(probed):
    _, job, _ = probed
    programs = probe_programs(job, planned_lanes(job.config), job.engines.default_lane_block)
    ranks = {"vision": 2, "projector": 2, "llm": 4}
    assert covering_engine(job, programs, [ranks], steps=16) is programs[0].engine
    own_engine = covering_engine(job, programs, [ranks], steps=10**9)
    assert (own_engine.layout.ranks, own_engine.num_slots, own_engine.lane_block) == (ranks, 1, 1)
    # Of a CPU's cores, those without a lane do nothing, so this holds for more than one as well.
    many = job_on(job.config, 4)
    programs = probe_programs(many, planned_lanes(many.config), 1)
    assert covering_engine(many, programs, [ranks], steps=16) is programs[0].engine
    assert [programs[0].engine.places(lanes) for lanes in (1, 4, 5)] == [1, 4, 5]
    # Both eval points get the same arrays, or the program would be compiled again; each reads its own samples.
    batches = job.data.validation_batches(4)
    everything = len(job.data.search.validation)
    assert (job.data.num_eval_batches(3, 4), job.data.num_eval_batches(256, 4), len(batches["tokens"])) == (1, 2, 2)
    real = batches["target_weights"].any(-1)
    assert (real[0].sum(), real.sum()) == (3, everything)


def test_the_cost_of_a_probe_phase_is_that_of_its_events(probed):
    _, job, directory = probed
    programs = probe_programs(job, planned_lanes(job.config), job.engines.default_lane_block)
    cost = costs.probes(job, programs, directory)
    events = [json.loads(line) for line in (directory / files.EVENTS).read_text().splitlines()]
    groups = [event for event in events if event["event"] == "group"]
    assert cost.lane_steps == sum(event["useful_lane_steps"] for event in groups) == 12 * 8
    # Four groups of three lanes, in blocks of two.
    assert cost.executed_lane_steps == sum(event["executed_lane_steps"] for event in groups) == 4 * 4 * 8
    assert cost.utilisation == 0.75


def test_lanes_that_stop_cost_no_more_and_half_a_block_costs_a_whole_one(probed):
    _, job, _ = probed
    shapes = job.data.shapes
    shape = BatchShape(4, shapes.max_tokens, shapes.max_tiles, shapes.max_supervised)

    def pairs(lanes):
        return 2 * -(-lanes // 2)

    cost = costs.group_cost(job, [8, 4, 4], [0, 4, 8], padded_ranks=SIX, places=pairs, batch_size=4, eval_samples=256)
    assert (cost.lane_steps, cost.executed_lane_steps) == (8 + 4 + 4, 4 * 4 + 4 * 2)
    read = (2 + 4 + 2) * -(-len(job.data.search.validation) // 4)  # batches: one lane's at step 0, then as steps
    model = (job.base.model_config, job.base.targets, SIX, shape)
    expected = 24 * lane_step_flops(*model).total + read * evaluation_flops(*model).total
    assert cost.flops == pytest.approx(expected, rel=1e-12)
    assert cost.tokens == 4 * job.data.shapes.max_tokens * (24 + read)


def test_the_sequential_grid_costs_its_final_runs_and_a_search_saves_at_most_their_number(probed):
    _, job, _ = probed
    grid = costs.grid_of(job.config.lora.grids)
    assert len(grid) == 3 * 1 * 2
    alone = [costs.sequential_grid(job, [ranks]) for ranks in grid]
    whole = costs.sequential_grid(job, grid)
    assert whole.flops == pytest.approx(sum(cost.flops for cost in alone), rel=1e-12)
    assert whole.lane_steps == whole.executed_lane_steps == 6 * job.config.finetune.steps
    run = {
        "grid": [{"ranks": ranks} for ranks in grid],
        "sequential_grid": {"16": dataclasses.asdict(whole), "12288": dataclasses.asdict(whole)},
        "search": {
            "probes": {"flops": 0.0},
            "final_run": {steps: dataclasses.asdict(alone[-1]) for steps in ("16", "12288")},
        },
    }
    assert 1 < search_beside_grid.ratios_at([run], 16)["sequential grid"] <= 6
    # A search as dear as the rest halves it.
    run["search"]["probes"]["flops"] = alone[-1].flops
    assert search_beside_grid.ratios_at([run], 16)["share of the search"] == 0.5


def test_random_pairs_are_judged_over_all_choices():
    assert search_beside_grid.expected_best([1.0, 2.0, 3.0, 4.0], 2) == pytest.approx((3 * 1 + 2 * 2 + 1 * 3) / 6)


def test_the_host_waits_for_the_device_once_a_chunk_and_executed_steps_are_as_counted():
    calls = []
    engine = tiny_lanes.padded_engine()

    def chunk(*arguments):
        calls.append(1)
        return engine.chunk(*arguments)

    steps = [0, 1, 2, 4, 9, 16]
    lanes = tiny_lanes.LANES[:3]
    schedule = tiny_lanes.schedule(steps, stopping=Patience(2.0))
    inputs = LaneInputs(tiny_lanes.base(), tiny_lanes.Stream(lanes[0]), tiny_lanes.VALIDATION, tiny_lanes.RATES)
    result = run_group(lanes, dataclasses.replace(engine, chunk=chunk), inputs, schedule)
    ends = [points[-1].step for points in result.points]
    reached = [step for step in steps if step <= max(ends)]
    assert len(calls) == costs.chunk_calls(reached, schedule.chunk_steps)
    pairs = list(pairwise(reached))
    places = [2 * -(-sum(end >= step for end in ends) // 2) for _, step in pairs]
    assert result.executed_steps == sum(n * (step - before) for n, (before, step) in zip(places, pairs, strict=True))


def test_the_page_shows_every_result_and_says_which_miss_their_goal():
    result = json.loads((tables.RESULTS / "xla_flops.json").read_text())
    missed = {**result, "id": "remat", "figure": 0.5, "goal": "at least 0.9", "unit": "useful | executed"}
    missed["detail"] = {"tables": {"Groups": [{"lanes": 3, "useful": 0.75}, {"lanes": 4, "more": True}]}}
    page = tables.page({"remat": missed, "xla_flops": result})
    assert (
        "Not measured yet: probe_grid, step_beside_peft, gpu_step, search_beside_grid, useful_steps, compiles, "
        "lanes_together, lanes_beside_processes, accelerator_plans, real_checkpoint, kills, fuzz, adapter_matrix."
        in page
    )
    assert "- remat: 0.5 useful | executed; the goal is at least 0.9." in page
    assert "| lanes | useful | more |\n| --- | --- | --- |\n| 3 | 0.75 |  |\n| 4 |  | yes |" in page
    figure, date = tables.number(result["figure"]), result["date"][:10]
    assert f"**{figure}** ({result['unit']}" in page
    measured = "FLOPs of our compiled training step over the fewest that the step can take"
    assert f"| [xla_flops](#xla_flops) | {measured} | {figure} | {result['goal']} | yes | {date} |" in page
    assert page.index("## xla_flops") < page.index("## remat")
    assert [tables.reached(4, goal) for goal in ("at most 4", "above 4", "at least 5, aim for 10", "fast")] == [
        "yes",
        "no",
        "no",
        "",
    ]


def test_the_committed_pages_are_those_of_the_results():
    documents = {file.stem: json.loads(file.read_text()) for file in tables.RESULTS.glob("*.json")}
    texts = tables.texts(dict(sorted(documents.items())))
    assert list(texts) == ["performance", "evidence", "laws"]
    for name, text in texts.items():
        written = (tables.ROOT / "docs" / f"{name}.md").read_text()
        assert written == text, f"docs/{name}.md is old: run python -m benchmarks.lib.tables"
        assert all(f"## {key}\n" in text for key in documents if tables.page_of(key) == name)


def test_every_number_of_the_performance_page_is_read_from_a_result():
    names = r"LLaVA-OneVision 0\.5B|H100|v5e|b?float(16|32)|\.md\.j2|\[:10\]"
    scripts = [script for key in pages.SECTIONS for script in tables.BENCHMARKS.glob(f"*/{key}.py")]
    assert len(scripts) == len(pages.SECTIONS)
    texts = [tables.introduction(script) for script in scripts]
    for text in [*texts, (tables.HERE / "performance.md.j2").read_text()]:
        assert not re.search(r"\d", re.sub(names, "", text)), text


def test_a_page_follows_its_results_where_another_way_is_better():
    result = json.loads((tables.RESULTS / "lanes_beside_processes.json").read_text())
    loss = "8 lanes take more memory than 8 PEFT processes while XLA compiles."
    assert loss not in tables.page({"lanes_beside_processes": result})
    result["detail"]["ours"]["8"]["compiling"]["peak_bytes"] *= 10
    result["detail"]["bytes_a_lane"] = None
    result["detail"]["tables"]["A lane more, MiB"][0]["measured"] = 12.5
    page = tables.page({"lanes_beside_processes": result})
    assert f"- lanes_beside_processes: {loss}" in page
    assert "A lane more takes 12.5 MiB" in page
