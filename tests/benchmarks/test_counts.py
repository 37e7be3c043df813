"""Counts of the benchmarks that no machine changes: compiles, costs of search and grid, useful steps."""

import copy
import dataclasses
import json
from itertools import pairwise

import pytest

from benchmarks.lib import child as own
from benchmarks.lib import costs, tables
from benchmarks.speed import compiles, search_beside_grid
from mars_jax.config.load import load_config
from mars_jax.job.directory import RunDirectory
from mars_jax.job.programs import covering_engine, probe_programs
from mars_jax.job.workspace import Workspace
from mars_jax.lanes.loop import run_group
from mars_jax.lanes.stopping import Leaving
from mars_jax.models.flops import evaluation_flops, lane_step_flops
from mars_jax.search.probes.design import planned_lanes
from tests.helpers import tiny_job, tiny_lanes

SIX = {"vision": 4, "projector": 2, "llm": 4}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """What two processes compiled for the probes of a tiny job, and the workspace and folder of the first."""
    folder = tmp_path_factory.mktemp("counts")
    base, train = tiny_job.checkpoint(folder / "base"), tiny_job.records(folder, 48)
    probe = {"num_samples": [8, 32], "steps": 8, "patience": None, "lanes_per_program": 5, "validation_samples": 3}
    config = tiny_job.config(folder / "job.yaml", base, train, folder / "first", probe=probe)
    found = compiles.two_processes(folder, [], config, JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_NUM_CPU_DEVICES="1")
    workspace = Workspace(load_config(config), own.Warnings())
    workspace.mesh = tiny_lanes.mesh({"lane": 1})  # as it was in those processes
    return found, workspace, RunDirectory(folder / "first")


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
    _, workspace, _ = probed
    programs = probe_programs(workspace, planned_lanes(workspace.config), workspace.default_lane_block)
    ranks = {"vision": 2, "projector": 2, "llm": 4}
    assert covering_engine(workspace, programs, [ranks], steps=16) is programs[0].engine
    own_engine = covering_engine(workspace, programs, [ranks], steps=10**9)
    assert (own_engine.layout.ranks, own_engine.num_slots, own_engine.lane_block) == (ranks, 1, 1)
    # Of a CPU's cores, those without a lane do nothing, so this holds for more than one as well.
    many = copy.copy(workspace)
    many.mesh = tiny_lanes.mesh({"lane": 4})
    programs = probe_programs(many, planned_lanes(many.config), 1)
    assert covering_engine(many, programs, [ranks], steps=16) is programs[0].engine
    assert [programs[0].engine.places(lanes) for lanes in (1, 4, 5)] == [1, 4, 5]
    # Both looks get the same arrays, or the program would be compiled again; each reads its own samples.
    batches = workspace.validation_batches(4)
    everything = len(workspace.search.validation)
    assert (workspace.look_batches(3, 4), workspace.look_batches(256, 4), len(batches["tokens"])) == (1, 2, 2)
    real = batches["target_weights"].any(-1)
    assert (real[0].sum(), real.sum()) == (3, everything)


def test_the_cost_of_a_probe_phase_is_that_of_its_events(probed):
    _, workspace, directory = probed
    programs = probe_programs(workspace, planned_lanes(workspace.config), workspace.default_lane_block)
    cost = costs.probes(workspace, programs, directory)
    events = [json.loads(line) for line in directory.events_file.read_text().splitlines()]
    groups = [event for event in events if event["event"] == "group"]
    assert cost.lane_steps == sum(event["useful_lane_steps"] for event in groups) == 12 * 8
    # Four groups of three lanes, in blocks of two.
    assert cost.executed_lane_steps == sum(event["executed_lane_steps"] for event in groups) == 4 * 4 * 8
    assert cost.utilisation == 0.75


