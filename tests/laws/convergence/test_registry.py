"""One suite over every convergence rule, and a rule from outside the package."""

import jax.numpy as jnp
import numpy as np
import pytest

from mars_jax.errors import ConfigError
from mars_jax.lanes.eval_points import EvalPoint, ModuleSwaps
from mars_jax.lanes.lane import Lane
from mars_jax.laws.convergence.base import Convergence, ConvergenceRule, Rule, converge
from mars_jax.laws.convergence.registry import RULES
from mars_jax.search.probes.records import lane_records

STEPS = np.concatenate([[0], np.geomspace(4, 1024, 33)]).round().astype(int)


def points(tau, modules=("llm",), step_of_nan=None):
    """Eval points of a lane whose signals, of every kind, fall with a time constant."""
    found = []
    for step in STEPS.tolist():
        left = float(np.exp(-step / tau))
        loss = float("nan") if step_of_nan is not None and step >= step_of_nan else 1.0 + 2.0 * left
        found.append(
            EvalPoint(
                step,
                loss,
                update_norm={module: float(step) for module in modules},
                drift={module: left if step else float("nan") for module in modules},
                alive=bool(np.isfinite(loss)),
                reason=None if np.isfinite(loss) else "the validation loss was not finite",
                swaps=ModuleSwaps({module: 2.0 * left for module in modules}, 0.0),
            )
        )
    return found


@pytest.mark.parametrize("name", RULES.names)
class TestEveryRule:
    def test_its_name_is_the_one_it_is_registered_by(self, name):
        assert RULES[name].name == name
        assert 0 < RULES[name].epsilon < 1

    def test_a_slower_lane_converges_later(self, name):
        rule = ConvergenceRule(name, RULES[name].epsilon, 3)
        lane = Lane({"llm": 4}, 64, 0)
        fast, slow = lane_records([lane, lane], [points(10.0), points(60.0)], rule, {"llm": 1e-3})
        assert fast.status == slow.status == "converged"
        assert fast.convergence_steps["llm"] < slow.convergence_steps["llm"] < STEPS[-1]

    def test_a_lane_that_still_falls_at_its_horizon_is_censored_there(self, name):
        rule = ConvergenceRule(name, RULES[name].epsilon, 3)
        (record,) = lane_records([Lane({"llm": 4}, 64, 0)], [points(3000.0)], rule, {"llm": 1e-3})
        assert (record.censored, record.convergence_steps) == ({"llm": True}, {"llm": float(STEPS[-1])})

    def test_a_lane_that_diverged_has_no_time(self, name):
        rule = ConvergenceRule(name, RULES[name].epsilon, 3)
        (record,) = lane_records([Lane({"llm": 4}, 64, 0)], [points(10.0, step_of_nan=100)], rule, {"llm": 1e-3})
        assert (record.status, record.convergence_steps) == ("diverged", {"llm": None})

    def test_modules_that_a_lane_adapts_together_have_times_unless_the_rule_needs_them_alone(self, name):
        rule = ConvergenceRule(name, RULES[name].epsilon, 3)
        lane = Lane({"vision": 4, "llm": 4}, 64, 0)
        (record,) = lane_records([lane], [points(10.0, ("vision", "llm"))], rule, {"vision": 1e-3, "llm": 1e-3})
        assert set(record.convergence_steps) == (set() if RULES[name].needs_single_module else {"vision", "llm"})


def first_below(steps, curve, end, epsilon, sustain):
    """A rule of somebody else's: the first step at which the curve is below epsilon of where it began."""
    index = jnp.argmax(curve <= epsilon * curve[0])
    return Convergence(steps[index], jnp.asarray(False))


def test_a_rule_from_outside_is_one_registration(monkeypatch):
    monkeypatch.setattr(RULES, "_members", dict(RULES._members))
    rule = Rule(
        "first_below",
        first_below,
        lambda points, adapted: {module: [point.drift[module] for point in points[1:]] for module in adapted},
        needs_single_module=False,
        needs_swaps=False,
        epsilon=0.2,
    )
    with pytest.raises(ConfigError, match="convergence rule is 'first_below'; allowed: loss_fraction, splice, drift"):
        ConvergenceRule("first_below", 0.2)
    RULES.register(rule)
    curves = np.asarray([[[1.0, 0.5, 0.1, 0.1]]])
    assert converge(ConvergenceRule("first_below", 0.2, 1), np.arange(4.0), curves).steps.tolist() == [[2.0]]
    with pytest.raises(ConfigError, match="there is a convergence rule named 'first_below' already"):
        RULES.register(Rule("first_below", first_below, rule.curves, False, False, 0.2))
