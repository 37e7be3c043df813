"""Compares the tensors of a checkpoint with its configuration, by names, shapes and dtypes in the files' headers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mars_jax.errors import ConfigError
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import checkpoint_table
from mars_jax.models.families.tables import Parameter
from mars_jax.runtime.text import readable

CONFIG_FILE = "config.json"
_DTYPES = ("F16", "BF16", "F32", "F64")
_LISTED = 8

# Ends of names that quantised checkpoints have beside the weights or in their place.
_QUANTISED = {
    "AWQ or GPTQ": re.compile(r".*\.(qweight|qzeros|g_idx)"),
    "bitsandbytes": re.compile(r".*\.(absmax|quant_map|nested_absmax|SCB|quant_state\..*)"),
    "compressed-tensors": re.compile(r".*\.weight_(packed|shape)"),
    "FP8 or INT8": re.compile(r".*\.(weight_scale(_inv|_2)?|weight_zero_point|input_scale)"),
}
_WRAPPED = {
    re.compile(r"base_model\.model\..*|.*\.(lora_[AB]|base_layer)\..*"): (
        "The model was saved with a PEFT adapter inside: merge it with `merge_and_unload()` and save again."
    ),
    re.compile(r"_orig_mod\..*|module\..*"): (
        "The model was saved inside a wrapper (torch.compile, DDP): save the model that it wraps."
    ),
}


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a safetensors file says about a tensor.

    Attributes:
        file: the file.
        name: key of the tensor.
        shape: its shape.
        dtype: its dtype in words of safetensors, such as BF16.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Match:
    """A tensor that is read.

    Attributes:
        header: the tensor.
        parameter: what it is read into; None for a head that must equal the embedding.
        layer: its place in a stacked parameter.
    """

    header: Header
    parameter: Parameter | None
    layer: int = 0


def match_tensors(headers: Iterable[Header], config: ModelConfig, directory: Path) -> tuple[Match, ...]:
    """Finds the parameter of every tensor, in any key layout of the family.

    Args:
        headers: the tensors of a checkpoint.
        config: its configuration.
        directory: its folder, for error messages.

    Raises:
        ConfigError: the tensors do not match the configuration one to one, or are quantised.
    """
    table = checkpoint_table(config)
    targets = {
        key: (parameter, layer) for parameter in table.parameters(config) for layer, key in enumerate(parameter.keys)
    }
    seen: dict[str, Header] = {}
    matches: list[Match] = []
    unexpected: list[Header] = []
    for header in headers:
        key = table.hub_key(header.name)
        if key in seen:
            raise ConfigError(
                f"{header.file}: {header.name!r} and {seen[key].name!r} are the same parameter in two key layouts. "
                f"Keep one of them; a checkpoint holds every parameter once."
            )
        seen[key] = header
        if key in targets:
            matches.append(Match(header, *targets[key]))
        elif key == table.head_key and config.text.tie_word_embeddings:
            matches.append(Match(header, None))
        elif not table.unused(key, config):
            unexpected.append(header)
    _refuse_quantised(directory, matches, unexpected)
    missing = [key for key in targets if key not in seen]
    if missing or unexpected:
        names = [header.name for header in unexpected]
        raise ConfigError(
            f"{directory}: the tensors do not fit {CONFIG_FILE}. Missing {len(missing)}: {listing(missing)}. "
            f"Not part of the model {len(names)}: {listing(names)}. {_advice(missing, names, table.head_key)} "
            f"Known layouts start with {table.layouts}; use a checkpoint of the model that {CONFIG_FILE} describes."
        )
    _check_shapes(directory, matches)
    return tuple(matches)


def _refuse_quantised(directory: Path, matches: Sequence[Match], unexpected: Sequence[Header]) -> None:
    signs: Mapping[str, str] = {
        header.name: method
        for header in unexpected
        for method, expression in _QUANTISED.items()
        if expression.fullmatch(header.name)
    }
    dtypes = {match.header.name: match.header.dtype for match in matches if match.header.dtype not in _DTYPES}
    for name, sign in [*signs.items(), *((name, f"stored as {dtype}") for name, dtype in dtypes.items())]:
        raise ConfigError(
            f"{directory}: the weights are quantised ({sign}: {listing([name])}), which is not read. Take the "
            f"checkpoint that they were quantised from; {', '.join(_DTYPES[:-1])} and {_DTYPES[-1]} are read."
        )


def _check_shapes(directory: Path, matches: Sequence[Match]) -> None:
    wrong = [match for match in matches if match.parameter and match.header.shape != match.parameter.stored_shape]
    if wrong:
        header, parameter = wrong[0].header, wrong[0].parameter
        stored, path = (parameter.stored_shape, parameter.path) if parameter else ((), "")
        more = f" {len(wrong) - 1} more have another shape." if len(wrong) > 1 else ""
        raise ConfigError(
            f"{header.file}: {header.name!r} has shape {list(header.shape)}, but {directory / CONFIG_FILE} asks for "
            f"{list(stored)} ({path}).{more} The two belong to different models; fetch both again."
        )


def _advice(missing: Sequence[str], unexpected: Sequence[str], head_key: str) -> str:
    """What is likely to have happened to a checkpoint with other names."""
    for expression, advice in _WRAPPED.items():
        if any(expression.fullmatch(name) for name in unexpected):
            return advice
    if list(missing) == [head_key]:
        return f"If the embedding is also the head, set tie_word_embeddings to true in {CONFIG_FILE}."
    return "The files are incomplete or of another model."


def listing(names: Sequence[str]) -> str:
    """The first of some names, which may be any text."""
    listed = ", ".join(readable(name, 120) for name in names[:_LISTED])
    return f"{listed or 'none'}{', ...' if len(names) > _LISTED else ''}"
