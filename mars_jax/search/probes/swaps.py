"""What a lane would lose had a module stopped early: losses of hybrid adapters of its best look and an earlier one.

What follows for convergence times is in `mars_jax.laws.convergence.registry`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mars_jax.lanes.engine import Engine
from mars_jax.lanes.losses import Adapters
from mars_jax.lanes.result import GroupResult, Row
from mars_jax.lanes.snapshots import Snapshots

Modules = frozenset[str]


class Reading(NamedTuple):
    """What is read off a lane.

    Attributes:
        lane: its place in the group.
        parties: module to tell of -> the modules that are switched together, itself among them; with all of
            the lane's adapted modules.
        rows: its looks up to where the reading ends.
    """

    lane: int
    parties: Mapping[str, Sequence[str]]
    rows: Sequence[Row]


class Remaining(NamedTuple):
    """What remained at a look, in nats.

    Attributes:
        of: module -> how far the loss is above the best look's with that module as it was then, and the others at
            the best look.
        interaction: what these add up to beyond what the whole lane was above the best look.
        losses: modules taken from the best look -> loss, so that it can be told in other ways later.
    """

    of: dict[str, float]
    interaction: float
    losses: Mapping[Modules, float]

    def to_json(self) -> dict[str, Any]:
        """Keys of a row of curves.jsonl."""
        hybrids = {"+".join(sorted(some)): loss for some, loss in self.losses.items()}
        return {"remaining": self.of, "interaction": self.interaction, "hybrids": hybrids}


def hybrids(modules: Sequence[str]) -> list[Modules]:
    """The modules that each hybrid takes from the best look: all but one; there are none of a single module."""
    return [frozenset(modules) - {module} for module in modules] if len(modules) > 1 else []


def parties(adapted: Sequence[str], searched: Sequence[str]) -> dict[str, list[str]]:
    """Who is switched together: every searched module by itself, and the others with the first of them.

    A module that isn't searched needs no time of its own, and would cost a hybrid at every look. A projector finishes
    the path of the encoder, which a config names first.
    """
    told = [module for module in adapted if module in searched] or list(adapted[:1])
    rest = [module for module in adapted if module not in told]
    return {module: [module, *rest] if module == told[0] else [module] for module in told}


def what_remains(losses: Mapping[Modules, float]) -> Remaining:
    """What remained for each module, by itself.

    For two modules the interaction is L(t,T) + L(T,t) - L(t,t) - L(T,T). A Shapley split of what remained would add up
    to it, but half of a module's share would then be what it does among modules that haven't learned yet: with a
    language model that doesn't know the words of the answers, that is large, and not what is left to learn.

    Args:
        losses: modules taken from the best look -> loss, nats: of none, of all, and of all but each one.
    """
    every = max(losses, key=len)
    best = losses[every]
    of = {module: losses[every - {module}] - best for module in sorted(every)}
    return Remaining(of, math.fsum(of.values()) - (losses[frozenset()] - best), losses)


def remaining_losses(
    engine: Engine,
    result: GroupResult,
    snapshots: Snapshots,
    readings: Sequence[Reading],
    losses_of: Callable[[Iterable[Adapters]], list[float]],
) -> list[list[Remaining | None]]:
    """Tells what remained at every look up to the best one, for every reading.

    A lane that diverged, or whose best look is the first, has nothing to split. Forward passes only:
    a hybrid for each of two or more parties a look.

    Args:
        engine: that ran the group.
        result: of the group.
        snapshots: adapters of every lane at every look.
        readings: what to read.
        losses_of: `reading.losses_of` with the validation batches of the looks; may use up the group's state.

    Returns:
        For every reading and each of its rows what remained for its parties; None past the best look.
    """
    best = [_best_look(reading.rows) for reading in readings]
    wanted = [
        (r, look, some)
        for r, reading in enumerate(readings)
        for look in range(best[r])
        for some in hybrids(list(reading.parties))
    ]
    layout, scales = engine.layout, jax.device_get(result.state.scales)

    def mixed(r: int, look: int, some: Modules) -> Adapters:
        lane, switched, rows = readings[r]
        vector = snapshots.read(rows[look]["step"], lane).copy()
        last = snapshots.read(rows[best[r]]["step"], lane)
        for module in (module for party in some for module in switched[party]):
            vector[layout.places[module]] = last[layout.places[module]]
        return Adapters(vector, {module: values[result.slots[lane]] for module, values in scales.items()})

    found = losses_of(mixed(*hybrid) for hybrid in wanted)
    losses = [
        {(look, frozenset[str]()): row["validation_loss"] for look, row in enumerate(reading.rows)}
        for reading in readings
    ]
    for (r, look, some), loss in zip(wanted, found, strict=True):
        losses[r][look, some] = loss
    return [_of_reading(reading, last, known) for reading, last, known in zip(readings, best, losses, strict=True)]


def count_hybrids(readings: Sequence[Reading]) -> int:
    """Hybrids whose losses `remaining_losses` reads."""
    return sum(_best_look(reading.rows) * len(hybrids(list(reading.parties))) for reading in readings)


def _best_look(rows: Sequence[Row]) -> int:
    """The place of the look with the lowest loss; 0 for a lane that diverged."""
    losses = [row["validation_loss"] for row in rows]
    return losses.index(min(losses)) if rows[-1]["alive"] else 0


def _of_reading(reading: Reading, best: int, losses: Mapping[tuple[int, Modules], float]) -> list[Remaining | None]:
    rows = reading.rows
    if best == 0:
        return [None] * len(rows)
    every = frozenset(reading.parties)
    found: list[Remaining | None] = []
    for look in range(best):
        of_look = {some: losses[look, some] for some in (frozenset(), *hybrids(list(reading.parties)))}
        found.append(what_remains({**of_look, every: losses[best, frozenset()]}))
    found.append(what_remains(dict.fromkeys((*of_look, every), losses[best, frozenset()])))
    return found + [None] * (len(rows) - len(found))
