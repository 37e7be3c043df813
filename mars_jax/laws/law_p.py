"""Law-P: validation loss from the ranks and the number of samples. Data class, prediction, fit and choice of form.

    power:          p(r, D) = A / (prod_m r_m**alpha_m * D**beta) + E     (Cho et al., arXiv 2603.00720, "Law-P")
    power_overfit:  the same + C * prod_m r_m**kappa_m * D**eta

p is a validation loss in nats a token. Residuals are relative to it, as the noise of lanes is; otherwise lanes of few
samples, whose losses are still high, would dominate the fit. With alpha >= 0 the first form always prefers the largest
ranks; the second can have an optimum inside the grid. `choose_form` decides between them. Runs are resampled in
`laws.resamples`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.laws.least_squares import device_column, in_blocks, pad_rows
from mars_jax.laws.records import Document
from mars_jax.laws.resamples import RunResamples, percentile_intervals
from mars_jax.laws.variable_projection import Fitted, Form, Points, exponent_bounds, fit_rows, linearised, sobol_starts

_RANK_UNIT, _SAMPLE_UNIT = 16.0, 1024.0
_STARTS_OF_RESAMPLES = 63
# (starts that are polished, iterations of each). A resample starts at the fit of all points, near its own optimum; but
# extrapolations of the over-fitting form depend on exponents that hardly change its cost, so it takes more iterations.
_POLISH: dict[Form, tuple[int, int]] = {"power": (4, 60), "power_overfit": (8, 120)}
_POLISH_OF_RESAMPLES: dict[Form, tuple[int, int]] = {"power": (2, 20), "power_overfit": (4, 80)}
# A relative error that no loss has, which makes Huber's loss plain least squares.
_NO_THRESHOLD = 1e6
# Largest held-out error of the over-fitting form, as a share of the power form's, at which it is chosen.
_ERROR_RATIO = 0.9


class Overfit(NamedTuple):
    """The over-fitting term C * prod_m r_m**kappa_m * D**eta, C in nats."""

    C: float
    kappa: Mapping[str, float]
    eta: float


@dataclass(frozen=True)
class PerformanceLaw:
    """A fitted Law-P in raw units: ranks, D in samples, losses in nats a token.

    Attributes:
        form: `power` or `power_overfit`.
        A: amplitude, >= 0.
        alpha: exponent of each module's rank, >= 0.
        beta: exponent of the number of samples, >= 0.
        E: floor in nats, >= 0.
        overfit: the over-fitting term; None in the power form.
        ci: 95 % bootstrap interval of each parameter, by name (`parameter_names`).
        held_out_error: root mean square error, in nats, at the largest D after a fit without it; None when the smaller
            D do not determine the law.
        order_tau: Kendall tau between the predicted and measured order of the ranks at that D; None without
            `held_out_error`, or with one rank vector there.
        draws: [S, n] bootstrap draws, columns as `parameter_names`.
    """

    form: Form
    A: float
    alpha: Mapping[str, float]
    beta: float
    E: float
    overfit: Overfit | None
    ci: Mapping[str, tuple[float, float]]
    held_out_error: float | None
    order_tau: float | None
    draws: np.ndarray = field(compare=False, repr=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules whose ranks the law depends on."""
        return tuple(self.alpha)

    def loss(self, ranks: Sequence[Mapping[str, int]], num_samples: float) -> np.ndarray:
        """Predicted losses in nats, [Q], of Q rank vectors at D = `num_samples`."""
        columns = [self.A, self.E, self.beta, *self.alpha.values()]
        if self.overfit is not None:
            columns += [self.overfit.C, self.overfit.eta, *self.overfit.kappa.values()]
        return _predict(np.asarray([columns]), self._log_ranks(ranks), math.log(num_samples))[0]

    def loss_draws(self, ranks: Sequence[Mapping[str, int]], num_samples: float) -> np.ndarray:
        """`loss` of every bootstrap draw, [S, Q]."""
        return _predict(self.draws, self._log_ranks(ranks), math.log(num_samples))

    def _log_ranks(self, ranks: Sequence[Mapping[str, int]]) -> np.ndarray:
        return np.log(np.asarray([[vector[module] for module in self.modules] for vector in ranks], np.float64))

    def to_json(self) -> Document:
        """The entry `performance` of laws.json, without the draws, which have their own key."""
        return {
            "form": self.form,
            "A": self.A,
            "alpha": dict(self.alpha),
            "beta": self.beta,
            "E": self.E,
            "overfit": None if self.overfit is None else self.overfit._asdict(),
            "ci": {name: list(interval) for name, interval in self.ci.items()},
            "held_out_error": self.held_out_error,
            "order_tau": self.order_tau,
        }

    @classmethod
    def from_json(cls, entry: Document, draws: np.ndarray) -> "PerformanceLaw":
        """The inverse of `to_json`, with the draws [S, n]."""
        fields = dict(entry)
        fields["overfit"] = None if entry["overfit"] is None else Overfit(**entry["overfit"])
        fields["ci"] = {name: (float(low), float(high)) for name, (low, high) in entry["ci"].items()}
        return cls(**fields, draws=draws)


