"""From records of lanes to both laws, their draws and laws.json; what can't be fitted is refused with the reason."""

import json

import jax
import numpy as np
import pytest

from mars_jax.errors import ConfigError, DataError, NoValidResultError
from mars_jax.laws.fit import Laws, determined, fit_laws
from mars_jax.laws.law_p import fit_performance_law
from mars_jax.laws.records import read_records
from mars_jax.runtime.jsonfiles import load_json, write_json
from mars_jax.search.strategies.laws import pick_by_laws
from mars_jax.search.strategies.paper import pick_as_published
from tests.helpers.planted_laws import PLANTED_RANKS, planted_loss

TRUE_C = {"vision": (20.0, -0.2, 0.5), "llm": (6.0, -0.35, 0.65)}
HORIZON = 700.0


def lane(index, vision, llm, samples, seed, rng):
    ranks = {"vision": vision, "llm": llm, "projector": 8 if vision and llm else 0}
    record = {
        "lane": index,
        "ranks": ranks,
        "num_samples": samples,
        "seed": seed,
        "steps": HORIZON,
        "convergence_steps": {},
        "censored": {},
        "best_loss": planted_loss(max(vision, 1), max(llm, 1), samples) + 0.002 * rng.normal(),
        "status": "converged",
        "reason": "",
    }
    for module, (k, gamma, delta) in TRUE_C.items():
        if ranks[module]:
            time = k * ranks[module] ** gamma * samples**delta * np.exp(0.05 * rng.normal())
            record["censored"][module] = bool(time > HORIZON)
            record["convergence_steps"][module] = None if time > HORIZON else time
    return record


@pytest.fixture(scope="module")
def lanes():
    rng = np.random.default_rng(0)
    cells = [(v, r, d) for d in (256, 1024, 4096) for v, r in [*PLANTED_RANKS[:5], (4, 0), (64, 0), (0, 4), (0, 64)]]
    records = [lane(i, *cell, 0, rng) for i, cell in enumerate(cells)]
    records += [lane(len(records), 16, 16, 256, 1, rng)]
    return [*records, {**lane(len(records), 8, 8, 256, 0, rng), "status": "diverged", "best_loss": None}]


@pytest.fixture(scope="module")
def laws(lanes):
    return fit_laws(read_records(lanes), key=jax.random.key(0), num_bootstraps=60)


def test_laws_of_lanes_recover_what_was_planted(laws, lanes):
    assert set(laws.convergence) == {"vision", "llm"}  # the projector has one rank: carried, not searched
    assert laws.diverged == 1
    for module, (_, gamma, delta) in TRUE_C.items():
        law = laws.convergence[module]
        assert law.points == sum(1 for record in lanes[:-1] if record["ranks"][module])
        assert law.censored == sum(bool(record["censored"].get(module)) for record in lanes[:-1])
        assert law.gamma == pytest.approx(gamma, abs=0.05)
        assert law.delta == pytest.approx(delta, abs=0.05)
        assert law.ci["gamma"][0] < law.gamma < law.ci["gamma"][1]
    assert sum(law.censored for law in laws.convergence.values()) > 0
    assert set(laws.performance.alpha) == {"vision", "llm"}
    assert pytest.approx(0.8, abs=0.1) == laws.multiplicative.E


def test_draws_of_all_laws_have_the_same_rows(laws):
    shapes = {law.draws.shape for law in laws.convergence.values()}
    assert shapes == {(60, 4)}
    assert len(laws.performance.draws) == len(laws.multiplicative.draws) == 60
    assert np.all(np.isfinite(laws.performance.draws))
    assert np.std(laws.convergence["llm"].draws[:, 1]) > 0


def test_laws_json_has_the_documented_keys_and_comes_back(laws):
    document = json.loads(json.dumps(laws.to_json(), allow_nan=False))
    convergence_keys = {"k", "gamma", "delta", "E", "ci", "points", "rmse_log", "censored"}
    assert set(document["convergence"]["llm"]) == convergence_keys
    performance_keys = {"form", "A", "alpha", "beta", "E", "overfit", "ci", "held_out_error", "order_tau"}
    assert set(document["performance"]) == performance_keys
    again = Laws.from_json(document)
    assert again == laws
    np.testing.assert_array_equal(again.performance.draws, laws.performance.draws)
    np.testing.assert_array_equal(again.convergence["llm"].draws, laws.convergence["llm"].draws)


