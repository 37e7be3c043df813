"""Law-C: convergence time of a module from its rank, learning rate and number of samples. Data class and fit.

    t(r, D) = k * r**gamma * D**delta + E            (Cho et al., arXiv 2603.00720, "Law-C")

Where the module's learning rate varied too, the power term has the factor (rate / reference)**-zeta.

Several modules are fitted together in `laws.fit`; convergence times come from `laws.convergence`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from numpy.typing import ArrayLike
from scipy.special import expit

from mars_jax.errors import DataError, NoValidResultError
from mars_jax.laws.least_squares import device_column, in_blocks
from mars_jax.laws.records import Document
from mars_jax.laws.resamples import RunResamples, percentile_intervals
from mars_jax.laws.tobit import AICC, SPREAD, Points, fit_rows, fit_rows_without_offset

NAMES = ("k", "gamma", "delta", "E")
"""Parameters where the learning rate did not vary."""

_RANK_UNIT, _SAMPLE_UNIT = 16.0, 1024.0
_AICC_MARGIN = 4.0


@dataclass(frozen=True)
class ConvergenceLaw:
    """A fitted Law-C in raw units: rank, D in samples, t in optimizer steps.

    Attributes:
        k: amplitude, > 0 (steps at rank 1, one sample and the reference rate).
        gamma: exponent of the rank; negative when larger ranks converge sooner.
        delta: exponent of the number of samples.
        E: offset in steps, >= 0.
        ci: 95 % bootstrap interval of each parameter, by name.
        points: number of points, censored ones included.
        rmse_log: root mean square of log(measured / predicted) over the points that are not censored.
        censored: number of points that are lower bounds only.
        draws: [S, n] bootstrap draws, columns as `names`.
        zeta: exponent of the learning rate, with a minus: positive when larger rates converge sooner.
        rate: the reference learning rate; None where rates did not vary, and zeta is 0.
    """

    k: float
    gamma: float
    delta: float
    E: float
    ci: Mapping[str, tuple[float, float]]
    points: int
    rmse_log: float
    censored: int
    draws: np.ndarray = field(compare=False, repr=False)
    zeta: float = 0.0
    rate: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters: columns of the draws, and keys of `ci`."""
        return NAMES if self.rate is None else (*NAMES, "zeta")

    def __post_init__(self) -> None:
        """Checks that predictions are real: a negative E or k could make a convergence time negative."""
        if not (self.k > 0 and self.E >= 0 and all(math.isfinite(getattr(self, name)) for name in self.names)):
            raise DataError(
                f"a convergence law has {', '.join(f'{name}={getattr(self, name)}' for name in self.names)}; "
                "all must be finite, k above 0 and E not below 0. Fit the laws again."
            )

    def log_steps(self, rank: ArrayLike, num_samples: float, rate: ArrayLike | None = None) -> np.ndarray:
        """Natural log of the convergence time in steps, in the shape of `rank`, at D = `num_samples`.

        Args:
            rank: of the module.
            num_samples: D.
            rate: learning rate of the module, in the shape of `rank`; None: the reference.
        """
        parameters = np.asarray([getattr(self, name) for name in self.names])
        return _log_steps(parameters, np.asarray(rank), num_samples, self._log_rate(rate))

    def log_steps_draws(self, rank: ArrayLike, num_samples: float, rate: ArrayLike | None = None) -> np.ndarray:
        """`log_steps` of every bootstrap draw: ranks of shape [...] give [S, ...]."""
        rank = np.asarray(rank)
        columns = self.draws.T.reshape(len(self.names), -1, *([1] * rank.ndim))
        return _log_steps(columns, rank[None], num_samples, self._log_rate(rate))

    def _log_rate(self, rate: ArrayLike | None) -> np.ndarray:
        return np.zeros(()) if rate is None or self.rate is None else np.log(np.asarray(rate) / self.rate)

    def to_json(self) -> Document:
        """The entry of this module under `convergence` in laws.json, without the draws, which have their own key."""
        return {
            **{name: getattr(self, name) for name in self.names},
            **({} if self.rate is None else {"rate": self.rate}),
            "ci": {name: list(interval) for name, interval in self.ci.items()},
            "points": self.points,
            "rmse_log": self.rmse_log,
            "censored": self.censored,
        }

    @classmethod
    def from_json(cls, entry: Document, draws: np.ndarray) -> "ConvergenceLaw":
        """The inverse of `to_json`, with the [S, n] draws."""
        ci = {name: (float(low), float(high)) for name, (low, high) in entry["ci"].items()}
        optional = [name for name in ("zeta", "rate") if name in entry]
        numbers = {name: float(entry[name]) for name in (*NAMES, "rmse_log", *optional)}
        return cls(**numbers, ci=ci, points=int(entry["points"]), censored=int(entry["censored"]), draws=draws)


