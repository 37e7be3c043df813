"""The phases of a search: plan, probe, fit, select, finetune and compare."""

from collections.abc import Sequence
from pathlib import Path

import jax

from mars_jax.config.load import Config
from mars_jax.errors import ConfigError, DataError, NoValidResultError
from mars_jax.job import files
from mars_jax.job.checks import check_probed_pictures, check_searched, check_there
from mars_jax.job.job import Job
from mars_jax.job.phase import Inputs, Phase, files_of, sections, sources_of
from mars_jax.job.pick import picked
from mars_jax.job.programs import Program, probe_programs
from mars_jax.lanes.stopping import Patience
from mars_jax.laws.convergence.registry import RULES
from mars_jax.runtime.devices import physical_memory_bytes
from mars_jax.runtime.jsonfiles import Document, load_json, write_json
from mars_jax.search.compare import compare_run
from mars_jax.search.cost import lane_costs
from mars_jax.search.finals import (
    FINAL_SETTINGS,
    adapters_of,
    final_run,
    leave_final_run,
    left_final_run,
    rates_of,
    write_final,
)
from mars_jax.search.lane_trainer import LaneTrainer
from mars_jax.search.probes.block_size import lane_block, measure_lane_block
from mars_jax.search.probes.design import design, planned_lanes
from mars_jax.search.probes.restore import check_lanes, recover_lanes, restore_lanes, warn_of_missing_lanes
from mars_jax.search.probes.run import recorded_probes, run_probes
from mars_jax.search.selection import Selection, with_convergence, without_laws
from mars_jax.search.space import fit_records, job_space, read_laws
from mars_jax.search.strategies.base import Budget, Strategy
from mars_jax.search.strategies.registry import STRATEGIES
from mars_jax.search.trainer import Configuration, Curve


def has_probes(config: Config) -> bool:
    """Whether a config's probes have any lanes."""
    return config.lora.is_searched and bool(design(config))


def check_strategy(config: Config) -> None:
    """Refuses a strategy that there is not, or settings that it does not take.

    Raises:
        ConfigError: an unknown name, a number of final runs for a strategy that begins none, no convergence rule for
            one that needs convergence times, or rates and frozen modules to choose from for one that fits laws.
    """
    strategy, settings = STRATEGIES[config.selection.method], config.selection
    if settings.sweep is not None and not strategy.takes_budget:
        raise ConfigError(
            f"selection.sweep is {settings.sweep}, but selection.method: {strategy.name} picks without final runs of "
            "its own. Leave selection.sweep out, or choose another method, such as best_probes."
        )
    _check_space(config, strategy, "selection.method")
    for name in config.compare.strategies:
        _check_space(config, STRATEGIES[name], "compare.strategies")
        if STRATEGIES[name].probes == "losses" and strategy.probes != "losses":
            raise ConfigError(
                f"compare.strategies has {name}, which picks by probes of ranks, and selection.method: {strategy.name} "
                "runs none. Compare others, or search by selection.method: best_probes, laws or paper."
            )
    if config.lora.is_searched and strategy.needs_convergence and config.convergence.rule is None:
        raise ConfigError(
            f"selection.method: {strategy.name} balances the modules' convergence, which convergence.rule: null "
            f"doesn't measure. Name a rule ({', '.join(RULES.names)}), or choose selection.method: laws."
        )


def _check_space(config: Config, strategy: Strategy, setting: str) -> None:
    """Refuses rates and frozen modules to choose from for a strategy that fits laws of ranks."""
    frozen = [module for module in config.lora.searched if 0 in config.lora.grids[module]]
    if strategy.probes != "losses" or not (config.lora.factors or frozen):
        return
    asked = [f"lora.modules.{module}.rates" for module in config.lora.factors]
    asked += [f"rank 0 in lora.modules.{module}.ranks" for module in frozen]
    others = ", ".join(name for name in STRATEGIES.names if STRATEGIES[name].probes != "losses")
    raise ConfigError(
        f"{setting}: {strategy.name} chooses by laws of ranks alone, and can't choose from {' and '.join(asked)}. "
        f"Choose a method that trains what it chooses from ({others}), or give each module one rate and ranks above 0."
    )


