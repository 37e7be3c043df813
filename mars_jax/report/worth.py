"""What training a module is worth: the best final run with it beside the best one in which it stays frozen."""

import math
from collections.abc import Sequence

from mars_jax.lanes.race import paired_error
from mars_jax.report.collect import Record, RunRecord
from mars_jax.report.words import count, number
from mars_jax.runtime.jsonfiles import Document

_NORMAL_95 = 1.96


def worth_of_modules(run: RunRecord) -> list[Document]:
    """For each module that some of the begun final runs left frozen: what it is worth to train it.

    Both runs are read at the last step that a run with the module frozen came to.

    Returns:
        Keys: `module`; `worth`, the fall in validation loss in nats a token; `interval`, its 95 % interval over the
        validation samples, null where their losses were not kept; `step`; `parameters` of the module in the run that
        trains it.
    """
    begun = [one for one in run.sweep.get("runs") or [] if one["looks"]]
    modules = list(begun[0]["ranks"]) if begun else []
    found = []
    for module in modules:
        frozen = [one for one in begun if not one["ranks"][module]]
        trained = [one for one in begun if one["ranks"][module]]
        if not frozen or not trained:
            continue
        step = max(one["looks"][-1][0] for one in frozen)
        without, with_it = (_lowest_at(some, step) for some in (frozen, trained))
        if without is None or with_it is None:
            continue
        losses = [_loss_at(one, step) for one in (without, with_it)]
        samples = [_samples_at(one, step) for one in (without, with_it)]
        error = paired_error(*samples) if all(samples) else None
        worth = losses[0] - losses[1]
        found.append(
            {
                "module": module,
                "worth": worth,
                "interval": None if error is None else [worth - _NORMAL_95 * error, worth + _NORMAL_95 * error],
                "step": step,
                "parameters": (with_it.get("parameters") or {}).get(module),
            }
        )
    return found


def worth_sentence(one: Document) -> str:
    """An entry of `worth_of_modules` in words."""
    interval = one["interval"]
    between = f" ({number(interval[0])} to {number(interval[1])})" if interval else ""
    cost = f", for {count(one['parameters'])} parameters" if one["parameters"] is not None else ""
    what = f"Training {one['module']} is worth {number(one['worth'])} nats a token{between}{cost}"
    unsure = interval is not None and interval[0] <= 0.0
    return f"{what}, at step {count(one['step'])}{'; it may as well stay frozen' if unsure else ''}."


def _loss_at(one: Record, step: int) -> float:
    losses = [loss for at, loss in one["looks"] if at == step]
    return math.inf if not losses or losses[0] is None else float(losses[0])


def _lowest_at(some: Sequence[Record], step: int) -> Record | None:
    """The run with the lowest loss at a step; None where none came so far."""
    best = min(some, key=lambda one: _loss_at(one, step))
    return best if math.isfinite(_loss_at(best, step)) else None


def _samples_at(one: Record, step: int) -> Sequence[float]:
    kept = one.get("sample_losses") or []
    return next((samples for (at, _), samples in zip(one["looks"], kept, strict=False) if at == step), ())