def test_laws_of_lanes_at_several_learning_rates_have_its_exponent_and_come_back(lanes):
    """Every fourth lane at a third of the rate converges 2.4 times as late."""
    rated = []
    for place, record in enumerate(lanes):
        factor = 1 / 3 if place % 4 == 0 else 1.0
        late = {m: t and t * factor**-0.8 for m, t in record["convergence_steps"].items()}
        rated.append(
            {
                **record,
                "steps": 10 * HORIZON,
                "learning_rate": {module: 1e-3 * factor for module in record["ranks"]},
                "convergence_steps": {m: t for m, t in late.items() if t},
                "censored": {m: False for m, t in late.items() if t},
            }
        )
    found = fit_laws(read_records(rated), key=jax.random.key(0), num_bootstraps=20)
    for module, (_, gamma, delta) in TRUE_C.items():
        law = found.convergence[module]
        assert (law.zeta, law.rate) == (pytest.approx(0.8, abs=0.05), 1e-3)
        assert (law.gamma, law.delta) == (pytest.approx(gamma, abs=0.06), pytest.approx(delta, abs=0.06))
        assert law.ci["zeta"][0] < law.zeta < law.ci["zeta"][1]
    # Law-P, which knows no rates, is that of the lanes at the usual ones.
    usual = [record for record in rated if record["learning_rate"]["llm"] == 1e-3]
    alone = fit_laws(read_records(usual), key=jax.random.key(0), num_bootstraps=20)
    assert found.performance.alpha == pytest.approx(alone.performance.alpha, rel=1e-3)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(document["draws"]["convergence"]["llm"]) == {"k", "gamma", "delta", "E", "zeta"}
    assert Laws.from_json(document) == found


def test_over_fitting_form_comes_back_from_json(laws):
    vision, llm = (np.tile([pair[i] for pair in PLANTED_RANKS], 5) for i in (0, 1))
    samples = np.repeat([128, 256, 512, 1024, 2048], 6)
    losses = planted_loss(vision, llm, samples, over_fit=0.1)
    over_fitted = fit_performance_law("power_overfit", {"vision": vision, "llm": llm}, samples, losses)
    over_fitted = Laws(laws.convergence, laws.untimed, over_fitted, laws.multiplicative, 0)
    document = json.loads(json.dumps(over_fitted.to_json()))
    assert set(document["performance"]["overfit"]) == {"C", "kappa", "eta"}
    assert Laws.from_json(document) == over_fitted


def test_same_key_same_laws_other_key_other_draws(laws, lanes):
    again = fit_laws(read_records(lanes), key=jax.random.key(0), num_bootstraps=60)
    other = fit_laws(read_records(lanes), key=jax.random.key(1), num_bootstraps=60)
    np.testing.assert_array_equal(again.convergence["llm"].draws, laws.convergence["llm"].draws)
    assert other.convergence["llm"].gamma == laws.convergence["llm"].gamma
    assert not np.array_equal(other.convergence["llm"].draws, laws.convergence["llm"].draws)


def test_the_measuring_grid_weighs_points(lanes):
    coarse = [{**record, "eval_interval": 400} for record in lanes]
    fine = [{**record, "eval_interval": 1} for record in lanes]
    laws = [fit_laws(read_records(some), key=jax.random.key(0), num_bootstraps=60) for some in (coarse, fine)]
    assert laws[0].convergence["llm"].delta != laws[1].convergence["llm"].delta


def test_a_record_without_a_key_is_refused(lanes):
    broken = [lanes[0], {name: value for name, value in lanes[1].items() if name != "best_loss"}]
    with pytest.raises(DataError, match=r"lane record 2 \(lane 1\) lacks best_loss; it has censored"):
        fit_laws(read_records(broken), key=jax.random.key(0))


def test_a_convergence_time_of_zero_is_refused(lanes):
    broken = [{**lanes[0], "convergence_steps": {"vision": 0.0, "llm": 5.0}}]
    with pytest.raises(DataError, match=r"lane record 1 \(lane 0\).*'vision': 0.0.*must be above 0"):
        fit_laws(read_records(broken), key=jax.random.key(0))


def test_lanes_without_two_ranks_are_refused(lanes):
    same = [record for record in lanes if record["ranks"]["vision"] == record["ranks"]["llm"] == 16]
    with pytest.raises(NoValidResultError, match="no module has two ranks among the 4 lanes"):
        fit_laws(read_records(same), key=jax.random.key(0))


def test_lanes_that_never_adapt_all_modules_are_refused(lanes):
    untimed = [{**record, "convergence_steps": {}, "censored": {}} for record in alone(lanes)]
    with pytest.raises(NoValidResultError, match="none of the 12 lanes adapts all of vision, llm"):
        fit_laws(read_records(untimed), key=jax.random.key(0))


def alone(lanes):
    return [record for record in lanes if not record["ranks"]["vision"] or not record["ranks"]["llm"]]


def test_lanes_that_never_adapt_all_modules_give_law_c_alone():
    rng = np.random.default_rng(0)
    cells = [(*pair, d) for d in (256, 1024, 4096) for r in (4, 8, 16, 64) for pair in ((r, 0), (0, r))]
    single = [lane(i, *cell, 0, rng) for i, cell in enumerate(cells)]
    laws = fit_laws(read_records(single), key=jax.random.key(0), num_bootstraps=20)
    assert set(laws.convergence) == {"vision", "llm"}
    assert laws.performance is None
    assert laws.multiplicative is None
    again = Laws.from_json(json.loads(json.dumps(laws.to_json())))
    assert again.performance is None
    assert again.convergence == laws.convergence
    with pytest.raises(NoValidResultError, match="there is no Law-P: no probe adapts all modules together"):
        determined(again.performance)


