"""One suite over every strategy, on recorded curves whose best rank vector is known; and a strategy from outside."""

import dataclasses
import math

import numpy as np
import pytest

from mars_jax.errors import ConfigError, NoValidResultError
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.lanes.stopping import Patience
from mars_jax.laws.records import LaneRecord
from mars_jax.search.probes.design import rank_vectors
from mars_jax.search.recorded_trainer import RecordedTrainer
from mars_jax.search.selection import without_laws
from mars_jax.search.strategies.base import Budget, Outcome, Space
from mars_jax.search.strategies.model_search import ModelSearch
from mars_jax.search.strategies.registry import STRATEGIES
from mars_jax.search.strategies.spread import spread_configurations
from mars_jax.search.trainer import Curve
from tests.helpers.planted_laws import law_p, laws

GRIDS = {"vision": (2, 8, 32), "projector": (8,), "llm": (2, 8, 32)}
STEPS, SIZES = 64, (256, 512, 1024)


def loss(ranks, samples):
    """Lowest at (8, 32); more samples help; by Law-P's form but for the bend in vision."""
    bend = 0.02 * math.log2(ranks["vision"] / 8) ** 2
    return 0.5 + 6.0 / (ranks["vision"] ** 0.1 * ranks["llm"] ** 0.2 * samples**0.3) + bend


def time(rank, samples):
    return 20.0 * rank**-0.3 * samples**0.4


def laws_of(records):
    """Laws that fit the records, but for the bend."""
    assert records
    return laws(performance=law_p({"vision": 0.1, "llm": 0.2}))


SPACE = Space(
    grids=GRIDS,
    num_samples=4096,
    steps=STEPS,
    probed=rank_vectors(GRIDS, corners=True),
    sizes=SIZES,
    parameters_per_rank={"vision": 100, "projector": 10, "llm": 1000},
    rates=dict.fromkeys(GRIDS, 1e-3),
    fit=laws_of,
    most_together=16,
)


def record(ranks, samples):
    name = "-".join(f"{module}{rank}" for module, rank in ranks.items()) + f"-D{samples}-s0"
    times = {module: time(ranks[module], samples) for module in ("vision", "llm")}
    return LaneRecord(
        name, ranks, samples, 10_000, times, dict.fromkeys(times, False), loss(ranks, samples), "converged"
    )


def curve(configuration):
    end = loss(configuration.ranks, SPACE.num_samples) + 0.1 * sum(
        abs(math.log(factor)) for factor in configuration.factors.values()
    )
    points = [EvalPoint(step, end + 3.0 * (1 - step / STEPS)) for step in range(0, STEPS + 1, 8)]
    return Curve(configuration, tuple(points))


def restarts_of(space):
    return [dataclasses.replace(space.middle, seed=seed) for seed in (1, 2, 3)]


def trainer():
    whole = SPACE.every()
    factors = [{module: factor} for module in SPACE.searched for factor in (1 / 3, 3.0)]
    rated = [SPACE.configuration(c.ranks, f) for c in whole for f in factors]
    rated += restarts_of(SPACE)
    records = [record(ranks, samples) for ranks in SPACE.probed for samples in SIZES]
    return RecordedTrainer(map(curve, [*whole, *rated]), records)


BEST = min((c.ranks for c in SPACE.every()), key=lambda ranks: loss(ranks, SPACE.num_samples))


@pytest.mark.parametrize("name", STRATEGIES.names)
class TestEveryStrategy:
    def test_it_picks_one_rank_of_each_grid_and_says_why(self, name):
        selection = STRATEGIES[name].search(SPACE, trainer(), Budget()).selection
        assert set(selection.pick) == set(GRIDS)
        assert all(rank in GRIDS[module] for module, rank in selection.pick.items())
        assert selection.explanation
        assert selection.target_num_samples == SPACE.num_samples

    def test_its_final_run_has_the_ranks_of_the_pick_and_came_to_the_end(self, name):
        outcome = STRATEGIES[name].search(SPACE, trainer(), Budget())
        if outcome.final is None:
            assert not outcome.curves
        else:
            assert outcome.final.configuration.ranks == outcome.selection.pick
            assert outcome.final.steps == STEPS
            assert outcome.final in outcome.curves
            assert outcome.final.loss == min(c.loss for c in outcome.curves if c.steps == STEPS)

    def test_it_asks_for_probes_only_if_it_says_so(self, name):
        replayed = trainer()
        STRATEGIES[name].search(SPACE, replayed, Budget())
        assert bool(replayed.probed) == (STRATEGIES[name].probes == "losses")

    def test_the_same_search_comes_to_the_same_pick(self, name):
        picks = [STRATEGIES[name].search(SPACE, trainer(), Budget()).selection.pick for _ in range(2)]
        assert picks[0] == picks[1]

    def test_a_budget_bounds_the_steps_of_its_final_runs(self, name):
        if not STRATEGIES[name].takes_budget:
            return
        replayed = trainer()
        STRATEGIES[name].search(SPACE, replayed, Budget(runs=2))
        # Samplers' strategies look at their account before a run, so the last one may go beyond it.
        more = isinstance(STRATEGIES[name], ModelSearch)
        assert sum(c.steps for c in replayed.trained) <= (2 + more) * STEPS