def check_probes(config: Config) -> None:
    """Refuses to probe where nothing asks for it.

    Raises:
        ConfigError: the config gives every module one rank, or its strategy needs no probes.
    """
    check_searched(config)
    if not has_probes(config):
        raise ConfigError(
            f"selection.method: {config.selection.method} picks without probes, so there is nothing to plan, to probe "
            "or to fit. Run `mars run`, or choose another method."
        )


def programs_of(job: Job) -> tuple[Program, ...]:
    """The programs of the probe phase, which final runs may use too; none where nothing is probed."""
    if not has_probes(job.config):
        return ()
    return probe_programs(job, planned_lanes(job.config), lane_block(job))


# Plan.


def _plan_inputs(job: Job) -> Inputs:
    check_probes(job.config)
    machine = f"{physical_memory_bytes()} {[str(device) for device in jax.devices()]}"
    names = ("model", "data", "lora", "adapter", "optimizer", "probe", "convergence", "selection", "finetune", "mesh")
    return {**sources_of(job), "machine": machine, **sections(job.config, *names)}


def _plan(job: Job) -> Document:
    check_probed_pictures(job.config, job.base.targets, job.data.search.train)
    document = lane_costs(job, planned_lanes(job.config))
    write_json(job.directory / files.PLAN, document)
    job.reporter.notice(
        f"plan: {document['lanes']} lanes, {document['lane_steps']} lane-steps; then {document['final_runs']} "
        f"final runs, at most {document['final_steps']}; the full grid of final runs would be "
        f"{document['full_grid_steps']}"
    )
    return document


PLAN = Phase("plan", _plan_inputs, (files.PLAN,), _plan, applies=has_probes)


# Probe.


def _probe_inputs(job: Job) -> Inputs:
    check_probes(job.config)
    names = ("seed", "model", "data", "lora", "adapter", "optimizer", "probe", "convergence", "finetune")
    return {**sources_of(job), **sections(job.config, *names)}


def _probe(job: Job) -> Document:
    lanes = planned_lanes(job.config)
    derived = recover_lanes(job)
    measure_lane_block(job, lanes)
    made = run_probes(job, lanes, programs_of(job))
    check_lanes(job, {**derived, **made})
    return _lane_counts(job)


def _lane_counts(job: Job) -> Document:
    statuses = [record.status for record in recorded_probes(job)]
    return {"lanes": len(statuses), **{status: statuses.count(status) for status in sorted(set(statuses))}}


PROBE = Phase(
    "probe",
    _probe_inputs,
    (files.LANES, files.CURVES, files.PROBE_ADAPTERS),
    _probe,
    _lane_counts,
    applies=has_probes,
    repair=restore_lanes,
)


# Fit.


def _fit_inputs(job: Job) -> Inputs:
    check_there(job.directory / files.LANES, "probe")
    names = ("laws", "seed", "probe")
    return {**files_of(job, files.LANES), **sections(job.config, *names)}


def _fit(job: Job) -> Document:
    warn_of_missing_lanes(job)
    laws = fit_records(job.config, recorded_probes(job))
    write_json(job.directory / files.LAWS, laws.to_json())
    return _without_draws(laws.to_json())


def _without_draws(laws: Document) -> Document:
    return {name: value for name, value in laws.items() if name != "draws"}


FIT = Phase(
    "fit",
    _fit_inputs,
    (files.LAWS,),
    _fit,
    lambda job: _without_draws(job.directory.read(files.LAWS)),
    applies=has_probes,
)


# Select.


def _select_inputs(job: Job) -> Inputs:
    config = job.config
    names = ("selection", "lora", "adapter", "seed", "optimizer", "finetune", "model", "data", "probe")
    made = {**sources_of(job), **sections(config, *names)}
    if not has_probes(config):
        return made
    check_there(job.directory / files.LAWS, "fit")
    return {**files_of(job, files.LAWS, files.LANES, files.PROBE_ADAPTERS), **made}


def _select(job: Job) -> Document:
    selection = _searched(job) if job.config.lora.is_searched else _given(job)
    document = selection.to_json()
    write_json(job.directory / files.SELECTION, document)
    job.reporter.notice(f"select: {document['explanation']}")
    return document


def _given(job: Job) -> Selection:
    ranks = {module: grid[0] for module, grid in job.config.lora.grids.items() if grid[0]}
    explanation = "lora.modules gives every module one rank, so these were taken and nothing was searched."
    return without_laws("given", ranks, job.data.target_num_samples(), explanation)