def parameter_names(form: Form, modules: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters: the columns of the draws, and the keys of `ci`."""
    names = ("A", "E", "beta", *(f"alpha/{module}" for module in modules))
    return names if form == "power" else (*names, "C", "eta", *(f"kappa/{module}" for module in modules))


def _predict(parameters: np.ndarray, log_ranks: np.ndarray, log_samples: np.ndarray | float) -> np.ndarray:
    """[S, n] raw parameters, [Q, M] log ranks -> [S, Q]."""
    modules = log_ranks.shape[1]
    A, E, beta = parameters[:, :3, None].transpose(1, 0, 2)
    alpha = parameters[:, 3 : 3 + modules]
    loss = A * np.exp(-(alpha @ log_ranks.T) - beta * log_samples) + E
    if parameters.shape[1] > 3 + modules:
        C, eta = parameters[:, 3 + modules : 5 + modules, None].transpose(1, 0, 2)
        loss = loss + C * np.exp(parameters[:, 5 + modules :] @ log_ranks.T + eta * log_samples)
    return loss


def fit_performance_law(
    form: Form,
    ranks: Mapping[str, ArrayLike],
    num_samples: ArrayLike,
    losses: ArrayLike,
    *,
    resamples: RunResamples | None = None,
    huber: float | None = None,
) -> PerformanceLaw:
    """Fits one form by variable projection, and tests it at the largest D after a fit without it.

    Minimises the squares of the relative errors, or their Huber loss (Huber 1964), which limits the influence of
    outlying lanes. For fixed exponents the law is linear in A, E (and C), all >= 0, and its least squares have a closed
    form. A Sobol set over the exponents (alpha in [0, 1.5], beta in [0, 2], kappa in [0, 2], eta in [-1, 3]) gives the
    starts; the best of them are polished over all parameters by Levenberg-Marquardt (Golub and Pereyra 1973).

    Args:
        form: `power` or `power_overfit`.
        ranks: module -> [N] ranks, >= 1, any number of modules.
        num_samples: [N] samples D.
        losses: [N] lowest validation losses in nats a token.
        resamples: bootstrap resamples of the N points; None: no intervals.
        huber: relative error, above 0, beyond which the Huber loss is linear; None: least squares.

    Returns:
        The law.

    Raises:
        ConfigError: `huber` is not above 0.
        NoValidResultError: the points do not determine the parameters, or the runs not the intervals; the message names
            what to add.
    """
    if huber is not None and not huber > 0:
        raise ConfigError(f"huber is {huber}; allowed: a relative error above 0, such as 0.02, or None.")
    modules = tuple(ranks)
    rank = np.stack([np.asarray(ranks[module], np.float64) for module in modules], axis=1)
    samples, loss = np.asarray(num_samples, np.float64), np.asarray(losses, np.float64)
    _check_design(form, modules, rank, samples)
    log_rank, log_samples = np.log(rank / _RANK_UNIT), np.log(samples / _SAMPLE_UNIT)

    # Rows: all points, and all but those of the largest D.
    held_out = samples == samples.max()
    can_hold_out = _number_of_cells(rank[~held_out], samples[~held_out]) >= len(parameter_names(form, modules))
    can_hold_out &= len(np.unique(samples[~held_out])) > 1
    fitted_to = np.stack([np.ones_like(held_out), ~held_out if can_hold_out else np.ones_like(held_out)])
    # Below half of the median loss the noise is no longer relative, and one such lane must not outweigh the rest.
    scale = np.maximum(loss, 0.5 * np.median(loss) + 1e-12)
    points = Points(*(device_column(column) for column in (log_rank, log_samples, 1.0 / scale)))
    threshold = jnp.float32(_NO_THRESHOLD if huber is None else huber)
    starts = sobol_starts(*exponent_bounds(form, len(modules)))

    def fit(polish: tuple[int, int], starts: np.ndarray, losses: jax.Array, weights: jax.Array) -> Fitted:
        return fit_rows(form == "power_overfit", polish, jnp.asarray(starts), points, threshold, losses, weights)

    all_losses = np.stack([loss, loss])
    fitted, costs = fit(_POLISH[form], starts, jnp.asarray(pad_rows(all_losses)), jnp.asarray(pad_rows(fitted_to)))
    scaled = np.asarray(fitted, np.float64)
    if resamples is not None:
        predicted, jacobian = linearised(form, scaled[0], log_rank, log_samples)
        errors = resamples.errors((loss - predicted) / scale, jacobian / scale[:, None])
        if errors is None:
            raise NoValidResultError(
                f"Law-P ({form}): {resamples.number} runs are too few to know how much runs differ, so its "
                "exponents have no interval. Add lanes that adapt every module, at other ranks or with other seeds."
            )
        # Most resamples have their optimum near the fit of all points, the rest near its next best starts.
        near = starts[np.argsort(costs[0])[:_STARTS_OF_RESAMPLES]]
        near = np.concatenate([scaled[:1, : starts.shape[1]], near]).astype(np.float32)
        moved = predicted + scale * errors
        refit = partial(fit, _POLISH_OF_RESAMPLES[form], near)
        draws = in_blocks(lambda *rows: refit(*rows)[0], moved, np.ones_like(moved))
        scaled = np.concatenate([scaled, draws])
    parameters = _raw_units(scaled, len(modules))

    error, tau = None, None
    if can_hold_out:
        predicted = _predict(parameters[1:2], np.log(rank[held_out]), np.log(samples.max()))[0]
        error = float(np.sqrt(np.mean((predicted - loss[held_out]) ** 2)))
        tau = _order_tau(rank[held_out], predicted, loss[held_out])
    A, E, beta, *rest = map(float, parameters[0])
    alpha, extra = dict(zip(modules, rest, strict=False)), rest[len(modules) :]
    overfit = Overfit(extra[0], dict(zip(modules, extra[2:], strict=True)), extra[1]) if extra else None
    draws = parameters[2:]
    ci = percentile_intervals(parameter_names(form, modules), draws)
    return PerformanceLaw(form, A, alpha, beta, E, overfit, ci, error, tau, draws)


def choose_form(power: PerformanceLaw, overfit: PerformanceLaw | None) -> PerformanceLaw:
    """The form to select ranks with: the power form, unless the over-fitting form predicts clearly better.

    It does when, fitted without the largest D, its error there is at most nine tenths of the power form's, and it
    orders the ranks there at least as well (Kendall tau). Where the two are about equal, the form with fewer parameters
    is safer: chosen for an error smaller by 3 %, the over-fitting form has ranked the worst ranks of a grid first
    (docs/evidence.md). So it is only chosen when the lanes reach a D at which over-fitting appears.
    """
    if overfit is None or overfit.held_out_error is None or power.held_out_error is None:
        return power
    if power.order_tau is not None and overfit.order_tau is not None and overfit.order_tau < power.order_tau:
        return power
    return overfit if overfit.held_out_error <= _ERROR_RATIO * power.held_out_error else power


def can_fit(form: Form, ranks: Mapping[str, ArrayLike], num_samples: ArrayLike) -> bool:
    """Whether the D below the largest have more (ranks, D) cells than the form has parameters."""
    samples = np.asarray(num_samples)
    rank = np.stack([np.asarray(column) for column in ranks.values()], axis=1)
    smaller = samples < samples.max()
    return _number_of_cells(rank[smaller], samples[smaller]) > len(parameter_names(form, tuple(ranks)))


def _check_design(form: Form, modules: tuple[str, ...], rank: np.ndarray, samples: np.ndarray) -> None:
    for module, column in zip(modules, rank.T, strict=True):
        if len(np.unique(column)) < 2:
            raise NoValidResultError(
                f"Law-P: all {len(column)} lanes that adapt every module have rank {column[0]:g} in module {module!r}, "
                f"so its exponent alpha cannot be fitted. Add such lanes with at least one other rank of {module!r}."
            )
    if len(np.unique(samples)) < 2:
        raise NoValidResultError(
            f"Law-P: all {len(samples)} lanes that adapt every module have D = {samples[0]:g} samples, so the data "
            "exponent beta cannot be fitted. Add such lanes with at least one other number of samples."
        )
    cells, needed = _number_of_cells(rank, samples), len(parameter_names(form, modules))
    if cells < needed:
        raise NoValidResultError(
            f"Law-P ({form}): {cells} distinct (ranks, D) cells for {needed} parameters. "
            "Add lanes that adapt every module, at other ranks or numbers of samples."
        )


def _number_of_cells(rank: np.ndarray, samples: np.ndarray) -> int:
    return len(np.unique(np.column_stack([rank, samples]), axis=0))


def _order_tau(rank: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> float | None:
    """Kendall tau over pairs of rank vectors, averaged over seeds; pairs with equal measurements do not count."""
    cells, index = np.unique(rank, axis=0, return_inverse=True)
    index = index.reshape(-1)
    means = [np.bincount(index, values) / np.bincount(index) for values in (predicted, measured)]
    first, second = np.triu_indices(len(cells), 1)
    signs = [np.sign(values[first] - values[second]) for values in means]
    comparable = signs[1] != 0
    return float(np.mean(signs[0][comparable] * signs[1][comparable])) if comparable.any() else None


def _raw_units(scaled: np.ndarray, modules: int) -> np.ndarray:
    """(exponents..., A, E[, C]) for r/16 and D/1024 -> columns of `parameter_names`, for r and D."""
    per_term = modules + 1
    log_units = np.array([math.log(_RANK_UNIT)] * modules + [math.log(_SAMPLE_UNIT)])
    first = scaled[:, :per_term]
    if scaled.shape[1] == per_term + 2:
        A, E = scaled[:, -2:].T
        return np.column_stack([A * np.exp(first @ log_units), E, first[:, -1], first[:, :-1]])
    second = scaled[:, per_term : 2 * per_term]
    A, E, C = scaled[:, -3:].T
    amplitudes = A * np.exp(first @ log_units), C * np.exp(-second @ log_units)
    falling = [amplitudes[0], E, first[:, -1], first[:, :-1]]
    return np.column_stack([*falling, amplitudes[1], second[:, -1], second[:, :-1]])
