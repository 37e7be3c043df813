"""Whether PyTorch, asked as an inference engine asks, gives the answers that we give: `mars export --verify`.

The prompts of a few test samples are rendered by the template with its generation prompt, answered greedily by
transformers with the exported adapter (or merged checkpoint), and compared with ours token by token. Where the
likeliest tokens differ but their logits do not, within the tolerance of the logits' own comparison, neither answer is
wrong: it is a tie, and what follows it is not compared.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from mars_jax.adapters.files import read_adapters
from mars_jax.data.chat_template import Message
from mars_jax.data.examples import Example, ExampleSource
from mars_jax.data.preprocessor import Preprocessor
from mars_jax.data.records import Record
from mars_jax.data.shapes import plan_shapes
from mars_jax.data.template import prompt_messages
from mars_jax.data.tokenizer import load_tokenizer
from mars_jax.errors import NoValidResultError
from mars_jax.evals.generation import generate
from mars_jax.hub.end_tokens import load_end_tokens
from mars_jax.hub.read import read_checkpoint
from mars_jax.hub.verify import TOLERANCE, Greedy, torch_answers
from mars_jax.job import files
from mars_jax.job.export import torch_inputs_of
from mars_jax.job.job import Job
from mars_jax.runtime.jsonfiles import Document
from mars_jax.runtime.trees import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS, _MAX_NEW_TOKENS = 4, 16


def verify_answers(job: Job, *, merged: bool) -> Document:
    """Compares answers of the export in PyTorch with ours.

    Args:
        job: of the run.
        merged: whether to check the merged checkpoint too.

    Returns:
        For the adapter and the merged checkpoint: `samples`, the number of samples compared, `tokens`, the number of
        equal tokens, and `ties`, the samples whose answers differ from a tie on.

    Raises:
        ConfigError: torch or peft is not installed.
        NoValidResultError: a prompt or an answer differs.
    """
    preprocessor, base = job.data.preprocessor, job.base.checkpoint
    records = job.data.test_records[:_RECORDS]
    source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor).shapes)
    prompts = [source.prompt(number) for number in range(len(records))]
    most, ends = job.config.evaluate.max_new_tokens or _MAX_NEW_TOKENS, load_end_tokens(base, preprocessor.tokenizer)
    greedy, decode = Greedy(most, ends, preprocessor.pad_token_id), preprocessor.tokenizer.decode
    # Name in the document -> (the checkpoint that is asked, the adapter in PEFT's format, ours).
    asked: dict[str, tuple[Path, Path | None, Tree]] = {}
    if job.base.method.peft():
        adapters = {job.base.method.name: read_adapters(job.directory / files.ADAPTERS)}
        asked["adapter"] = base, job.directory / files.ADAPTER, adapters
    if merged:
        asked["merged"] = job.directory / files.MERGED, None, {}
    document: Document = {}
    for name, (checkpoint, adapter, tree) in asked.items():
        ours = _our_answers(job, checkpoint, tree, prompts, greedy)
        inputs = torch_prompts(records, prompts, checkpoint, preprocessor)
        theirs = torch_answers(checkpoint, adapter, inputs, greedy)
        document[name] = compare_answers(adapter or checkpoint, records, ours, theirs, decode)
    return document


def _our_answers(job: Job, checkpoint: Path, adapters: Tree, prompts: Sequence[Example], greedy: Greedy) -> np.ndarray:
    base = read_checkpoint(checkpoint, "float32")[1]
    batch = {name: np.stack([prompt[name] for prompt in prompts]) for name in prompts[0]}
    run = partial(
        generate,
        job.base.model,
        max_new_tokens=greedy.max_new_tokens,
        end_tokens=greedy.end_tokens,
        pad_token=greedy.pad_token,
    )
    return np.asarray(jax.jit(run)(base, adapters, batch))


def torch_prompts(
    records: Sequence[Record], prompts: Sequence[Example], checkpoint: Path, preprocessor: Preprocessor
) -> list[dict[str, np.ndarray]]:
    """The prompts as PyTorch's inputs.

    Args:
        records: the samples.
        prompts: theirs, of `ExampleSource.prompt`.
        checkpoint: whose tokenizer and chat template inference engines would ask with.
        preprocessor: of the run.

    Raises:
        NoValidResultError: the checkpoint's template gives another prompt.
    """
    image, tokenizer, found = preprocessor.image_token_id, load_tokenizer(checkpoint), []
    for record, prompt in zip(records, prompts, strict=True):
        ours = prompt["tokens"][: int(prompt["target_positions"][0]) + 1]
        ids = served_prompt(tokenizer, prompt_messages(record, preprocessor.chat))
        # The processor repeats the token of a picture; how often is checked with the logits.
        once = _once(ours, image)
        if ids != once:
            raise NoValidResultError(_other_prompt(record, ids, once, checkpoint, preprocessor))
        found.append(torch_inputs_of([record], ours[None], np.ones((1, len(ours)), bool), preprocessor))
    return found


def served_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of messages as inference engines ask: by transformers' rendering, with the generation prompt.

    Args:
        tokenizer: of the checkpoint.
        messages: the turns before an answer.

    Returns:
        The ids; each picture is one token.
    """
    text = str(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    )
    begin = tokenizer.bos_token
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=not (begin and text.startswith(begin)))]
    # Some tokenizers end every text, which no engine does with a prompt.
    ends = ids[-1:] == [tokenizer.eos_token_id] and not text.rstrip().endswith(str(tokenizer.eos_token))
    return ids[:-1] if ends else ids