def test_strategies_that_see_every_probe_or_run_find_the_best_and_halve_the_rest():
    replayed = trainer()
    outcome = STRATEGIES["best_probes"].search(SPACE, replayed, Budget())
    assert outcome.selection.pick == BEST
    assert sorted(c.steps for c in outcome.curves) == [32, 32, 64, 64]
    assert STRATEGIES["halving"].search(SPACE, trainer(), Budget()).selection.pick == BEST


def test_the_laws_pick_where_the_config_says_laws():
    # The name was once given to what picked by the probes' losses, whatever the laws said.
    by_laws = STRATEGIES["laws"].search(SPACE, trainer(), Budget())
    assert by_laws.final is None
    lowest = min((c for c in by_laws.selection.candidates if c.kept), key=lambda c: c.predicted_loss)
    assert loss(by_laws.selection.pick, 4096) <= 1.05 * loss(lowest.ranks, 4096)
    assert by_laws.selection.method == "laws"
    assert STRATEGIES["paper"].search(SPACE, trainer(), Budget()).selection.method == "paper"


def test_separate_rates_keep_the_factor_of_the_best_run():
    outcome = STRATEGIES["separate_rates"].search(SPACE, trainer(), Budget())
    assert outcome.final.configuration.factors == {}
    assert [c.configuration.factors for c in outcome.curves] == [
        {}, {"vision": 1 / 3}, {"vision": 3.0}, {"llm": 1 / 3}, {"llm": 3.0},
    ]  # fmt: skip


def test_a_search_whose_runs_all_diverge_names_them_and_the_rates():
    dead = [
        Curve(c, (EvalPoint(0, 3.0), EvalPoint(8, math.nan, alive=False, reason="the validation loss was not finite")))
        for c in SPACE.every()
    ]
    with pytest.raises(
        NoValidResultError, match=r"no final run came to its end \(vision\d.*not finite.*Lower finetune"
    ):
        STRATEGIES["random"].search(SPACE, RecordedTrainer(dead), Budget())


def test_restarts_keep_the_seed_of_the_best_run():
    ends = {0: 1.0, 1: 0.9, 2: 0.7, 3: 0.8}
    drawn = [dataclasses.replace(SPACE.middle, seed=seed) for seed in ends]
    curves = [Curve(one, (EvalPoint(0, 3.0), EvalPoint(STEPS, ends[one.seed]))) for one in drawn]
    outcome = STRATEGIES["restarts"].search(SPACE, RecordedTrainer(curves), Budget())
    assert (outcome.selection.pick, outcome.selection.seed) == (SPACE.middle.ranks, 2)
    assert outcome.final.configuration.name == "vision8-projector8-llm8-seed2"
    twice = STRATEGIES["restarts"].search(SPACE, RecordedTrainer(curves), Budget(runs=2))
    assert twice.selection.seed == 1


class Smallest:
    """A strategy of somebody else's: the smallest ranks, trained."""

    name = "smallest"
    probes = "none"
    takes_budget = False
    needs_convergence = False

    def begins(self, space, budget):
        return 1

    def search(self, space, trainer, budget):
        configuration = space.configuration({module: min(space.grids[module]) for module in space.searched})
        (final,) = trainer.train([configuration], Patience())
        ranks = space.of_adapted(configuration.ranks)
        return Outcome(
            without_laws(self.name, ranks, space.num_samples, "the smallest were asked for"), final, (final,)
        )


