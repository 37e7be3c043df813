"""A whole job with a convergence rule, a data format, a strategy and an adapter method from outside the package."""

import json
import subprocess
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

import mars_jax
from mars_jax import cli
from mars_jax.adapters.method import AdapterMethod, Context, Leaf, Leaves, Rank, dense
from mars_jax.adapters.registry import METHODS
from mars_jax.adapters.targets import Target, Targets
from mars_jax.data.formats.base import Conversation, Format, Keys, Turn
from mars_jax.data.formats.registry import FORMATS
from mars_jax.lanes.stopping import Patience
from mars_jax.laws.convergence.base import Convergence, Rule
from mars_jax.laws.convergence.registry import RULES
from mars_jax.runtime.jsonfiles import read_json
from mars_jax.runtime.trees import Tree, flatten, unflatten
from mars_jax.search.selection import without_laws
from mars_jax.search.strategies.base import Outcome
from mars_jax.search.strategies.registry import STRATEGIES
from tests.helpers import tiny_job


class TwoFactors(AdapterMethod):
    """`y = x W + x down up + bias`, down [in, R] and up [R, out]: no scale, and leaves of names of its own."""

    name = "two_factors"
    has_ranks = True
    padding_is_exact = True

    def leaves(self, target: Target, columns: int) -> dict[str, Leaf]:
        layers = () if target.num_layers is None else (target.num_layers,)
        shapes = {"down": (*layers, target.d_in, columns), "up": (*layers, columns, target.d_out)}
        return {name: Leaf(shape) for name, shape in shapes.items()} if columns else {}

    def init(
        self,
        key: Array,
        targets: Targets,
        ranks: Mapping[str, Rank],
        columns: Mapping[str, int],
        kernels: Mapping[str, Array],
    ) -> Tree:
        flat = {}
        for number, (path, target) in enumerate(targets.items()):
            size = columns[target.module]
            for name, leaf in self.leaves(target, size).items():
                flat[f"{path}/{name}"] = jnp.zeros(leaf.shape)
                if name == "down":
                    # A column at a time: the leaves of fewer columns are the leading parts of those of more.
                    keys = jax.random.split(jax.random.fold_in(key, number), 64)[:size]
                    drawn = [0.1 * jax.random.normal(k, leaf.shape[:-1]) for k in keys]
                    used = [jnp.where(i < ranks[target.module], column, 0.0) for i, column in enumerate(drawn)]
                    flat[f"{path}/down"] = jnp.stack(used, axis=-1)
        return unflatten(flat)

    def apply(self, x: Array, kernel: Array, bias: Array | None, leaves: Leaves, context: Context) -> Array:
        return dense(x, kernel, bias) + dense(dense(x, leaves["down"], None), leaves["up"], None)

    def delta(self, kernel, leaves):
        return leaves["down"] @ leaves["up"]

    def flops(self, target: Target, rank: int, rows: float, *, trains: bool, moves: bool) -> float:
        return 2.0 * rows * rank * (target.d_in + target.d_out) * (1 + trains + moves)


def fallen(steps, curve, end, epsilon, sustain):
    """A convergence rule: the first eval point whose validation loss is lower than the first one's by this share."""
    low = curve <= (1 - epsilon) * curve[0]
    return Convergence(jnp.where(low.any(), steps[jnp.argmax(low)], steps[-1]), ~low.any())


FALLEN = Rule(
    "fallen",
    fallen,
    lambda points, adapted: {module: [p.validation_loss for p in points] for module in adapted},
    needs_single_module=False,
    needs_swaps=False,
    epsilon=0.05,
)


def read_survey(row, num_pictures):
    """A conversation from the columns photo, question and reply."""
    turns = Turn("user", f"<image>\n{row['question']}"), Turn("assistant", row["reply"])
    return Conversation(turns, [row["photo"]])


SURVEY = Format(
    name="survey",
    keys=Keys(row=frozenset({"photo", "question", "reply"})),
    detect=lambda row: {"photo", "question", "reply"} <= row.keys(),
    read=read_survey,
)


class Steepest:
    """A strategy: probes, fits the laws, and trains the ranks whose probe fell furthest, from the smallest D."""

    name = "steepest"
    probes = "losses"
    takes_budget = False
    needs_convergence = True

    def begins(self, space, budget):
        return 1

    def search(self, space, trainer, budget):
        records = trainer.probe(space.probed, space.sizes)
        space.fit(records)
        best = min((r for r in records if r.num_samples == min(space.sizes)), key=lambda record: record.best_loss)
        (final,) = trainer.train([space.configuration(best.ranks)], Patience(None))
        pick = space.of_adapted(best.ranks)
        return Outcome(
            without_laws(self.name, pick, space.num_samples, "its first probe fell furthest"), final, (final,)
        )


def main():
    """The command, as a script of somebody else's would start it."""
    METHODS.register(TwoFactors())
    RULES.register(FALLEN)
    FORMATS.register(SURVEY)
    STRATEGIES.register(Steepest())
    cli.main()


def as_survey(path):
    rows = [
        {"id": row["id"], "photo": row["image"], "question": "what colour?", "reply": row["conversations"][-1]["value"]}
        for row in json.loads(path.read_text())
    ]
    path.write_text(json.dumps(rows))
    return path


def test_a_whole_job_runs_with_a_rule_a_format_a_strategy_and_a_method_from_outside(tmp_path):
    run = tmp_path / "run"
    config = tiny_job.config(
        tmp_path / "a.yaml",
        tiny_job.checkpoint(tmp_path / "base"),
        as_survey(tiny_job.records(tmp_path / "data", 60)),
        run,
        adapter={"method": "two_factors"},
        convergence={"rule": "fallen", "epsilon": None},
        selection={"method": "steepest", "sweep": None},
    )
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_extending import main; main()", "run", config, "--json"],
        capture_output=True,
        text=True,
        env=tiny_job.environment(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert read_json(run / "data.json")["formats"] == ["survey"]
    lanes = map(json.loads, (run / "probes" / "lanes.jsonl").read_text().splitlines())
    records = [mars_jax.LaneRecord.from_json(row) for row in lanes]
    assert all(record.convergence_steps.keys() == {"vision", "projector", "llm"} for record in records)
    first = min((r for r in records if r.num_samples == 8), key=lambda record: record.best_loss)
    selection = read_json(run / "selection.json")
    assert (selection["method"], selection["pick"]) == ("steepest", dict(first.ranks))
    assert document["pick"] == dict(first.ranks)
    summary = read_json(run / "finetune" / "summary.json")
    assert (summary["ranks"], summary["from_sweep"]) == (dict(first.ranks), True)
    adapters = mars_jax.read_adapters(run / "finetune" / "adapters.safetensors")
    assert {path.rpartition("/")[2] for path in flatten(adapters)} == {"down", "up"}
    conditions = document["test"]
    assert conditions["finetuned"]["loss"] < conditions["base"]["loss"] - 0.3
    # PEFT has no format for it, so its result is the merged checkpoint.
    assert "adapter" not in document
    _, base = mars_jax.read_checkpoint(tmp_path / "base", "float32")
    _, merged = mars_jax.read_checkpoint(document["merged"], "float32")
    path = "llm/layers/self_attn/v_proj"
    kernel = flatten(base)[f"{path}/kernel"] + TwoFactors().delta(
        None, {name: flatten(adapters)[f"{path}/{name}"] for name in ("down", "up")}
    )
    assert jnp.allclose(flatten(merged)[f"{path}/kernel"], kernel, atol=1e-6)
    assert (run / "report" / "index.html").is_file()
