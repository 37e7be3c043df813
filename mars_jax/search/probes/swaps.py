"""Module swaps: losses of a lane's best adapters with one module put back to an earlier eval point.

They measure what a lane would lose had a module stopped early. What follows for convergence times is the business of
`laws.convergence.splice`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from mars_jax.lanes.engine import Engine
from mars_jax.lanes.eval_points import ModuleSwaps, Points
from mars_jax.lanes.losses import Adapters, fixed_of
from mars_jax.lanes.result import GroupResult
from mars_jax.lanes.snapshots import Snapshots

Modules = frozenset[str]


class Prefix(NamedTuple):
    """A lane up to one of its eval points.

    Attributes:
        lane: its index in the group.
        groups: module -> the modules that are swapped as one with it, itself among them; together they are all of the
            lane's adapted modules.
        points: its eval points up to where the prefix ends.
    """

    lane: int
    groups: Mapping[str, Sequence[str]]
    points: Points


def swapped(modules: Sequence[str]) -> list[Modules]:
    """The modules that each swap takes from the best eval point: all but one; there are none of a single module."""
    return [frozenset(modules) - {module} for module in modules] if len(modules) > 1 else []


def swap_groups(adapted: Sequence[str], searched: Sequence[str]) -> dict[str, list[str]]:
    """Groups of modules swapped as one: every searched module by itself, and the others with the first of them.

    A module that isn't searched needs no time of its own, and would cost a swap at every eval point. A projector
    finishes the path of the encoder, which a config names first.
    """
    timed = [module for module in adapted if module in searched] or list(adapted[:1])
    rest = [module for module in adapted if module not in timed]
    return {module: [module, *rest] if module == timed[0] else [module] for module in timed}


def what_remains(losses: Mapping[Modules, float]) -> ModuleSwaps:
    """What remained for each module, by itself.

    For two modules the interaction is L(t,T) + L(T,t) - L(t,t) - L(T,T). A Shapley split of what remained would add up
    to it, but half of a module's share would then be what it does among modules that haven't learned yet: with a
    language model that doesn't know the words of the answers, that is large, and not what is left to learn.

    Args:
        losses: modules taken from the best eval point -> loss, nats: of none, of all, and of all but each one.
    """
    every = max(losses, key=len)
    best = losses[every]
    of = {module: losses[every - {module}] - best for module in sorted(every)}
    interaction = math.fsum(of.values()) - (losses[frozenset()] - best)
    return ModuleSwaps(of, interaction, {"+".join(sorted(taken)): loss for taken, loss in losses.items()})


def module_swaps(
    engine: Engine,
    result: GroupResult,
    snapshots: Snapshots,
    prefixes: Sequence[Prefix],
    losses_of: Callable[[Iterable[Adapters]], list[float]],
) -> list[list[ModuleSwaps]]:
    """Measures what remained at every eval point up to the best one, for every prefix.

    A lane that diverged, or whose best eval point is the first, has nothing to split. Forward passes only: a swap for
    each of two or more groups an eval point.

    Args:
        engine: that ran the group.
        result: of the group.
        snapshots: adapters of every lane at every eval point.
        prefixes: what to measure.
        losses_of: `lanes.losses.losses_of` with the validation batches of the eval points; may use up the group's
            state.

    Returns:
        For every prefix and each of its eval points what remained for its groups; empty past the best eval point.
    """
    best = [_best_point(prefix.points) for prefix in prefixes]
    planned = [
        (r, place, taken)
        for r, prefix in enumerate(prefixes)
        for place in range(best[r])
        for taken in swapped(list(prefix.groups))
    ]
    layout, fixed = engine.layout, jax.device_get(result.state.fixed)

    def mixed(r: int, place: int, taken: Modules) -> Adapters:
        lane, groups, points = prefixes[r]
        vector = snapshots.read(points[place].step, lane).copy()
        last = snapshots.read(points[best[r]].step, lane)
        for module in (module for group in taken for module in groups[group]):
            vector[layout.places[module]] = last[layout.places[module]]
        return Adapters(vector, fixed_of(fixed, result.slots[lane]))

    found = losses_of(mixed(*swap) for swap in planned)
    losses = [
        {(place, frozenset[str]()): point.validation_loss for place, point in enumerate(prefix.points)}
        for prefix in prefixes
    ]
    for (r, place, taken), loss in zip(planned, found, strict=True):
        losses[r][place, taken] = loss
    return [_of_prefix(prefix, last, known) for prefix, last, known in zip(prefixes, best, losses, strict=True)]


def count_swaps(prefixes: Sequence[Prefix]) -> int:
    """Swaps whose losses `module_swaps` reads."""
    return sum(_best_point(prefix.points) * len(swapped(list(prefix.groups))) for prefix in prefixes)


def _best_point(points: Points) -> int:
    """The place of the eval point with the lowest loss; 0 for a lane that diverged."""
    losses = [point.validation_loss for point in points]
    return losses.index(min(losses)) if points[-1].alive else 0


def _of_prefix(prefix: Prefix, best: int, losses: Mapping[tuple[int, Modules], float]) -> list[ModuleSwaps]:
    nothing = ModuleSwaps()
    if best == 0:
        return [nothing] * len(prefix.points)
    every = frozenset(prefix.groups)
    found: list[ModuleSwaps] = []
    for place in range(best):
        at_point = {taken: losses[place, taken] for taken in (frozenset[str](), *swapped(list(prefix.groups)))}
        found.append(what_remains({**at_point, every: losses[best, frozenset()]}))
    found.append(what_remains(dict.fromkeys((*at_point, every), losses[best, frozenset()])))
    return found + [nothing] * (len(prefix.points) - len(found))
