"""Reads the files of a run directory into one record. Absent files are allowed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mars_jax.config.load import RESOLVED_CONFIG
from mars_jax.errors import ConfigError, DataError
from mars_jax.job import files
from mars_jax.job.directory import RunDirectory

Record = Mapping[str, Any]
"""A JSON object that is only read."""

READ = (
    *(files.PLAN, files.DATA, files.LANES, files.CURVES, files.LAWS, files.SELECTION, files.SWEEP),
    *(files.METRICS, files.SUMMARY, files.EVALUATION, files.ADAPTER_CONFIG),
)
"""Files of phases that a report is made from."""


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run directory. An absent file is an empty mapping or tuple, and its name is in `absent`.

    Attributes:
        directory: the run directory, as passed by the caller.
        config_text: text of `config.resolved.yaml`.
        config: document of `config.resolved.yaml`.
        state: document of `state.json`.
        plan: document of `plan.json`.
        data: document of `data.json`.
        lanes: one record for each probe lane.
        curves: one record for each eval point of each lane.
        laws: document of `laws.json`.
        selection: document of `selection.json`.
        sweep: document of `sweep/runs.json`.
        metrics: one record for each logged step of the final run.
        summary: document of `finetune/summary.json`.
        evaluation: document of `evaluation.json`.
        adapter: document of `adapter/adapter_config.json`.
        read: names of the files that exist.
        absent: names of the files that do not.
        notes: warnings about lines that could not be read.
    """

    directory: Path
    config_text: str
    config: Record
    state: Record
    plan: Record
    data: Record
    lanes: tuple[Record, ...]
    curves: tuple[Record, ...]
    laws: Record
    selection: Record
    sweep: Record
    metrics: tuple[Record, ...]
    summary: Record
    evaluation: Record
    adapter: Record
    read: tuple[str, ...]
    absent: tuple[str, ...]
    notes: tuple[str, ...]


def read_run(directory: Path) -> RunRecord:
    """Reads a run directory.

    Raises:
        ConfigError: the directory does not exist, or has no file of a run.
        DataError: a file is not valid JSON or YAML, or not a mapping.
    """
    advice = "Give the directory that `mars run` wrote (`run_dir` of its config)."
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such run directory. {advice}")
    run, notes = RunDirectory(directory), list[str]()
    run.check_links()
    read: list[str | Path] = [RESOLVED_CONFIG, files.STATE, *READ]
    if not (run / files.SWEEP).is_file():
        read.remove(files.SWEEP)  # only some strategies write it
    names = {str(file): (run / file).is_file() for file in read}
    if not any(names.values()):
        raise ConfigError(f"{directory}: not a run directory: it holds none of {', '.join(names)}. {advice}")
    config_file = run / RESOLVED_CONFIG
    config_text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    return RunRecord(
        directory=directory,
        config_text=config_text,
        config=_config(config_file, config_text),
        state=_document(run, files.STATE),
        plan=_document(run, files.PLAN),
        data=_document(run, files.DATA),
        lanes=tuple(_lane(record) for record in run.lines(files.LANES, notes.append)),
        curves=tuple(run.lines(files.CURVES, notes.append)),
        laws=_document(run, files.LAWS),
        selection=_document(run, files.SELECTION),
        sweep=_document(run, files.SWEEP),
        metrics=tuple(run.lines(files.METRICS, notes.append)),
        summary=_document(run, files.SUMMARY),
        evaluation=_document(run, files.EVALUATION),
        adapter=_document(run, files.ADAPTER_CONFIG),
        read=tuple(name for name, exists in names.items() if exists),
        absent=tuple(name for name, exists in names.items() if not exists),
        notes=tuple(notes),
    )


def _lane(record: Record) -> Record:
    """A record of a lane that names the modules that were trained, which it need not."""
    trained = [module for module, rank in record["ranks"].items() if rank > 0]
    return {**record, "adapted": record.get("adapted") or trained}


def _document(run: RunDirectory, file: Path) -> Record:
    return run.read(file) if (run / file).exists() else {}


def _config(path: Path, text: str) -> Record:
    advice = "`mars run` writes this file; don't edit it."
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}. {advice}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} is no list of settings. {advice}")
    return settings
