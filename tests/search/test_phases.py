"""What the phases of a search refuse before anything runs."""

import pytest

from mars_jax.config.load import load_config
from mars_jax.errors import ConfigError
from mars_jax.pipeline import run_pipeline
from mars_jax.runtime.progress import Reporter
from mars_jax.search import phases
from mars_jax.search.phases import check_probes, check_strategy
from tests.helpers import tiny_job


def config(folder, *overrides):
    path = tiny_job.config(folder / "a.yaml", folder / "base", folder / "train.json", folder / "run")
    return load_config(path, ["selection.sweep=null", *overrides])


def test_the_papers_method_without_a_rule_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        check_strategy(config(tmp_path, "selection.method=paper", "convergence.rule=null", "convergence.epsilon=null"))
    text = "selection.method: paper balances the modules' convergence, which convergence.rule: null doesn't measure."
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("method", ["laws", "paper", "uniform", "separate_rates"])
def test_a_number_of_final_runs_was_ignored_by_a_strategy_that_begins_none(tmp_path, method):
    with pytest.raises(ConfigError, match=f"selection.sweep is 3, but selection.method: {method} picks without"):
        check_strategy(config(tmp_path, f"selection.method={method}", "selection.sweep=3"))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("lora.modules.llm.rates=[0.3, 1, 3]", "lora.modules.llm.rates"),
        ("lora.modules.vision.ranks=[0, 4]", "rank 0 in lora.modules.vision.ranks"),
    ],
)
@pytest.mark.parametrize("method", ["best_probes", "laws", "paper"])
def test_rates_and_frozen_modules_are_refused_by_what_fits_laws_of_ranks(tmp_path, method, setting, named):
    with pytest.raises(ConfigError) as error:
        check_strategy(config(tmp_path, f"selection.method={method}", setting))
    assert str(error.value) == (
        f"selection.method: {method} chooses by laws of ranks alone, and can't choose from {named}. Choose a method "
        "that trains what it chooses from (race, laws+race, halving, random, restarts, uniform, separate_rates, tpe, "
        "gp, hyperband), or give each module one rate and ranks above 0."
    )
    for training in ("halving", "random", "tpe", "uniform", "separate_rates"):
        check_strategy(config(tmp_path, f"selection.method={training}", setting))


def test_one_rate_of_a_module_is_used_as_it_is(tmp_path):
    found = config(tmp_path, "lora.modules.llm.rates=[0.5]", "optimizer.learning_rate=0.02")
    assert found.learning_rates() == {"vision": 0.02, "projector": 0.02, "llm": 0.01}
    assert found.learning_rates(0.1) == {"vision": 0.1, "projector": 0.1, "llm": 0.05}
    assert not found.lora.factors
    check_strategy(found)


def test_an_unknown_strategy_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is 'best_probe'; allowed: best_probes, laws, .* Did you mean 'best_probes'"
    ):
        check_strategy(config(tmp_path, "selection.method=best_probe"))


def test_probes_are_refused_where_no_strategy_asks_for_them(tmp_path):
    with pytest.raises(ConfigError, match=r"selection\.method: random picks without probes"):
        check_probes(config(tmp_path, "selection.method=random"))
    check_probes(config(tmp_path))


class Notices(Reporter):
    """Keeps what it is given."""

    def __init__(self):
        self.texts = []

    def notice(self, text):
        self.texts.append(text)


def test_a_plan_of_other_data_or_of_another_machine_passed_for_this_one(tmp_path, monkeypatch):
    tiny_job.checkpoint(tmp_path / "base")
    tiny_job.records(tmp_path, 60)

    def plan_is_made():
        reporter = Notices()
        run_pipeline("plan", config(tmp_path), reporter)
        return "plan: done before, skipped" not in reporter.texts

    assert plan_is_made()
    assert not plan_is_made()
    tiny_job.records(tmp_path, 66)
    assert plan_is_made()
    assert not plan_is_made()
    monkeypatch.setattr(phases, "physical_memory_bytes", lambda: 2**50)
    assert plan_is_made()
