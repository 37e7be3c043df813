"""Bootstrap resamples in which all points that were read off one run move together.

Errors of points of one run are alike: a run that is slow at D = 512 is slow at D = 1024. So residuals are resampled by
run: each run takes over, with a random sign, the residuals of a run drawn among those with the same points (Davison and
Hinkley 1997, "Bootstrap Methods and their Application", sections 3.8 and 6.2). Resampled runs themselves would not
determine the laws where runs are few. But residuals are smaller than errors, and few of them know little of how large
errors are. Both are put right as in the analysis of a split-plot experiment, whose whole plots are the runs (Cochran
and Cox 1957, chapter 7): means of runs and deviations from them are scaled up by their degrees of freedom, and in each
resample by a draw of their spread, which gives estimates the tails of Student's t.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import chdtri

if TYPE_CHECKING:
    from jax import Array

# Errors so large never came from a lane: they keep a draw of a hardly known spread finite in float32.
_LARGEST_ERROR = 30.0
# With fewer degrees of freedom nothing is known of how much runs differ. Where one isn't whole, parameters share it.
_LEAST_FREEDOM = 0.5


@dataclass(frozen=True)
class RunResamples:
    """S resamples of N points.

    Attributes:
        runs: [N] number of the run that each point was read off.
        donors: [S, N] the point whose residual each point takes.
        signs: [S, N] 1 or -1, the same for all points of a run.
        levels: [S, 2] probabilities, uniform in (0, 1), at which the spreads of the means of runs and of the deviations
            from them are drawn.
    """

    runs: np.ndarray
    donors: np.ndarray
    signs: np.ndarray
    levels: np.ndarray

    @property
    def number(self) -> int:
        """How many runs there are."""
        return int(self.runs.max()) + 1

    def of(self, used: np.ndarray) -> "RunResamples":
        """The resamples of some of the points, bool [N]; of every run the same points must be among them."""
        place = np.cumsum(used) - 1
        runs = np.unique(self.runs[used], return_inverse=True)[1].reshape(-1)
        return RunResamples(runs, place[self.donors[:, used]], self.signs[:, used], self.levels)

    def errors(self, residuals: np.ndarray, jacobian: np.ndarray) -> np.ndarray | None:
        """Errors of every resample, [S, N], or None where the runs are too few to know their spread.

        Args:
            residuals: [N] of a fit, in units in which all have the same spread.
            jacobian: [N, n] derivatives of the predictions by the n parameters that were free, in the same units.
        """
        basis, values, _ = np.linalg.svd(jacobian / np.linalg.norm(jacobian, axis=0), full_matrices=False)
        basis = basis[:, values > 1e-6 * values[0]]
        sizes = np.bincount(self.runs)
        means = np.stack([np.bincount(self.runs, column) for column in basis.T], axis=1) / sizes[:, None]
        # Of the parameters, how many the means of runs take up, and how many the deviations from them.
        between = float(np.sum(sizes[:, None] * means**2))
        inside = basis.shape[1] - between
        if len(sizes) - between < _LEAST_FREEDOM:
            return None
        of_run = (np.bincount(self.runs, residuals) / sizes)[self.runs]
        errors = self._scaled(of_run, len(sizes), between, 0)
        longer = int(np.sum(sizes > 1))
        if longer - inside >= _LEAST_FREEDOM:
            errors += self._scaled(residuals - of_run, longer, inside, 1)
        return np.clip(errors * self.signs, -_LARGEST_ERROR, _LARGEST_ERROR)

    def _scaled(self, residuals: np.ndarray, runs: int, parameters: float, stratum: int) -> np.ndarray:
        """The donors' residuals [S, N], as large as errors are, with a spread that is drawn for each resample."""
        freedom = runs - parameters
        spread = np.sqrt(runs / chdtri(freedom, self.levels[:, stratum]))
        return residuals[self.donors] * spread[:, None]


def central_interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end [...] of the central 95 % of bootstrap draws [S, ...].

    Of S draws and the truth each is the k-th smallest with the same probability, so the ends are those of ranks
    0.025 (S + 1) and 0.975 (S + 1) (Davison and Hinkley 1997, section 5.2.1). Plain sample quantiles are narrower: for
    200 draws they hold 94 %.
    """
    low, high = np.percentile(draws, (2.5, 97.5), axis=0, method="weibull")
    return low, high


def percentile_intervals(names: Sequence[str], draws: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of [S, n] draws by name; empty without draws."""
    if not len(draws):
        return {}
    low, high = central_interval(draws)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def resample_runs(key: "Array", runs: Sequence[Hashable], kinds: Sequence[Hashable], number: int) -> RunResamples:
    """Draws resamples.

    Args:
        key: random key.
        runs: the run of each of N points.
        kinds: what each point is within its run, such as its D. Runs exchange residuals if their points are of the
            same kinds, in the same order.
        number: S.
    """
    import jax

    places: dict[Hashable, list[int]] = {}
    for place, run in enumerate(runs):
        places.setdefault(run, []).append(place)
    alike: dict[Hashable, list[list[int]]] = {}
    for of_run in places.values():
        alike.setdefault(tuple(kinds[place] for place in of_run), []).append(of_run)

    draws = np.asarray(jax.random.uniform(key, (number, 2 * len(places) + 2)), np.float64)
    numbers, donors, signs = np.zeros(len(runs), int), np.zeros((number, len(runs)), int), np.ones((number, len(runs)))
    run = 0
    for group in alike.values():
        for of_run in group:
            drawn = np.minimum(draws[:, 2 * run] * len(group), len(group) - 1).astype(int)
            numbers[of_run], donors[:, of_run] = run, np.asarray(group)[drawn]
            signs[:, of_run] = np.where(draws[:, [2 * run + 1]] < 0.5, -1.0, 1.0)
            run += 1
    return RunResamples(numbers, donors, signs, np.clip(draws[:, -2:], 1e-6, 1 - 1e-6))
