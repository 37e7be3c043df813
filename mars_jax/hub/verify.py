"""Verifies an export in PyTorch: all tensors assigned, logits equal to ours and different from the base's.

It needs the `torch` extra and runs on the CPU in float32. PEFT only warns about tensors that it cannot assign, so the
loaded tensors are compared one by one.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.hub.adapter import ADAPTER_WEIGHTS_FILE, PEFT_PREFIX
from mars_jax.hub.read import read_config, read_tensors
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import checkpoint_table
from mars_jax.models.families.tables import CheckpointTable
from mars_jax.runtime.jsonfiles import Document

TOLERANCE = 1e-4
"""Largest allowed difference of two logits, as a share of the largest logit if that is above 1."""


class Greedy(NamedTuple):
    """How greedy answers end: at a number of tokens or an end token, after which padding follows."""

    max_new_tokens: int
    end_tokens: Sequence[int]
    pad_token: int


def verify_adapter(
    adapter_dir: str | Path,
    base_dir: str | Path,
    batch: Mapping[str, np.ndarray],
    our_logits: np.ndarray,
    base_logits: np.ndarray,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Loads base and adapter with transformers and PEFT, and compares tensors and logits with ours.

    Args:
        adapter_dir: from `write_adapter`.
        base_dir: the base checkpoint.
        batch: inputs of the Hugging Face model: input_ids and attention_mask [B, T], and its picture inputs.
        our_logits: our logits with the adapter, float32 [B, T, V]; compared where the attention mask is 1.
        base_logits: our logits without it, float32 [B, T, V].
        tolerance: largest allowed difference of a logit, relative to the largest logit if that is above 1, since
            float32 rounding is relative. The adapter must change a logit by more than `tolerance`.

    Returns:
        `tensors`: number of tensors loaded; the largest absolute differences `logits_difference` (PyTorch and ours,
        with the adapter), `base_difference` (PyTorch and ours, base alone) and `moved` (PyTorch, with and without the
        adapter); `largest_logit` (PyTorch, with the adapter).

    Raises:
        ConfigError: torch or peft is not installed.
        NoValidResultError: a tensor is missing, unexpected or different, the logits differ from ours, or the adapter
            does not change them.
    """
    torch, transformers = _imports()
    from peft import PeftModel, get_peft_model_state_dict

    table = checkpoint_table(read_config(Path(base_dir)))
    base = _load(transformers, torch, table, base_dir)[0]
    theirs_base = _logits(base, batch)
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    # By default, peft queries the hub to find out whether the embeddings changed size.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    loaded = {_hub_name(table, name): tensor.numpy() for name, tensor in state.items()}
    file = Path(adapter_dir) / ADAPTER_WEIGHTS_FILE
    stored = {_hub_name(table, name): tensor for name, tensor in read_tensors(file)}
    missing, unexpected = sorted(set(loaded) - set(stored)), sorted(set(stored) - set(loaded))
    different = [name for name in stored if name in loaded and not np.array_equal(stored[name], loaded[name])]
    if missing or unexpected or different:
        placed = len(stored) - len(unexpected) - len(different)
        raise NoValidResultError(
            f"{adapter_dir}: PEFT placed {placed} of {len(stored)} tensors. Not assigned: {unexpected[:5]}; "
            f"left at their initial values: {missing[:5]}; with other values: {different[:5]}. "
            f"Export the adapter again, with transformers 4.57 or newer installed."
        )
    theirs = _logits(model, batch)
    result = _compare(str(adapter_dir), batch, theirs, theirs_base, our_logits, base_logits, tolerance)
    return {"tensors": len(stored)} | result