def _log_steps(
    parameters: np.ndarray, rank: np.ndarray, num_samples: np.ndarray | float, log_rate: np.ndarray | float = 0.0
) -> np.ndarray:
    k, gamma, delta, offset, *zeta = parameters
    power = np.log(k) + gamma * np.log(rank) + delta * np.log(num_samples)
    if zeta:
        power = power - zeta[0] * log_rate
    with np.errstate(divide="ignore"):
        return np.logaddexp(power, np.log(offset))


def fit_data_exponent(num_samples: ArrayLike, steps: ArrayLike) -> tuple[float, float]:
    """Fits t = k * D**delta at one rank by least squares of log t, as in the paper's Figure 2(b).

    Args:
        num_samples: [N] samples D.
        steps: [N] convergence times in steps.

    Returns:
        (k in steps, delta).
    """
    delta, log_k = np.polyfit(np.log(np.asarray(num_samples, float)), np.log(np.asarray(steps, float)), 1)
    return float(np.exp(log_k)), float(delta)


@dataclass(frozen=True)
class ConvergenceTimes:
    """Convergence times of one module in N lanes or prefixes of lanes; every field is [N].

    Attributes:
        ranks: of the module, >= 1.
        num_samples: D.
        steps: convergence times in optimizer steps; the horizon where censored.
        censored: True where the time is a lower bound.
        rates: learning rates of the module; None, or all the same: they take no part.
        weights: relative inverse variances of log t; None: equal.
        horizons: steps beyond which times are censored, in resamples too; None: those of censored points are `steps`,
            and the others have none.
    """

    ranks: ArrayLike
    num_samples: ArrayLike
    steps: ArrayLike
    censored: ArrayLike
    rates: ArrayLike | None = None
    weights: ArrayLike | None = None
    horizons: ArrayLike | None = None