def _searched(job: Job) -> Selection:
    strategy = STRATEGIES[job.config.selection.method]
    trainer = LaneTrainer(job, programs_of(job), job.directory / files.SWEEP_CHECKPOINTS, "final runs")
    outcome = strategy.search(job_space(job), trainer, Budget(job.config.selection.sweep))
    if outcome.final:
        leave_final_run(job, outcome.final)
    if outcome.curves:
        write_json(job.directory / files.SWEEP, {"runs": [_begun(job, curve) for curve in outcome.curves]})
    probed_for = strategy.probes == "convergence" and has_probes(job.config)
    return with_convergence(outcome.selection, read_laws(job)) if probed_for else outcome.selection


def _begun(job: Job, curve: Curve) -> Document:
    ranks = curve.configuration.ranks
    return {
        "ranks": dict(ranks),
        "parameters": {module: rank * job.base.parameters_per_rank[module] for module, rank in ranks.items()},
        "factors": dict(curve.configuration.factors),
        "learning_rate": rates_of(job.config, curve.configuration),
        "seed": curve.configuration.seed,
        "looks": [(point.step, point.validation_loss if point.alive else None) for point in curve.points],
        # For paired comparisons, where the strategy asked for them; five digits will do.
        "sample_losses": [
            [float(f"{loss:.5g}") for loss in point.sample_losses if point.alive] for point in curve.points
        ],
    }


SELECT = Phase(
    "select",
    _select_inputs,
    (files.SELECTION, files.SWEEP, files.FINAL_RUN, files.FINAL_ADAPTERS),
    _select,
    scratch=(files.SWEEP_CHECKPOINTS,),
)


# Finetune.


def _finetune_inputs(job: Job) -> Inputs:
    check_there(job.directory / files.SELECTION, "select")
    made = files_of(job, files.SELECTION, files.FINAL_RUN, files.FINAL_ADAPTERS, files.PROBE_ADAPTERS)
    return {**made, **sources_of(job), **sections(job.config, *FINAL_SETTINGS, "selection", "probe")}


def _finetune(job: Job) -> Document:
    pick = Configuration(*picked(job))
    left = left_final_run(job, pick)
    if left:
        job.reporter.notice("finetune: the final run that the search kept is taken")
        return write_final(job, *left, from_sweep=True)
    curve = _trained(job, pick)
    return write_final(job, final_run(job, curve), adapters_of(curve), from_sweep=False)


def _trained(job: Job, pick: Configuration) -> Curve:
    trainer = LaneTrainer(job, programs_of(job), job.directory / files.FINETUNE_CHECKPOINTS, "fine-tune")
    (curve,) = trainer.train([pick], Patience())
    if curve.reason is not None:
        raise NoValidResultError(
            f"the final run with ranks {dict(pick.ranks)} diverged by step {curve.steps}: {curve.reason}. Lower "
            f"finetune.learning_rate (now {rates_of(job.config, curve.configuration)})."
        )
    return curve


FINETUNE = Phase("finetune", _finetune_inputs, (files.SUMMARY, files.ADAPTERS, files.METRICS), _finetune)


# Compare.


def _compare_inputs(job: Job) -> Inputs:
    check_searched(job.config)
    check_there(job.directory / files.SELECTION, "select")
    names = (*FINAL_SETTINGS, "selection", "evaluate", "compare", "probe")
    made = files_of(job, files.SELECTION, files.LANES, files.CURVES, files.SWEEP)
    return {**made, **sources_of(job), **sections(job.config, *names)}


def _compare(job: Job) -> Document:
    selection = load_json(job.directory / files.SELECTION, Selection)
    return compare_run(job, programs_of(job), selection)


def _trials_again(job: Job, damaged: Sequence[Path]) -> bool:
    """Final runs that are recorded are not run again, so those in a damaged file have to go first."""
    if files.TRIALS in damaged and (job.directory / files.TRIALS).exists():
        raise DataError(
            f"{job.directory / files.TRIALS} isn't what the comparison left: it was damaged, or changed by hand. Put "
            "it back from a copy, or delete it to have its final runs trained again."
        )
    return False


COMPARE = Phase("compare", _compare_inputs, (files.COMPARISON, files.TRIALS), _compare, repair=_trials_again)