def test_a_strategy_from_outside_is_one_registration(monkeypatch):
    monkeypatch.setattr(STRATEGIES, "_members", dict(STRATEGIES._members))
    with pytest.raises(ConfigError, match=r"strategy \(selection.method\) is 'smallest'; allowed: best_probes"):
        STRATEGIES["smallest"]
    STRATEGIES.register(Smallest())
    outcome = STRATEGIES["smallest"].search(SPACE, trainer(), Budget())
    assert outcome.selection.pick == {"vision": 2, "projector": 8, "llm": 2}


def test_a_configuration_that_was_not_recorded_is_refused():
    with pytest.raises(ConfigError, match="no final run of vision3-projector8-llm2 was recorded"):
        trainer().train([SPACE.configuration({"vision": 3, "llm": 2})], Patience())


def test_replayed_curves_stop_where_a_rule_stops_them():
    points = [EvalPoint(step, loss) for step, loss in ((0, 4.0), (8, 1.0), (16, 1.5), (24, 1.6))]
    (seen,) = RecordedTrainer([Curve(SPACE.every()[0], tuple(points))]).train([SPACE.every()[0]], Patience(2.0))
    assert [point.step for point in seen.points] == [0, 8, 16]
    assert np.isfinite(seen.loss)


# Rates and frozen modules to choose from.

RATED = dataclasses.replace(
    SPACE,
    grids={"vision": (0, 8, 32), "projector": (8,), "llm": (2, 8)},
    factors={"vision": (0.3, 1.0, 3.0), "llm": (0.3, 3.0)},
    probed=rank_vectors({"vision": (0, 8, 32), "projector": (8,), "llm": (2, 8)}, corners=True),
)
TRAINING = [name for name in STRATEGIES.names if STRATEGIES[name].probes != "losses"]


def rated_loss(configuration):
    """Lowest with vision frozen and the LLM at rank 8, three times its learning rate."""
    vision = 0.2 + abs(math.log(configuration.factors.get("vision", 1.0))) if configuration.ranks["vision"] else 0.0
    llm = abs(math.log(configuration.factors.get("llm", 1.0) / 3.0)) + abs(configuration.ranks["llm"] - 8)
    return 1.0 + 0.1 * vision + 0.1 * llm


def rated_trainer():
    def recorded(configuration):
        end = rated_loss(configuration)
        return Curve(configuration, tuple(EvalPoint(step, end + 3.0 * (1 - step / STEPS)) for step in range(0, 65, 8)))

    return RecordedTrainer(map(recorded, [*RATED.every(), *restarts_of(RATED)]))


def test_every_configuration_of_a_space_with_rates_is_listed_once():
    every = RATED.every()
    # A frozen module has no rate: 2 x (1 + 2 x 3) combinations of vision and LLM ranks, two LLM rates each.
    assert len({configuration.name for configuration in every}) == len(every) == 2 * (1 + 2 * 3) * 2
    assert all("vision" not in c.factors for c in every if not c.ranks["vision"])
    # 0.3 is nearer to 1 than 3 is; a factor of 1 is left out.
    assert RATED.configuration({"vision": 8, "llm": 2}).factors == {"llm": 3.0}
    assert RATED.configuration({"vision": 8, "llm": 2}, {"llm": 0.3, "vision": 1.0}).factors == {"llm": 0.3}
    few = dataclasses.replace(RATED, only=frozenset(one.name for one in every[3:5]))
    assert few.every() == every[3:5]
    bare = dataclasses.replace(SPACE, grids={"vision": (0, 2), "llm": (0, 2)}).every()
    assert [c.ranks for c in bare] == [{"vision": 0, "llm": 2}, {"vision": 2, "llm": 0}, {"vision": 2, "llm": 2}]


@pytest.mark.parametrize("name", TRAINING)
def test_the_pick_keeps_the_rates_of_its_run(name):
    outcome = STRATEGIES[name].search(RATED, rated_trainer(), Budget())
    assert outcome.selection.factors == outcome.final.configuration.factors
    pick = {module: outcome.selection.pick[module] for module in RATED.grids}
    assert pick == outcome.final.configuration.ranks
    assert outcome.final.loss == min(c.loss for c in outcome.curves if c.steps == STEPS)