def fit_convergence_law(module: str, times: ConvergenceTimes, resamples: RunResamples | None = None) -> ConvergenceLaw:
    """Fits Law-C of one module by weighted least squares of log t, with censored points as in a Tobit model.

    A censored point contributes the probability that its time lies beyond its horizon (Tobin 1958), by
    expectation-maximisation: it is imputed by the mean of the truncated normal, then the law is refitted. E is 0 unless
    the corrected AIC of the form with E >= 0 is lower by more than 4. Until then the data may not tell the forms apart,
    so bootstrap draws are refits of both, mixed by the forms' Akaike weights (Buckland, Burnham and Augustin 1997,
    "Model Selection: An Integral Part of Inference", Biometrics 53).

    Args:
        module: name of the module, for messages.
        times: of the module.
        resamples: bootstrap resamples of the N points; None: no intervals.

    Returns:
        The law.

    Raises:
        NoValidResultError: the measured points do not determine the parameters, or the runs not the intervals; the
            message names what to add.
    """
    rank, samples, time = (np.asarray(one, np.float64) for one in (times.ranks, times.num_samples, times.steps))
    is_censored = np.asarray(times.censored, bool)
    rate, reference = _rates(times.rates, is_censored)
    _check_design(module, rank, samples, rate, is_censored)
    weight = np.ones_like(time) if times.weights is None else np.asarray(times.weights, np.float64)
    weight = weight / weight.mean()
    log_rate = np.zeros_like(time) if rate is None else np.log(rate / reference)

    # Centring the logs makes the columns nearly orthogonal; the units are put back below.
    logs = np.stack([np.log(rank / _RANK_UNIT), np.log(samples / _SAMPLE_UNIT), log_rate], axis=1)
    logs = logs[:, : 2 if rate is None else 3]
    means, time_mean = logs.mean(axis=0), np.log(time).mean()
    columns, log_time = logs - means, np.log(time) - time_mean
    points = Points(
        columns=jnp.stack([device_column(column) for column in columns.T], axis=1),
        weight=device_column(weight),
        known=device_column(np.ones_like(time)),
    )
    # E is at most the shortest measured time.
    largest = jnp.float32(np.exp(log_time[~is_censored].min()))
    forms = partial(fit_rows, points, largest), partial(fit_rows_without_offset, points)
    with_offset, plain = (in_blocks(form, log_time[None], is_censored[None])[0] for form in forms)
    share = _offset_share(with_offset[AICC], plain[AICC])
    fitted = (with_offset if share == 1.0 else plain)[None]
    if resamples is not None:
        linear = np.column_stack([np.ones_like(time), columns])
        horizons = times.horizons
        last = np.where(is_censored, log_time, np.inf) if horizons is None else np.log(horizons) - time_mean
        data = _Data(linear, log_time, is_censored, weight, last)
        fitted = np.concatenate([fitted, _draws(module, forms, (with_offset, plain), share, data, resamples)])

    parameters = _raw_units(fitted, means, time_mean)
    residuals = np.log(time) - _log_steps(parameters[0], rank, samples, log_rate)
    draws = parameters[1:]
    names = NAMES if rate is None else (*NAMES, "zeta")
    return ConvergenceLaw(
        **dict(zip(names, map(float, parameters[0]), strict=True)),
        rate=None if rate is None else reference,
        ci=percentile_intervals(names, draws),
        points=len(time),
        rmse_log=float(np.sqrt(np.mean(residuals[~is_censored] ** 2))),
        censored=int(is_censored.sum()),
        draws=draws,
    )


def _raw_units(fitted: np.ndarray, means: np.ndarray, time_mean: float) -> np.ndarray:
    """Rows of `tobit.fit_rows` [S, n + 4] -> [S, n + 2]: k, gamma, delta, E, and zeta where rates varied."""
    intercept, slopes, scaled_offset = fitted[:, 0], fitted[:, 1 : AICC - 1], fitted[:, AICC - 1]
    units = np.zeros_like(means)
    units[:2] = math.log(_RANK_UNIT), math.log(_SAMPLE_UNIT)
    k = np.exp(intercept + time_mean - slopes @ (means + units))
    return np.column_stack([k, slopes[:, :2], scaled_offset * np.exp(time_mean), -slopes[:, 2:]])