def verify_merged(
    merged_dir: str | Path,
    base_dir: str | Path,
    batch: Mapping[str, np.ndarray],
    our_logits: np.ndarray,
    base_logits: np.ndarray,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Loads a merged checkpoint and its base with transformers, and compares logits with ours.

    If the base is stored in float16 or bfloat16, the merged weights are rounded: compute `our_logits` from
    `read_checkpoint(merged_dir, "float32")`, which holds the same rounded weights.

    Args:
        merged_dir: from `write_merged`.
        base_dir, batch, our_logits, base_logits, tolerance: as in `verify_adapter`.

    Returns:
        As `verify_adapter`, without `tensors`.

    Raises:
        ConfigError: torch is not installed.
        NoValidResultError: a tensor is missing or unexpected, the logits differ from ours, or they equal those of the
            base.
    """
    torch, transformers = _imports()
    table = checkpoint_table(read_config(Path(base_dir)))
    theirs_base = _logits(_load(transformers, torch, table, base_dir)[0], batch)
    model, info = _load(transformers, torch, table, merged_dir)
    unassigned = {
        kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    }
    if unassigned:
        raise NoValidResultError(
            f"{merged_dir}: transformers could not assign every tensor: {unassigned}. Merge again from an intact base."
        )
    theirs = _logits(model, batch)
    return _compare(str(merged_dir), batch, theirs, theirs_base, our_logits, base_logits, tolerance)


def torch_answers(
    directory: str | Path,
    adapter_dir: str | Path | None,
    prompts: Sequence[Mapping[str, np.ndarray]],
    greedy: Greedy,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Greedy answers by transformers, in float32 on the CPU.

    Args:
        directory: the checkpoint.
        adapter_dir: an adapter to load on it; None: the checkpoint alone.
        prompts: inputs of the Hugging Face model, one prompt each.
        greedy: how answers end.

    Returns:
        For each prompt the N generated tokens [N], end token included, and the logits that they were chosen by [N, V].

    Raises:
        ConfigError: torch or peft is not installed.
    """
    torch, transformers = _imports()
    from peft import PeftModel

    model = _load(transformers, torch, checkpoint_table(read_config(Path(directory))), directory)[0]
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, str(adapter_dir)).eval()
    config = transformers.GenerationConfig(
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        max_new_tokens=greedy.max_new_tokens,
        eos_token_id=list(greedy.end_tokens),
        pad_token_id=greedy.pad_token,
    )
    answers = []
    for prompt in prompts:
        inputs = _tensors(model, prompt)
        with torch.no_grad():
            found = model.generate(**inputs, generation_config=config)
        tokens = found.sequences[0, prompt["input_ids"].shape[1] :].numpy()
        answers.append((tokens, torch.cat(found.logits).float().numpy()))
    return answers


def _imports() -> tuple[ModuleType, ModuleType]:
    try:
        import peft  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"verify: {error.name} is not installed, and the check loads the export in PyTorch. "
            f"Run `pip install 'mars_jax[torch]'`, or export without --verify."
        ) from error
    return torch, transformers


def _load(
    transformers: ModuleType, torch: ModuleType, table: CheckpointTable[ModelConfig], directory: str | Path
) -> tuple[Any, Document]:
    model, info = getattr(transformers, table.auto_class).from_pretrained(
        str(directory),
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval(), info


def _logits(model: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(**_tensors(model, batch)).logits.float().numpy()


def _tensors(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    forward = (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
    # Only some versions take `mm_token_type_ids`; others find the image tokens by their ids.
    arguments = set(inspect.signature(forward).parameters)
    return {
        name: torch.from_numpy(np.array(value))
        for name, value in batch.items()
        if name in arguments or name != "mm_token_type_ids"
    }


def _hub_name(table: CheckpointTable[ModelConfig], name: str) -> str:
    return table.hub_key(name.removeprefix(PEFT_PREFIX))


def _compare(
    what: str,
    batch: Mapping[str, np.ndarray],
    theirs: np.ndarray,
    theirs_base: np.ndarray,
    ours: np.ndarray,
    ours_base: np.ndarray,
    tolerance: float,
) -> dict[str, float]:
    mask = np.asarray(batch["attention_mask"], bool)

    def difference(left: np.ndarray, right: np.ndarray) -> float:
        return float(np.abs(np.asarray(left)[mask] - np.asarray(right)[mask]).max())

    result = {
        "logits_difference": difference(theirs, ours),
        "base_difference": difference(theirs_base, ours_base),
        "moved": difference(theirs, theirs_base),
        "largest_logit": float(np.abs(np.asarray(theirs)[mask]).max()),
    }
    allowed = tolerance * max(1.0, result["largest_logit"])
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in result.items())
    # The comparisons are negated so that NaN fails too.
    if not result["logits_difference"] <= allowed:
        raise NoValidResultError(
            f"{what}: its logits in PyTorch are not ours: {numbers}, allowed {allowed:.3g}. "
            f"A base_difference as large points at the base or the inputs, otherwise the export is wrong."
        )
    if not result["moved"] > tolerance:
        raise NoValidResultError(
            f"{what}: the adapter does not change the logits: {numbers}, tolerance {tolerance:g}. "
            f"Either nothing was trained, or the tensors were not applied."
        )
    return result