def _once(tokens: np.ndarray, image: int) -> list[int]:
    """Token ids with each run of image tokens as one."""
    repeated = np.r_[False, (tokens[1:] == image) & (tokens[:-1] == image)]
    return [int(token) for token in tokens[~repeated]]


def _other_prompt(
    record: Record, ids: Sequence[int], ours: Sequence[int], checkpoint: Path, preprocessor: Preprocessor
) -> str:
    place = next((k for k, (a, b) in enumerate(zip(ids, ours, strict=False)) if a != b), min(len(ids), len(ours)))

    def token(tokens: Sequence[int]) -> str:
        if place == len(tokens):
            return "ends"
        return f"has {preprocessor.tokenizer.convert_ids_to_tokens(tokens[place])!r} ({tokens[place]})"

    return (
        f"{record}: the prompt that the chat template of {checkpoint} gives is not the one that was trained. At token "
        f"{place} of {len(ids)} the template's {token(ids)}, the trained one {token(ours)}. Inference engines would "
        "ask another question than was trained: take a chat template whose generation prompt stands before answers."
    )


def compare_answers(
    folder: Path,
    records: Sequence[Record],
    ours: np.ndarray,
    theirs: Sequence[tuple[np.ndarray, np.ndarray]],
    decode: Callable[[np.ndarray], object],
) -> Document:
    """Compares answers token by token.

    Args:
        folder: of the export, for messages.
        records: the samples.
        ours: their answers, int32 [B, N].
        theirs: those of `torch_answers`.
        decode: text of tokens, for messages.

    Returns:
        See `verify_answers`.

    Raises:
        NoValidResultError: two answers differ by more than a tie.
    """
    equal, ties = 0, []
    for record, mine, (tokens, logits) in zip(records, ours, theirs, strict=True):
        different = np.flatnonzero(mine[: len(tokens)] != tokens)
        place = int(different[0]) if len(different) else len(tokens)
        equal += place
        if not len(different):
            continue
        row = logits[place]
        gap, allowed = float(row.max() - row[mine[place]]), TOLERANCE * max(1.0, float(np.abs(row).max()))
        if not gap <= allowed:
            raise NoValidResultError(
                f"{folder}: {record}: PyTorch answers {decode(tokens)!r}, we answer {decode(mine[: len(tokens)])!r}. "
                f"They differ at token {place}, where PyTorch's logit of our token is {gap:.3g} below its largest "
                f"(up to {allowed:.3g} is a tie). The export, or one of the two generations, is wrong."
            )
        ties.append(record.id)
    return {"samples": len(records), "tokens": equal, "ties": ties}
