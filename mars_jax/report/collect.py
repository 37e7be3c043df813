"""Reads the files of a run directory into one record: no judgement, no drawing, and an absent file is no error."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mars_jax.errors import ConfigError, DataError
from mars_jax.job.directory import RunDirectory
from mars_jax.runtime.jsonfiles import read_json, read_jsonl

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says. An absent file is an empty mapping or an empty tuple, and its name is in `absent`.

    Attributes:
        directory: the run directory, as the caller named it.
        config_text: `config.resolved.yaml` as written, for the page.
        config, state, plan, data, laws, selection, sweep, summary, evaluation, adapter: the documents.
        lanes: one record a probe lane. curves: one record a lane and look. metrics: one record a logged fine-tune step.
        read, absent: names of the files that were and were not there.
        notes: what had to be left out while reading.
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
        ConfigError: `directory` does not exist, or holds no file of a run.
        DataError: a file is not valid JSON or YAML, or is not the kind of document that its name promises.
    """
    advice = "Give the directory that `mars run` wrote (`run_dir` of its config)."
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such run directory. {advice}")
    run, notes = RunDirectory(directory), list[str]()
    adapter_file = run.adapter / "adapter_config.json"
    documents = (
        run.config_file,
        run.state_file,
        run.plan_file,
        run.data_file,
        run.lanes_file,
        run.curves_file,
        run.laws_file,
        run.selection_file,
        # Not every search has one.
        *([run.sweep_file] if run.sweep_file.is_file() else []),
        run.finetune_metrics_file,
        run.finetune_summary_file,
        run.evaluation_file,
        adapter_file,
    )
    names = {path.relative_to(directory).as_posix(): path.is_file() for path in documents}
    if not any(names.values()):
        raise ConfigError(f"{directory}: not a run directory: it holds none of {', '.join(names)}. {advice}")
    config_text = run.config_file.read_text(encoding="utf-8") if run.config_file.is_file() else ""
    return RunRecord(
        directory=directory,
        config_text=config_text,
        config=_config(run.config_file, config_text),
        state=_document(run.state_file),
        plan=_document(run.plan_file),
        data=_document(run.data_file),
        lanes=tuple(read_jsonl(run.lanes_file, notes.append)),
        curves=tuple(read_jsonl(run.curves_file, notes.append)),
        laws=_document(run.laws_file),
        selection=_document(run.selection_file),
        sweep=_document(run.sweep_file),
        metrics=tuple(read_jsonl(run.finetune_metrics_file, notes.append)),
        summary=_document(run.finetune_summary_file),
        evaluation=_document(run.evaluation_file),
        adapter=_document(adapter_file),
        read=tuple(name for name, there in names.items() if there),
        absent=tuple(name for name, there in names.items() if not there),
        notes=tuple(notes),
    )


def _document(path: Path) -> Record:
    return _mapping(path, read_json(path)) if path.is_file() else {}


def _config(path: Path, text: str) -> Record:
    try:
        return _mapping(path, yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}. `mars run` writes this file; don't edit it.") from error


def _mapping(path: Path, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds a {type(value).__name__} where a mapping of names is expected. "
            "Delete it, and run the command that writes it again."
        )
    return value
