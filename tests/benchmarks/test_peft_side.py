"""The PyTorch side of the benchmarks trains the same lanes: its losses against JAX and optax, without the engine."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.speed import peft_side, peft_vmapped
from mars_jax.adapters import lora
from mars_jax.adapters.targets import find_targets
from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable
from mars_jax.config.schema import OptimizerConfig
from mars_jax.data.examples import ExampleSource
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.data.records import load_records
from mars_jax.data.shapes import plan_shapes
from mars_jax.hub.read import read_checkpoint
from mars_jax.lanes.step import mean_loss
from mars_jax.models.families.llava.model import LlavaOnevision
from mars_jax.runtime.trees import flatten, unflatten
from tests.helpers import tiny_job

# peft 0.21 reads an attribute that transformers 5.23 has renamed; torch says where vmap loops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

TOLERANCE = 1e-4
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
PATTERNS = {
    "vision": ["vision/layers/mlp/fc[12]"],
    "projector": ["projector/linear_2"],
    "llm": ["llm/layers/self_attn/[qv]_proj", "llm/layers/mlp/up_proj"],
}
ALPHA = lora.AlphaRule()
# Norms of the gradients are above the clip, and decay is large enough to tell where it is applied.
OPTIMIZER = OptimizerConfig(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, clip_norm=0.05)
RATES = {"vision": 0.02, "projector": 0.01, "llm": 0.03}
MULTIPLIERS = np.array([0.5, 1.0, 1.0, 0.7, 0.4], np.float32)
EVAL_STEPS = [0, 2, 5]
ALL = {"vision": 3, "projector": 2, "llm": 4}
LANES = {"all": (ALL, 0), "llm_only": ({"vision": 0, "projector": 0, "llm": 2}, 1)}


class Job:
    """A tiny checkpoint, five batches and two validation batches of its data."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint = tiny_job.checkpoint(directory / "base")
        preprocessor = load_preprocessor(self.checkpoint)
        records = load_records(tiny_job.records(directory, 24), directory)
        source = ExampleSource(records, preprocessor, plan_shapes(records, preprocessor).shapes)
        batches = [self._stack([source[4 * i + row] for row in range(4)]) for i in range(6)]
        # Longer than needed, as batches are that share shapes with other data.
        batches = [self._longer(batch, preprocessor.tokenizer.pad_token_id) for batch in batches]
        self.batches, last = batches[:5], batches[5]
        half = {**last, "target_weights": last["target_weights"] * np.array([[1], [1], [0], [0]], np.float32)}
        self.validation = self._stack([batches[0], half])
        config, base = read_checkpoint(self.checkpoint, "float32")
        self.model, self.base = LlavaOnevision(config), jax.device_put(base)
        self.targets = find_targets(self.base, PATTERNS)

    @staticmethod
    def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @staticmethod
    def _longer(batch: dict[str, np.ndarray], pad: int) -> dict[str, np.ndarray]:
        fill = {"tokens": pad, "image_index": -1, "image_weight": 0}
        room = {name: [(0, 0), (0, 3), (0, 0)][: batch[name].ndim] for name in fill}
        return batch | {name: np.pad(batch[name], room[name], constant_values=fill[name]) for name in fill}

    def grid(self, head: peft_side.Head = "all") -> peft_side.PeftGrid:
        settings = peft_side.TorchSettings(threads=1, head=head)
        return peft_side.PeftGrid(self.checkpoint, self.targets, ALPHA, OPTIMIZER, (28, 28), settings)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return Job(tmp_path_factory.mktemp("peft_side"))


@pytest.fixture(scope="module")
def reference(job) -> dict[str, tuple[list[float], list[float]]]:
    """Losses of the five steps and of the eval points of every lane."""
    adamw = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.scale_by_adam(OPTIMIZER.b1, OPTIMIZER.b2, OPTIMIZER.eps),
        optax.add_decayed_weights(OPTIMIZER.weight_decay),
    )

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def step(trainable: Any, scales: Any, state: Any, batch: Any, multiplier: Any) -> Any:
        def loss(trainable: Any) -> Any:
            return mean_loss(job.model, job.base, join_trainable(trainable, scales), batch)

        value, gradients = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, state = adamw.update(gradients, state, trainable)
        rates = unflatten({path: RATES[path.split("/")[0]] for path in flatten(trainable)})
        moved = jax.tree.map(lambda p, u, rate: p - multiplier * rate * u, trainable, updates, rates)
        return value, optax.tree.norm(gradients), moved, state

    return {name: reference_lane(job, adamw, step, *lane) for name, lane in LANES.items()}