def test_lanes_that_leave_cost_no_more_and_half_a_block_costs_a_whole_one(probed):
    _, workspace, _ = probed
    sizes = {"batch_size": 4, "tokens": workspace.shapes.max_tokens}
    sizes |= {"tiles": workspace.shapes.max_tiles, "supervised": workspace.shapes.max_supervised}

    def pairs(lanes):
        return 2 * -(-lanes // 2)

    cost = costs.group_cost(
        workspace, [8, 4, 4], [0, 4, 8], padded_ranks=SIX, places=pairs, batch_size=4, look_samples=256
    )
    assert (cost.lane_steps, cost.executed_lane_steps) == (8 + 4 + 4, 4 * 4 + 4 * 2)
    looks = (2 + 4 + 2) * -(-len(workspace.search.validation) // 4)  # batches: one lane's at step 0, then as steps
    model = (workspace.model_config, workspace.targets, SIX)
    expected = 24 * lane_step_flops(*model, **sizes).total + looks * evaluation_flops(*model, **sizes).total
    assert cost.flops == pytest.approx(expected, rel=1e-12)
    assert cost.tokens == 4 * workspace.shapes.max_tokens * (24 + looks)


def test_the_sequential_grid_costs_its_final_runs_and_a_search_saves_at_most_their_number(probed):
    _, workspace, _ = probed
    grid = costs.grid_of(workspace.grids)
    assert len(grid) == 3 * 1 * 2
    alone = [costs.sequential_grid(workspace, [ranks]) for ranks in grid]
    whole = costs.sequential_grid(workspace, grid)
    assert whole.flops == pytest.approx(sum(cost.flops for cost in alone), rel=1e-12)
    assert whole.lane_steps == whole.executed_lane_steps == 6 * workspace.config.finetune.steps
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

    looks = [0, 1, 2, 4, 9, 16]
    lanes = tiny_lanes.LANES[:3]
    schedule = tiny_lanes.schedule(looks, leaving=Leaving(patience=2.0))
    result = run_group(
        lanes,
        dataclasses.replace(engine, chunk=chunk),
        tiny_lanes.base(),
        tiny_lanes.Stream(lanes[0]),
        tiny_lanes.VALIDATION,
        tiny_lanes.RATES,
        schedule,
    )
    ends = [rows[-1]["step"] for rows in result.rows]
    reached = [look for look in looks if look <= max(ends)]
    assert len(calls) == costs.chunk_calls(reached, schedule.chunk_steps)
    pairs = list(pairwise(reached))
    places = [2 * -(-sum(end >= look for end in ends) // 2) for _, look in pairs]
    assert result.executed_steps == sum(n * (look - before) for n, (before, look) in zip(places, pairs, strict=True))


def test_the_page_shows_every_result_and_says_which_miss_their_goal():
    result = json.loads((tables.RESULTS / "xla_flops.json").read_text())
    missed = {**result, "id": "useful_steps", "figure": 0.5, "goal": "at least 0.9", "unit": "useful | executed"}
    missed["detail"] = {"tables": {"Groups": [{"lanes": 3, "useful": 0.75}, {"lanes": 4, "more": True}]}}
    page = tables.page({"useful_steps": missed, "xla_flops": result})
    assert (
        "Not measured yet: probe_grid, step_beside_peft, compiles, lanes_together, search_beside_grid, "
        "lanes_beside_processes, accelerator_plans, gpu_step, kills, adapter_matrix." in page
    )
    assert "- useful_steps: 0.5 useful | executed; the goal is at least 0.9." in page
    assert "| lanes | useful | more |\n| --- | --- | --- |\n| 3 | 0.75 |  |\n| 4 |  | yes |" in page
    assert f"**{tables.number(result['figure'])}** ({result['unit']}" in page
    assert page.index("## xla_flops") < page.index("## useful_steps")
    assert [tables.reached(4, goal) for goal in ("at most 4", "above 4", "at least 5, aim for 10", "fast")] == [
        "yes",
        "no",
        "no",
        "",
    ]