def test_a_search_finds_that_a_module_is_best_left_frozen_and_another_trained_faster():
    best = {"vision": 0, "projector": 8, "llm": 8}
    whole = STRATEGIES["random"].search(RATED, rated_trainer(), Budget(runs=len(RATED.every())))
    assert (whole.selection.pick, whole.selection.factors) == (best, {"llm": 3.0})
    assert "vision 0, projector 8, llm 8 at 3 times its learning rate" in whole.selection.explanation
    halved = STRATEGIES["halving"].search(RATED, rated_trainer(), Budget())
    assert {c.configuration.factors["llm"] for c in halved.curves} == {0.3, 3.0}
    assert {c.configuration.factors.get("vision") for c in halved.curves} == {None, 0.3, 3.0}
    assert (halved.selection.pick, halved.selection.factors) == (best, {"llm": 3.0})
    by_tpe = STRATEGIES["tpe"].search(RATED, rated_trainer(), Budget(runs=20))
    assert rated_loss(by_tpe.final.configuration) <= rated_loss(RATED.configuration(best, {"llm": 3.0})) + 0.15


def test_spread_configurations_begin_in_the_middle_with_frozen_modules_and_spread_step_sizes():
    first = spread_configurations(RATED, 4)
    assert first[0].ranks == RATED.middle.ranks
    frozen = [module for module in RATED.searched if 0 in RATED.grids[module]]
    assert [one.ranks for one in first[1 : 1 + len(frozen)]] == [{**RATED.middle.ranks, m: 0} for m in frozen]
    more = spread_configurations(RATED, 20)
    assert more[:4] == first
    assert len({one.name for one in more}) == 20
    for module, grid in RATED.grids.items():
        if len(grid) > 1:
            steps = sorted(one.ranks[module] * one.factors.get(module, 1.0) for one in more if one.ranks[module])
            assert steps[0] < sorted(grid)[len(grid) // 2] < steps[-1]
    everything = spread_configurations(RATED, 1000)
    assert {one.name for one in everything} == {one.name for one in RATED.every()}


def test_spread_configurations_are_among_those_that_may_be_chosen():
    only = frozenset(one.name for one in RATED.every()[::3])
    chosen = spread_configurations(dataclasses.replace(RATED, only=only), 5)
    assert len(chosen) == 5
    assert {one.name for one in chosen} <= only


def test_of_raced_runs_that_end_alike_the_smallest_is_picked():
    samples = np.random.default_rng(0).exponential(1.0, 100)

    def ended(configuration, loss, noise):
        shares = samples / samples.mean() * loss + noise * np.random.default_rng(configuration.ranks["llm"]).normal(
            size=100
        )
        points = [
            EvalPoint(step, loss + 1 - step / STEPS, sample_losses=tuple(shares)) for step in range(0, STEPS + 1, 8)
        ]
        return Curve(configuration, tuple(points))

    def picked(noise):
        ends = {2: 1.01, 8: 1.0, 32: 1.005}
        curves = [ended(one, ends[one.ranks["llm"]], noise) for one in SPACE.every()]
        return STRATEGIES["race"].search(SPACE, RecordedTrainer(curves), Budget(9)).selection

    assert picked(0.0).pick["llm"] == 8
    alike = picked(0.3)
    assert alike.pick == {"vision": 2, "projector": 8, "llm": 2}
    assert "equal within the noise of the validation samples" in alike.explanation
    assert "The pick has the fewest parameters" in alike.explanation


RATES_ALONE = dataclasses.replace(
    RATED, grids={"vision": (8,), "projector": (8,), "llm": (8,)}, probed=[{"vision": 8, "projector": 8, "llm": 8}]
)


@pytest.mark.parametrize("name", TRAINING)
def test_rates_alone_may_be_searched(name):
    curves = []
    for configuration in [*RATES_ALONE.every(), *restarts_of(RATES_ALONE)]:
        end = rated_loss(configuration)
        curves.append(Curve(configuration, tuple(EvalPoint(step, end + 3.0 - step / 32) for step in range(0, 65, 8))))
    selection = STRATEGIES[name].search(RATES_ALONE, RecordedTrainer(curves), Budget()).selection
    assert selection.pick == {"vision": 8, "projector": 8, "llm": 8}
    assert set(selection.factors) <= {"vision", "llm"}
    if name in ("separate_rates", "halving"):
        assert selection.factors == {"llm": 3.0}
