"""The phases that hand a run's result to other tools: PEFT adapter, merged checkpoint, and the check in PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from mars_jax.adapters.files import read_adapters
from mars_jax.adapters.registry import METHODS
from mars_jax.data.examples import ExampleSource
from mars_jax.data.images import load_rgb
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import plan_shapes
from mars_jax.hub.adapter import write_adapter
from mars_jax.hub.paths import repository, revision
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.verify import verify_adapter, verify_merged
from mars_jax.hub.write import write_merged
from mars_jax.job import files
from mars_jax.job.checks import check_there
from mars_jax.job.job import Job
from mars_jax.job.phase import Inputs, Phase, files_of, sections
from mars_jax.runtime.durable import filling
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.trees import Tree

_RECORDS = 4


def _inputs(job: Job) -> Inputs:
    for file in (files.SUMMARY, files.ADAPTERS):
        check_there(job.directory / file, "finetune")
    job.sources.check()
    made = files_of(job, files.SUMMARY, files.ADAPTERS, files.SELECTION)
    return {**made, "base": job.sources.of_base(), **sections(job.config, "model", "lora", "adapter")}


def _adapter_inputs(job: Job) -> Inputs:
    return {**_inputs(job), **files_of(job, files.DATA)}  # whose prompt the card shows


def _write_adapter(job: Job) -> Document:
    directory = job.directory
    check_there(directory / files.SELECTION, "select")
    selection, summary = directory.read(files.SELECTION), directory.read(files.SUMMARY)
    with filling(directory / files.ADAPTER) as folder:
        write_adapter(
            folder,
            read_adapters(directory / files.ADAPTERS),
            summary["ranks"],
            job.base.model_config,
            base_name=repository(job.config.model.checkpoint),
            base_revision=revision(job.config.model.checkpoint, job.base.checkpoint),
            provenance={
                "prompt": _prompt(job),
                "selection": {name: value for name, value in selection.items() if name != "candidates"},
                "finetune": summary,
                "alpha": asdict(job.base.alpha),
                "versions": directory.book.state()["versions"],
            },
            method=job.base.method,
        )
    return {"adapter": directory / files.ADAPTER}


def _prompt(job: Job) -> str:
    """A prompt for the card; the data are read for it only where no phase has noted one."""
    there = (job.directory / files.DATA).exists()
    noted: str | None = job.directory.read(files.DATA).get("prompt") if there else None
    return job.data.prompt() if noted is None else noted


def _merge(job: Job) -> Document:
    if not EXPORT.applies(job.config):
        job.reporter.notice(
            f"export: PEFT has no format for the adapter method {job.base.method.name}, so only the merged checkpoint "
            "is written"
        )
    adapters = read_adapters(job.directory / files.ADAPTERS)
    with filling(job.directory / files.MERGED) as folder:
        write_merged(folder, job.base.checkpoint, adapters, job.base.method)
    return {"merged": job.directory / files.MERGED}


EXPORT = Phase(
    "export",
    _adapter_inputs,
    (files.ADAPTER,),
    _write_adapter,
    lambda job: {"adapter": job.directory / files.ADAPTER},
    applies=lambda config: METHODS[config.adapter.method].peft() is not None,
)
MERGE = Phase(
    "merge",
    _inputs,
    (files.MERGED,),
    _merge,
    lambda job: {"merged": job.directory / files.MERGED},
    applies=lambda config: config.export.merged or METHODS[config.adapter.method].peft() is None,
)


def verify_export(job: Job, *, merged: bool) -> Document:
    """Loads the export in PyTorch and compares logits on a few test samples.

    Args:
        job: of the run.
        merged: whether to check the merged checkpoint too.

    Raises:
        ConfigError: torch or peft is not installed.
        NoValidResultError: PyTorch sees something else.
    """
    preprocessor, checkpoint = job.data.preprocessor, job.base.checkpoint
    adapters = read_adapters(job.directory / files.ADAPTERS)
    records = job.data.test_records[:_RECORDS]
    source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor).shapes)
    batch = {name: np.stack([source[i][name] for i in range(len(records))]) for name in source[0]}
    inputs = torch_inputs(records, batch, preprocessor)

    def logits(base: Tree, adapted: Tree) -> np.ndarray:
        variables = {"params": base, job.base.method.name: adapted}
        return np.asarray(job.base.model.apply(variables, batch, method="logits"))

    _, base = read_checkpoint(checkpoint, "float32")
    plain = logits(base, {})
    document: Document = {}
    if job.base.method.peft():
        folder = job.directory / files.ADAPTER
        document["adapter"] = verify_adapter(folder, checkpoint, inputs, logits(base, adapters), plain)
    if merged:
        # The stored dtype may round merged weights: both sides start from the file.
        rounded = logits(read_checkpoint(job.directory / files.MERGED, "float32")[1], {})
        document["merged"] = verify_merged(job.directory / files.MERGED, checkpoint, inputs, rounded, plain)
    return document


def torch_inputs(
    records: Sequence[Record], batch: Mapping[str, np.ndarray], preprocessor: Preprocessor
) -> dict[str, np.ndarray]:
    """The same records as inputs of the Hugging Face model."""
    tokens = batch["tokens"]
    lengths = tokens.shape[1] - np.argmax(tokens[:, ::-1] != preprocessor.pad_token_id, axis=1)
    return torch_inputs_of(records, tokens, np.arange(tokens.shape[1])[None, :] < lengths[:, None], preprocessor)


def torch_inputs_of(
    records: Sequence[Record], tokens: np.ndarray, mask: np.ndarray, preprocessor: Preprocessor
) -> dict[str, np.ndarray]:
    """Token ids [B, T] of records, of which the mask keeps some, as inputs of the Hugging Face model."""
    inputs = {"input_ids": tokens.astype(np.int64), "attention_mask": mask.astype(np.int64)}
    if preprocessor.axes > 1:
        # From these transformers works out positions itself, so that ours are checked as well.
        inputs["mm_token_type_ids"] = (tokens == preprocessor.image_token_id).astype(np.int32)
    images = [[load_rgb(path) for path in record.images] for record in records if record.images]
    return inputs | preprocessor.pictures.torch_inputs(images) if images else inputs