def test_one_number_of_samples_is_refused(lanes):
    small = [record for record in lanes if record["num_samples"] == 256]
    with pytest.raises(NoValidResultError, match="Law-P: all 6 lanes that adapt every module have D = 256"):
        fit_laws(read_records(small), key=jax.random.key(0), num_bootstraps=20)


def test_lanes_that_never_converge_still_give_law_p_and_a_pick_by_loss_that_says_so(lanes, tmp_path):
    def late(record):
        return {**record, "censored": record["censored"] | {"vision": True}}

    found = fit_laws(read_records([late(record) for record in lanes]), key=jax.random.key(0), num_bootstraps=20)
    assert set(found.convergence) == {"llm"}
    assert "Law-C of module 'vision'" in found.untimed["vision"]
    assert "let them run longer" in found.untimed["vision"]
    assert Laws.from_json(found.to_json()).untimed == found.untimed

    grids, parameters = {"vision": (4, 64), "llm": (4, 64)}, {"vision": 1, "llm": 1}
    selection = pick_by_laws(found, grids, 4096, parameters)
    expected = found.performance.loss_draws([candidate.ranks for candidate in selection.candidates], 4096).mean(axis=0)
    assert selection.pick == selection.candidates[np.flatnonzero(expected <= expected.min() * 1.005)[0]].ranks
    assert selection.fallback.startswith("Whether the modules converge together is not known")
    assert found.untimed["vision"] in selection.fallback
    assert [set(candidate.convergence_steps) for candidate in selection.candidates] == [{"llm"}] * 4
    assert [candidate.imbalance for candidate in selection.candidates] == [None] * 4
    write_json(tmp_path / "selection.json", selection.to_json())
    assert load_json(tmp_path / "selection.json", type(selection)) == selection
    with pytest.raises(NoValidResultError, match=r"the paper's method needs Law-C of every searched module\. Law-C of"):
        pick_as_published(found, grids, 4096, parameters)


def test_a_module_without_times_is_named_where_another_module_has_times(lanes):
    def silent(record):
        return {**record, "convergence_steps": {m: t for m, t in record["convergence_steps"].items() if m == "llm"}}

    found = fit_laws(read_records([silent(record) for record in lanes]), key=jax.random.key(0), num_bootstraps=20)
    assert set(found.convergence) == {"llm"}
    assert "Law-C of module 'vision'" in found.untimed["vision"]


def test_lanes_that_tell_no_times_are_picked_among_by_loss_without_an_apology(lanes):
    joint = [{**record, "convergence_steps": {}, "censored": {}} for record in lanes if all(record["ranks"].values())]
    found = fit_laws(read_records(joint), key=jax.random.key(0), num_bootstraps=20)
    assert not found.convergence
    assert not found.untimed
    grids, parameters = {"vision": (4, 64), "llm": (4, 64)}, {"vision": 1, "llm": 1}
    selection = pick_by_laws(found, grids, 4096, parameters)
    assert selection.fallback is None
    assert selection.tau is None
    assert f"ranks vision {selection.pick['vision']}, llm 64, the expected validation loss" in selection.explanation
    assert "converge" not in selection.explanation
    with pytest.raises(NoValidResultError, match=r"needs Law-C of every searched module\. The lanes have no conv"):
        pick_as_published(found, grids, 4096, parameters)


def test_times_of_too_few_runs_cost_law_c_and_not_the_run():
    rng = np.random.default_rng(0)
    alone = [(4, 0, 256), (64, 0, 256), (4, 0, 1024), (0, 4, 256), (0, 64, 256), (0, 4, 1024)]
    joint = [(v, r, d) for v in (4, 16, 64) for r in (4, 16, 64) for d in (256, 1024)]
    records = [lane(i, *cell, 0, rng) for i, cell in enumerate(alone)]
    records += [{**lane(9, *cell, 0, rng), "convergence_steps": {}, "censored": {}} for cell in joint]
    found = fit_laws(read_records(records), key=jax.random.key(0), num_bootstraps=20)
    assert not found.convergence
    assert "'llm': 2 runs are too few to know how much runs differ, so it has no interval" in found.untimed["llm"]
    assert len(found.performance.draws) == 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_bootstraps": 5}, "num_bootstraps is 5; allowed: 20"),
        ({"measuring_interval": 0.0}, "measuring_interval is 0"),
    ],
)
def test_bad_options_are_refused(lanes, options, text):
    with pytest.raises(ConfigError, match=text):
        fit_laws(read_records(lanes), key=jax.random.key(0), **options)


def test_laws_json_without_draws_is_refused(laws):
    document = laws.to_json()
    del document["draws"]
    with pytest.raises(DataError, match=r"no key 'draws'\. Fit the laws again"):
        Laws.from_json(document)