def reference_lane(
    job: Job, adamw: optax.GradientTransformation, step: Any, ranks: dict[str, int], seed: int
) -> tuple[list[float], list[float]]:
    # Padded, so that one compilation serves all lanes.
    adapters = init_adapters(jax.random.key(seed), job.targets, ranks, lora.Lora(ALPHA), ALL)
    trainable, scales = split_trainable(adapters)
    state, losses, validation_losses = adamw.init(trainable), [], []
    for done in range(EVAL_STEPS[-1] + 1):
        if done in EVAL_STEPS:
            halves = [{name: leaf[v] for name, leaf in job.validation.items()} for v in range(2)]
            values = [float(step(trainable, scales, state, half, jnp.float32(0.0))[0]) for half in halves]
            validation_losses.append(
                float(np.average(values, weights=[half["target_weights"].sum() for half in halves]))
            )
        if done < EVAL_STEPS[-1]:
            multiplier = jnp.asarray(MULTIPLIERS[done])
            value, norm, trainable, state = step(trainable, scales, state, job.batches[done], multiplier)
            losses.append(float(value))
            assert norm > OPTIMIZER.clip_norm  # so that it clips
    return losses, validation_losses


def train(job: Job, grid: peft_side.PeftGrid, lane: str, **options: Any) -> peft_side.LaneResult:
    data = peft_side.LaneData(job.batches, grid.encode_all(job.validation), MULTIPLIERS, RATES, EVAL_STEPS)
    return grid.train_lane(*LANES[lane], data, **options)


@pytest.mark.parametrize("head", ["all", "supervised"])
def test_lanes_one_after_the_other_equal_jax_and_leave_the_base(job, reference, head):
    grid = job.grid(head)
    before = {name: tensor.clone() for name, tensor in grid.model.state_dict().items()}
    for name in ["all", "llm_only", "all"]:
        result = train(job, grid, name)
        losses, validation_losses = reference[name]
        assert max(losses) - min(losses) > 0.1  # it trains, so that equal losses say something
        np.testing.assert_allclose(result.losses, losses, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(
            [row["validation_loss"] for row in result.rows], validation_losses, rtol=0, atol=TOLERANCE
        )
        assert [row["step"] for row in result.rows] == EVAL_STEPS
        assert result.rows[0]["train_loss"] is None
        assert result.rows[2]["train_loss"] == pytest.approx(np.mean(losses[2:]), abs=TOLERANCE)
    after = grid.model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in grid.model.parameters())


def test_tokens_and_seconds_count_what_was_run(job):
    grid = job.grid()
    pad = load_preprocessor(job.checkpoint).tokenizer.pad_token_id
    tokens = [int((batch["tokens"] != pad).sum()) for batch in job.batches]
    assert grid.encode(job.batches[0]).labels.shape[1] == job.batches[0]["tokens"].shape[1] - 3

    result = train(job, grid, "all", stop=lambda rows: rows[-1]["step"] == 2)

    assert len(result.losses) == 2
    assert [row["step"] for row in result.rows] == [0, 2]
    assert result.tokens == sum(tokens[:2])
    assert result.eval_tokens == 2 * int((job.validation["tokens"] != pad).sum())
    assert min(result.setup_seconds, result.step_seconds, result.eval_seconds, result.cpu_seconds) > 0


def test_repeated_steps_equal_vmapped_ones(job):
    grid = job.grid()
    batch = grid.encode(job.batches[0])
    alone = [grid.repeat_step(*lane, batch, RATES, 4) for lane in LANES.values()]
    together = peft_vmapped.repeat_step_vmapped(grid, list(LANES.values()), batch, RATES, 4)
    assert np.ptp(alone[0].losses) > 0.1
    np.testing.assert_allclose(together.losses, np.hstack([a.losses for a in alone]), rtol=0, atol=TOLERANCE)
    assert len(together.seconds) == len(alone[0].seconds) == 4


def test_refuses_other_picture_sizes_and_scales_that_differ(job):
    grid = job.grid()
    settings = peft_side.TorchSettings(threads=1)
    wrong = peft_side.PeftGrid(job.checkpoint, job.targets, lora.AlphaRule("rslora"), OPTIMIZER, (28, 56), settings)
    with pytest.raises(ValueError, match=r"image tokens that are not the \d+ of height and width \(28, 56\)"):
        wrong.encode(job.batches[0])
    with pytest.raises(ValueError, match="'rslora' gives ranks different scales"):
        peft_vmapped.repeat_step_vmapped(wrong, list(LANES.values()), grid.encode(job.batches[0]), RATES, 1)
