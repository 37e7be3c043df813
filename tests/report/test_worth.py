"""What training a module is worth, from final runs that trained it and runs that left it frozen."""

from types import SimpleNamespace

import numpy as np
import pytest

from mars_jax.report.worth import worth_of_modules, worth_sentence

SAMPLES = np.random.default_rng(0).exponential(1.0, 100)


def begun(vision, llm, losses, noise=0.0, samples=True):
    rng = np.random.default_rng(vision + llm)
    shares = [SAMPLES / SAMPLES.mean() * loss + noise * rng.normal(size=100) for _, loss in losses]
    return {
        "ranks": {"vision": vision, "llm": llm},
        "parameters": {"vision": 100 * vision, "llm": 1000 * llm},
        "looks": [list(look) for look in losses],
        "sample_losses": [share.tolist() for share in shares] if samples else [],
    }


def worth(*runs):
    return worth_of_modules(SimpleNamespace(sweep={"runs": list(runs)}))


TRAINED = begun(8, 4, [(0, 3.0), (8, 1.0), (16, 0.5)], 0.1)


def test_a_module_is_worth_what_the_best_run_without_it_is_behind_when_it_left():
    frozen, worse = begun(0, 4, [(0, 3.0), (8, 1.2)], 0.1), begun(0, 8, [(0, 3.0), (8, 1.5)], 0.1)
    (found,) = worth(TRAINED, begun(2, 4, [(0, 3.0), (8, 1.1)], 0.1), frozen, worse)
    assert (found["module"], found["step"], found["parameters"]) == ("vision", 8, 800)
    assert found["worth"] == pytest.approx(0.2)
    low, high = found["interval"]
    error = np.subtract(frozen["sample_losses"][1], TRAINED["sample_losses"][1]).std(ddof=1) / 10
    assert (low, high) == (pytest.approx(0.2 - 1.96 * error), pytest.approx(0.2 + 1.96 * error))
    text = worth_sentence(found)
    assert text.startswith("Training vision is worth 0.200 nats a token (0.1")
    assert text.endswith("for 800 parameters, at step 8.")


def test_a_module_that_may_stay_frozen_is_said_to():
    (found,) = worth(TRAINED, begun(0, 4, [(0, 3.0), (8, 1.3), (16, 0.5)], 0.3))
    assert found["worth"] == pytest.approx(0.0)
    assert worth_sentence(found).endswith("at step 16; it may as well stay frozen.")


def test_without_losses_of_samples_there_is_no_interval():
    (found,) = worth(TRAINED, begun(0, 4, [(0, 3.0), (8, 1.2)], samples=False))
    assert found["interval"] is None
    assert worth_sentence(found) == "Training vision is worth 0.200 nats a token, for 800 parameters, at step 8."


def test_nothing_is_said_of_modules_that_every_run_trained_or_whose_runs_diverged():
    assert worth(TRAINED) == []
    assert worth() == []
    assert worth(TRAINED, begun(0, 4, [(0, 3.0)]) | {"looks": [[0, 3.0], [4, None]]}) == []
