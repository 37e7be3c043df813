"""Which linears of a model take adapters, and which ranks they allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mars_jax.adapters.patterns import compile_pattern
from mars_jax.errors import ConfigError
from mars_jax.runtime.text import short
from mars_jax.runtime.trees import flatten

if TYPE_CHECKING:
    from mars_jax.adapters.method import AdapterMethod

_COMPARED = 200  # characters of a pattern that are compared to find the nearest linears


@dataclass(frozen=True, slots=True)
class Target:
    """A linear that takes an adapter: its module, and its shape [num_layers?, d_in, d_out]."""

    module: str
    num_layers: int | None
    d_in: int
    d_out: int


Targets = dict[str, Target]


def find_targets(
    params: Mapping[str, Any], patterns: Mapping[str, Sequence[str]], weight_name: str | None = "kernel"
) -> Targets:
    """Resolves target patterns to full paths.

    Args:
        params: the parameter tree; arrays or `ShapeDtypeStruct`s.
        patterns: module -> regular expressions, each of which must match whole paths such as
            "llm/layers/self_attn/q_proj".
        weight_name: name of the weight leaf under a linear's path; None where the leaf itself is the weight.

    Returns:
        Path -> `Target`, in the order of the tree.

    Raises:
        ConfigError: a pattern that `compile_pattern` refuses or that matches nothing, or a path that two modules claim.
    """
    linears = {}
    for path, leaf in flatten(params).items():
        stem, _, name = path.rpartition("/")
        if leaf.ndim in (2, 3) and weight_name in (None, name):
            linears[path if weight_name is None else stem] = leaf.shape
    targets: Targets = {}
    for module, expressions in patterns.items():
        for expression in expressions:
            try:
                pattern = compile_pattern(expression)
            except ValueError as error:
                raise ConfigError(
                    f"lora: pattern {short(expression)} of module {module!r} {error}. "
                    f"Write one that matches whole paths, such as 'llm/layers/self_attn/(q|v)_proj'."
                ) from None
            hits = [path for path in linears if pattern.fullmatch(path)]
            if not hits:
                near = get_close_matches(expression[:_COMPARED], linears, n=3, cutoff=0.0)
                raise ConfigError(
                    f"lora: pattern {short(expression)} of module {module!r} matches none of the {len(linears)} "
                    f"linears. A pattern must match a whole path; nearest: {', '.join(near)}."
                )
            for path in hits:
                if path in targets and targets[path].module != module:
                    raise ConfigError(
                        f"lora: {path!r} is claimed by the modules {targets[path].module!r} and {module!r}. "
                        f"Make their patterns disjoint."
                    )
                *layers, d_in, d_out = linears[path]
                targets[path] = Target(module, layers[0] if layers else None, d_in, d_out)
    return {path: targets[path] for path in linears if path in targets}


def check_ranks(targets: Targets, ranks: Mapping[str, int], method: "AdapterMethod") -> None:
    """Refuses ranks that mean nothing.

    Raises:
        ConfigError: a module without targets or a target without a rank, a negative rank, a rank beyond a linear's
            width, a rank above 1 for a method that has none, or ranks that leave nothing to train.
    """
    modules = {target.module for target in targets.values()}
    if set(ranks) != modules:
        raise ConfigError(
            f"lora: ranks name the modules {sorted(ranks)}; the targets have {sorted(modules)}. "
            f"Give each of them one rank, 0 to freeze it."
        )
    if not any(ranks.values()):
        raise ConfigError(f"lora: every rank is 0 ({dict(ranks)}), so nothing would train. Give one module a rank > 0.")
    for module, rank in ranks.items():
        if rank < 0:
            raise ConfigError(f"lora: rank {rank} of module {module!r} is negative. Use 0 to freeze the module.")
        if rank > 1 and not method.has_ranks:
            raise ConfigError(
                f"lora: rank {rank} of module {module!r} means nothing to the adapter method {method.name!r}, which "
                f"has no ranks. Set lora.modules.{module}.ranks to [1] to train the module, or to [0] to freeze it."
            )
        path, width = min(
            ((path, min(t.d_in, t.d_out)) for path, t in targets.items() if t.module == module),
            key=lambda pair: pair[1],
        )
        if rank > width:
            raise ConfigError(
                f"lora: rank {rank} of module {module!r} is beyond the width {width} of {path!r}. "
                f"Allowed: 0 to {width}; or leave that linear out of the targets."
            )


def count_parameters(targets: Targets, ranks: Mapping[str, int], method: "AdapterMethod") -> int:
    """Numbers that train with these ranks."""
    return sum(method.parameters(target, ranks[target.module]) for target in targets.values())


def parameters_per_rank(targets: Targets, method: "AdapterMethod") -> dict[str, int]:
    """Numbers that train for each unit of rank, by module; for a method without ranks, in a module that trains."""
    totals: dict[str, int] = {}
    for target in targets.values():
        totals[target.module] = totals.get(target.module, 0) + method.parameters(target, 1)
    return totals