def _rates(rates: ArrayLike | None, censored: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Learning rates [N], None where those of converged points are all the same, and the most frequent of them."""
    rate = None if rates is None else np.asarray(rates, np.float64)
    if rate is None:
        return None, 1.0
    values, counts = np.unique(rate[~censored], return_counts=True)
    if len(values) < 2:
        return None, 1.0
    return rate, float(values[np.argmax(counts)])


def _check_design(
    module: str, ranks: np.ndarray, num_samples: np.ndarray, rates: np.ndarray | None, censored: np.ndarray
) -> None:
    """Refuses points that do not determine the parameters; names the column at fault and what to add."""
    rank, samples = ranks[~censored], num_samples[~censored]
    where = f"Law-C of module {module!r}"
    size = f"{len(ranks)} points, {int(censored.sum())} of them censored"
    if len(np.unique(rank)) == 1:
        raise NoValidResultError(
            f"{where}: every converged point has rank {rank[0]:g} ({size}), so the rank exponent gamma cannot be "
            "fitted. Add probe lanes with at least one other rank, or longer ones if those are censored."
        )
    if len(np.unique(samples)) == 1:
        raise NoValidResultError(
            f"{where}: every converged point has D = {samples[0]:g} samples ({size}), so the data exponent delta "
            "cannot be fitted. Add probe lanes with at least one other number of samples, or longer ones if those "
            "are censored."
        )
    columns = [np.log(rank), np.log(samples), *([] if rates is None else [np.log(rates[~censored])])]
    needed = 1 + len(columns)
    if len(rank) < needed:
        raise NoValidResultError(
            f"{where}: {len(rank)} converged points for {needed} parameters ({size}). Add probe lanes, or let them run "
            "longer."
        )
    apart = np.stack([np.ones_like(rank), *(column - column.mean() for column in columns)], axis=1)
    if np.linalg.matrix_rank(apart, tol=1e-6) < needed:
        what, exponents = ("ranks and numbers of samples", "gamma and delta")
        if rates is not None:
            what, exponents = "ranks, learning rates and numbers of samples", "gamma, zeta and delta"
        raise NoValidResultError(
            f"{where}: {what} change together ({size}), so {exponents} cannot be separated. "
            "Add a probe lane with one of these ranks at another number of samples."
        )


def _offset_share(with_offset: float, plain: float) -> float:
    """Akaike weight of the form with an offset beside that without, from their corrected AICs; 1 where it is chosen."""
    gain = plain - with_offset
    return 1.0 if gain > _AICC_MARGIN else float(expit(gain / 2))


def _centred_log_time(theta: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.log(np.exp(columns @ theta[: columns.shape[1]]) + theta[columns.shape[1]])


class _Data(NamedTuple):
    """Points of a fit: [N, n] columns of the linear part, and [N] each: centred log t, censored, weight, last log t."""

    columns: np.ndarray
    log_time: np.ndarray
    censored: np.ndarray
    weight: np.ndarray
    last: np.ndarray


def _draws(
    module: str,
    forms: Sequence[Callable[..., jax.Array]],
    fitted: Sequence[np.ndarray],
    share: float,
    data: _Data,
    resamples: RunResamples,
) -> np.ndarray:
    """Refits of all resamples, [S, n]: a share of them, evenly spread, of the form with an offset, the rest without.

    Raises:
        NoValidResultError: the runs are too few.
    """
    errors = [_errors(theta, data, resamples) for theta in fitted]
    if errors[0] is None and share < 1.0:
        share = 0.0
    places = np.arange(len(resamples.donors))
    offset_rows = np.floor((places + 1) * share) > np.floor(places * share)
    draws = np.zeros((len(places), len(fitted[0])))
    for form, theta, error, rows in zip(forms, fitted, errors, (offset_rows, ~offset_rows), strict=True):
        if not rows.any():
            continue
        if error is None:
            raise NoValidResultError(
                f"Law-C of module {module!r}: {resamples.number} runs are too few to know how much runs differ, so it "
                "has no interval. Add probe lanes at other ranks, or seeds."
            )
        moved = (_centred_log_time(theta, data.columns) + error)[rows]
        late = moved > data.last
        late[np.sum(~late, axis=1) < data.columns.shape[1]] = data.censored  # Too few times to fit.
        draws[rows] = in_blocks(form, np.where(late, np.where(np.isfinite(data.last), data.last, 0.0), moved), late)
    return draws


def _errors(fitted: np.ndarray, data: _Data, resamples: RunResamples) -> np.ndarray | None:
    """[S, N] errors of log t in the resamples of a fit; None where the runs are too few."""
    expected = _centred_log_time(fitted, data.columns)
    spread = fitted[SPREAD] / np.sqrt(data.weight)
    # Of a censored point the residual is not known; its mean square beyond the horizon is.
    z = (data.log_time - expected) / spread
    hazard = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.asarray(log_ndtr(-z), np.float64))
    beyond = spread * np.sqrt(np.maximum(1.0 + z * hazard, 0.0))
    residuals = np.where(data.censored, beyond, data.log_time - expected)
    offset = fitted[data.columns.shape[1]]
    jacobian = data.columns * (1.0 - offset * np.exp(-expected))[:, None]
    if offset > 0:
        jacobian = np.column_stack([jacobian, np.exp(-expected)])
    root = np.sqrt(data.weight)
    errors = resamples.errors(residuals * root, jacobian * root[:, None])
    return None if errors is None else errors / root
