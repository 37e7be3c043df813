"""Laws that tests plant: losses whose exponents are known, and laws written down by hand with their draws."""

import numpy as np

from mars_jax.laws.fit import Laws
from mars_jax.laws.law_c import ConvergenceLaw
from mars_jax.laws.law_p import PerformanceLaw

ALPHA, BETA = {"vision": 0.1, "llm": 0.25}, 0.45
DRAWS = 100  # of the laws below
PLANTED_RANKS = [(4, 4), (4, 64), (64, 4), (64, 64), (16, 16), (8, 32)]


def planted_loss(vision, llm, samples, over_fit=0.0):
    power = 30.0 * vision ** -ALPHA["vision"] * llm ** -ALPHA["llm"] * samples**-BETA + 0.8
    return power + over_fit * (vision / 16) ** 0.3 * (llm / 16) ** 0.8 * (samples / 1024) ** 1.2


def law_c(k, gamma, delta, offset=0.0, spread=0.01):
    draws = np.tile([k, gamma, delta, offset], (DRAWS, 1))
    draws[:, 0] *= np.exp(spread * np.random.default_rng(0).normal(size=DRAWS))
    return ConvergenceLaw(k, gamma, delta, offset, {}, 20, 0.05, 0, draws)


def law_p(alpha, spread=0.0, overfit=None):
    columns = [10.0, 0.8, 0.3, *alpha.values()]
    if overfit:
        columns += [overfit.C, overfit.eta, *overfit.kappa.values()]
    draws = np.tile(columns, (DRAWS, 1))
    draws[:, 3 : 3 + len(alpha)] += spread * np.random.default_rng(1).normal(size=(DRAWS, len(alpha)))
    form = "power_overfit" if overfit else "power"
    return PerformanceLaw(form, 10.0, alpha, 0.3, 0.8, overfit, {}, 0.01, 1.0, draws)


def laws(vision=None, llm=None, performance=None):
    performance = performance or law_p({"vision": 0.1, "llm": 0.2})
    convergence = {"vision": vision or law_c(20.0, -0.4, 0.6), "llm": llm or law_c(20.0, -0.4, 0.6)}
    return Laws(convergence, {}, performance, law_p({"vision": 0.1, "llm": 0.2}), 0)
