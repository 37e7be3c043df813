"""Shows that PyTorch sees what we see: a run's export loaded with transformers and PEFT, on a few test records.

The comparison itself is `hub.verify`; here its inputs are made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mars_jax.data.examples import ExampleSource
from mars_jax.data.images import load_rgb
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import plan_shapes
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.verify import verify_adapter, verify_merged
from mars_jax.job.directory import RunDirectory
from mars_jax.job.workspace import Workspace

_RECORDS = 4


def verify_run(workspace: Workspace, adapters: Any, directory: RunDirectory, merged: bool) -> dict[str, Any]:
    """Loads the export in PyTorch and compares logits on a few test samples."""
    records = workspace.test_records[:_RECORDS]
    source = ExampleSource(records, workspace.preprocessor, plan_shapes(records, workspace.preprocessor, 2**31).shapes)
    batch = {name: np.stack([source[i][name] for i in range(len(records))]) for name in source[0]}
    inputs = torch_inputs(records, batch, workspace.preprocessor)
    checkpoint = workspace.checkpoint

    def logits(base: Any, lora_tree: Any) -> np.ndarray:
        variables = {"params": base, "lora": lora_tree}
        return np.asarray(workspace.model.apply(variables, batch, method="logits"))

    _, base = read_checkpoint(checkpoint, "float32")
    ours, plain = logits(base, adapters), logits(base, {})
    document: dict[str, Any] = {"adapter": verify_adapter(directory.adapter, checkpoint, inputs, ours, plain)}
    if merged:
        # The stored dtype may round merged weights: both sides start from the file.
        rounded = logits(read_checkpoint(directory.merged, "float32")[1], {})
        document["merged"] = verify_merged(directory.merged, checkpoint, inputs, rounded, plain)
    return document


def torch_inputs(
    records: Sequence[Record], batch: Mapping[str, np.ndarray], preprocessor: Preprocessor
) -> dict[str, np.ndarray]:
    """The same records as inputs of the Hugging Face model."""
    tokens = batch["tokens"]
    lengths = tokens.shape[1] - np.argmax(tokens[:, ::-1] != preprocessor.tokenizer.pad_token_id, axis=1)
    inputs = {
        "input_ids": tokens.astype(np.int64),
        "attention_mask": (np.arange(tokens.shape[1])[None, :] < lengths[:, None]).astype(np.int64),
    }
    if preprocessor.axes > 1:
        # From these transformers works out positions itself, so that ours are checked as well.
        inputs["mm_token_type_ids"] = (tokens == preprocessor.image_token_id).astype(np.int32)
    images = [[load_rgb(path) for path in record.images] for record in records if record.images]
    return inputs | preprocessor.pictures.torch_inputs(images) if images else inputs
