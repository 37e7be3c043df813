"""One opened run directory and its phases: what each reads and writes, and when it is skipped.

Finished work with unchanged inputs is skipped, interrupted work goes on. The work itself is elsewhere, and which phases
a command has is `pipeline`'s business.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from mars_jax.adapters.files import read_adapters
from mars_jax.adapters.targets import parameters_per_rank
from mars_jax.config.load import Config
from mars_jax.data.rows import source_files
from mars_jax.errors import ConfigError
from mars_jax.evals.run import evaluate_run
from mars_jax.hub.adapter import ADAPTER_WEIGHTS_FILE, write_adapter
from mars_jax.hub.paths import repository
from mars_jax.hub.write import write_merged
from mars_jax.job.checks import check_model, check_sizes
from mars_jax.job.directory import RunDirectory, hash_inputs
from mars_jax.job.export import verify_run
from mars_jax.job.programs import Program, probe_programs
from mars_jax.job.workspace import Workspace
from mars_jax.laws.fit import Laws, fit_laws
from mars_jax.runtime.jsonfiles import read_json, read_jsonl, write_json
from mars_jax.runtime.progress import Reporter
from mars_jax.search.compare import compare_run
from mars_jax.search.cost import lane_costs
from mars_jax.search.finals import finetune as run_finetune
from mars_jax.search.probes.block_size import lane_block, tune_lane_block
from mars_jax.search.probes.design import planned_lanes
from mars_jax.search.probes.records import probed_losses
from mars_jax.search.probes.run import run_probes
from mars_jax.search.selection import Selection, given
from mars_jax.search.strategies.halving import candidates_for_sweep, decide_by_sweep, run_sweep
from mars_jax.search.strategies.laws import select as choose

Document = dict[str, Any]


class Session:
    """The phases of one opened run directory, sharing one workspace."""

    def __init__(self, config: Config, reporter: Reporter, directory: RunDirectory) -> None:
        self.config = config
        self.reporter = reporter
        self.directory = directory
        self.workspace = Workspace(config, reporter)

    def _skip_or_run(
        self,
        phase: str,
        inputs: str,
        output: Path,
        work: Callable[[], Document],
        result: Callable[[], Document] | None = None,
    ) -> Document:
        """Runs `work` as a phase unless it left `output` from the same inputs; then gives `result`, or that file."""
        if self.directory.is_done(phase, inputs) and output.exists():
            self.reporter.notice(f"{phase}: done before, skipped")
            return result() if result else read_json(output)
        with self.directory.phase(phase, inputs):
            return work()

    def _sections(self, *names: str) -> str:
        """Config sections as text, for the hash of a phase's inputs."""
        return repr([getattr(self.config, name) for name in names])

    def search(self) -> Document:
        """All that leads to the pick."""
        self.data()
        if self.config.lora.is_searched:
            self.plan()
            self.probe()
            self.fit()
        return self.select()

    def data(self) -> Document:
        """Checks checkpoint and targets, then reads and checks every record; writes data.json."""
        paths = (self.config.data.train, self.config.data.validation, self.config.data.test)
        files = {str(file): hash_inputs(file) for path in paths if path for file in source_files(path)}
        self._check_same_data(files)
        inputs = hash_inputs(repr(files), self._sections("data", "model"))

        def work() -> Document:
            check_model(self.workspace)
            self.reporter.notice("data: reading and checking every sample")
            summary = {**self.workspace.data_summary(), "files": files}
            check_sizes(self.workspace)
            write_json(self.directory.data_file, summary)
            sizes = ", ".join(f"{summary[name]} {name}" for name in ("train", "validation", "test"))
            formats = ", ".join(summary["formats"])
            self.reporter.notice(f"data: {sizes} samples, read as {formats}, {len(summary['dropped'])} left out")
            self._tell_padding(**summary["padding"])
            return summary

        return self._skip_or_run("data", inputs, self.directory.data_file, work)

    def _tell_padding(self, batch_size: int, **shares: Mapping[str, float]) -> None:
        now, other = ("packed", "unpacked") if self.config.data.packing else ("unpacked", "packed")
        self.reporter.notice(
            "data: {tokens:.0%} of the tokens and {tiles:.0%} of the tiles ".format(**shares[now])
            + f"that a step of {batch_size} samples computes are padding, {now}; "
            + "it would be {tokens:.0%} and {tiles:.0%} ".format(**shares[other])
            + other
        )

    def _check_same_data(self, files: Mapping[str, str]) -> None:
        """Refuses to mix lanes of other data with those of this run."""
        if not (self.directory.data_file.exists() and self.directory.lanes_file.exists()):
            return
        before = read_json(self.directory.data_file)["files"]
        changed = [name for name in {**before, **files} if before.get(name) != files.get(name)]
        if changed:
            raise ConfigError(
                f"run directory {self.directory.path} has lanes of other data: {', '.join(changed)} changed since. Set "
                f"another run_dir, take the files back, or delete {self.directory.path} to start again."
            )

    def _need_search(self) -> None:
        if not self.config.lora.is_searched:
            ranks = ", ".join(f"{module} {grid[0]}" for module, grid in self.workspace.grids.items())
            raise ConfigError(
                f"lora.modules gives every module one rank ({ranks}), so there is nothing to search. Give at least one "
                "module two ranks or more; or fine-tune with these ranks by `mars run`."
            )

    def plan(self) -> Document:
        """Counts lanes, steps, samples and memory; refuses what can't fit."""
        self._need_search()
        inputs = hash_inputs(self._sections("model", "lora", "probe", "convergence", "selection", "finetune", "mesh"))

        def work() -> Document:
            document = lane_costs(self.workspace, planned_lanes(self.config))
            write_json(self.directory.plan_file, document)
            self.reporter.notice(
                f"plan: {document['lanes']} lanes, {document['lane_steps']} lane-steps; then {document['final_runs']} "
                f"final runs, halved in rungs, {document['final_steps']}; the full grid of final runs would be "
                f"{document['full_grid_steps']}"
            )
            return document

        return self._skip_or_run("plan", inputs, self.directory.plan_file, work)

    def probe(self) -> Document:
        """Runs the groups of lanes that have no record yet."""
        sections = self._sections("seed", "model", "data", "lora", "optimizer", "probe", "convergence")
        inputs = hash_inputs(self.directory.data_file, sections)

        def work() -> Document:
            lanes = planned_lanes(self.config)
            tune_lane_block(self.workspace, lanes, self.directory)
            run_probes(self.workspace, lanes, self._programs, self.directory)
            return self._lane_counts()

        return self._skip_or_run("probe", inputs, self.directory.lanes_file, work, self._lane_counts)

    def _lane_counts(self) -> Document:
        records = read_jsonl(self.directory.lanes_file, self.reporter.warn)
        statuses = [record["status"] for record in records]
        return {"lanes": len(records), **{status: statuses.count(status) for status in sorted(set(statuses))}}

    def fit(self) -> Document:
        """Fits the laws from the lane records alone."""
        self._need(self.directory.lanes_file, "probe")
        inputs = hash_inputs(self.directory.lanes_file, self._sections("laws", "seed"))

        def work() -> Document:
            records = read_jsonl(self.directory.lanes_file, self.reporter.warn)
            laws = fit_laws(
                records,
                key=jax.random.key(self.config.seed),
                num_bootstraps=self.config.laws.bootstraps,
                measuring_interval=2 ** (1 / self.config.probe.looks_per_doubling) - 1,
                huber=self.config.laws.huber,
            )
            write_json(self.directory.laws_file, laws.to_json())
            return _without_draws(laws.to_json())

        file = self.directory.laws_file
        return self._skip_or_run("fit", inputs, file, work, lambda: _without_draws(read_json(file)))

    def select(self) -> Document:
        """Picks by the laws and a sweep of final runs; takes the ranks where all are given."""
        if not self.config.lora.is_searched:
            return self._take_given()
        self._need(self.directory.laws_file, "fit")
        sections = self._sections("selection", "lora", "seed", "optimizer", "finetune")
        inputs = hash_inputs(self.directory.laws_file, self.directory.lanes_file, sections)

        def work() -> Document:
            workspace, settings = self.workspace, self.config.selection
            grids = {module: ranks for module, ranks in workspace.grids.items() if max(ranks) > 0}
            records = read_jsonl(self.directory.lanes_file, self.reporter.warn)
            selection = choose(
                Laws.from_json(read_json(self.directory.laws_file)),
                grids,
                workspace.target_num_samples(),
                method=settings.method,
                parameters_per_rank=parameters_per_rank(workspace.targets),
                probed=probed_losses(records, list(grids)),
            )
            candidates = candidates_for_sweep(selection, min(settings.sweep, self.config.probe.lanes_per_program))
            if settings.method == "laws" and len(candidates) > 1:
                self.reporter.notice(
                    f"select: the {len(candidates)} best probes are given a final run, halved in rungs"
                )
                vectors = [dict.fromkeys(workspace.grids, 0) | dict(ranks) for ranks in candidates]
                results = run_sweep(workspace, self._programs, vectors, self.directory)
                selection = decide_by_sweep(
                    selection, [({module: ranks[module] for module in grids}, loss) for ranks, loss in results]
                )
            document = selection.to_json()
            write_json(self.directory.selection_file, document)
            shutil.rmtree(self.directory.sweep_checkpoints, ignore_errors=True)
            self.reporter.notice(f"select: {document['explanation']}")
            return document

        return self._skip_or_run("select", inputs, self.directory.selection_file, work)

    def _take_given(self) -> Document:
        def work() -> Document:
            ranks = {module: grid[0] for module, grid in self.workspace.grids.items() if grid[0]}
            document = given(ranks, self.workspace.target_num_samples()).to_json()
            write_json(self.directory.selection_file, document)
            self.reporter.notice(f"select: {document['explanation']}")
            return document

        inputs = hash_inputs(self._sections("selection", "lora"))
        return self._skip_or_run("select", inputs, self.directory.selection_file, work)

    def _ranks(self) -> dict[str, int]:
        """The pick, with 0 for frozen modules."""
        self._need(self.directory.selection_file, "select")
        return dict.fromkeys(self.workspace.grids, 0) | read_json(self.directory.selection_file)["pick"]

    def finetune(self) -> Document:
        """The final run with the pick."""
        sections = self._sections("seed", "finetune", "optimizer")
        self._need(self.directory.selection_file, "select")
        inputs = hash_inputs(self.directory.selection_file, sections)

        def work() -> Document:
            return run_finetune(self.workspace, self._programs, self._ranks(), self.directory)

        return self._skip_or_run("finetune", inputs, self.directory.finetune_summary_file, work)

    @cached_property
    def _adapters(self) -> Any:
        return read_adapters(self.directory.finetune_adapters_file)

    @cached_property
    def _programs(self) -> tuple[Program, ...]:
        if not self.config.lora.is_searched:
            return ()
        block = lane_block(self.workspace, self.directory)
        return probe_programs(self.workspace, planned_lanes(self.config), block)

    def evaluate(self) -> Document:
        """Base and result on the test split, with controls."""
        self._need(self.directory.finetune_summary_file, "finetune")
        inputs = hash_inputs(self.directory.finetune_summary_file, self._sections("evaluate"))

        def work() -> Document:
            return evaluate_run(self.workspace, self._adapters, self.directory)

        return self._skip_or_run("evaluate", inputs, self.directory.evaluation_file, work)

    def compare(self) -> Document:
        """The comparison; runs that are recorded are not run again."""
        self._need_search()
        sections = self._sections("seed", "finetune", "optimizer", "evaluate")
        inputs = hash_inputs(self.directory.selection_file, sections)

        def work() -> Document:
            selection = Selection.from_json(read_json(self.directory.selection_file))
            return compare_run(self.workspace, self._programs, selection, self.directory)

        return self._skip_or_run("compare", inputs, self.directory.comparison_file, work)

    def export(self, *, verify: bool, merged: bool) -> Document:
        """Adapter, merged checkpoint, and the proof that PyTorch sees the same."""
        self._need(self.directory.finetune_summary_file, "finetune")
        inputs = hash_inputs(self.directory.finetune_summary_file)

        def write_peft() -> Document:
            write_adapter(
                self.directory.adapter,
                self._adapters,
                self._ranks(),
                self.workspace.model_config,
                base_name=repository(self.config.model.checkpoint),
                provenance={
                    "selection": _brief(read_json(self.directory.selection_file)),
                    "finetune": read_json(self.directory.finetune_summary_file),
                    "alpha": asdict(self.workspace.alpha),
                    "versions": self.directory.state()["versions"],
                },
            )
            return {"adapter": self.directory.adapter}

        def merge() -> Document:
            write_merged(self.directory.merged, self.workspace.checkpoint, self._adapters)
            return {"merged": self.directory.merged}

        file = self.directory.adapter / ADAPTER_WEIGHTS_FILE
        document = self._skip_or_run("export", inputs, file, write_peft, lambda: {"adapter": self.directory.adapter})
        if merged:
            folder = self.directory.merged
            document |= self._skip_or_run("merge", inputs, folder, merge, lambda: {"merged": folder})
        if verify:
            document["verified"] = verify_run(self.workspace, self._adapters, self.directory, merged)
        return document

    def report(self) -> Document:
        """The page; cheap, so written anew each time."""
        from mars_jax.report import write_report

        with self.directory.phase("report", hash_inputs("")):
            return {"report": write_report(self.directory.path)}

    def _need(self, path: Path, phase: str) -> None:
        if not path.exists():
            raise ConfigError(f"{path} is missing: run `mars {phase}` first, or `mars run` for every phase.")


def _without_draws(laws: Mapping[str, Any]) -> Document:
    return {name: value for name, value in laws.items() if name != "draws"}


def _brief(selection: Mapping[str, Any]) -> Document:
    return {name: value for name, value in selection.items() if name != "candidates"}
