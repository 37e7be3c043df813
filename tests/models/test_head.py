"""What the decoder's end saves: cross-entropy without kept logits, and a last layer for supervised positions only."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mars_jax.adapters.targets import find_targets
from mars_jax.adapters.tree import init_adapters
from mars_jax.models import head
from mars_jax.models.configs import TextConfig
from mars_jax.models.decoder import Qwen2Decoder, take_positions
from mars_jax.models.head import frozen_head_losses
from mars_jax.models.layers import REMAT_POLICIES
from mars_jax.runtime.trees import flatten, unflatten

ROWS, WIDTH, WORDS = 13, 8, 50
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def case(seed=0, rows=ROWS):
    """Hidden states, kernel, targets and weights, some of them zero."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(0.0, 2.0, (rows, WIDTH)).astype(np.float32),
        rng.normal(0.0, 1.0, (WIDTH, WORDS)).astype(np.float32),
        rng.integers(0, WORDS, rows).astype(np.int32),
        rng.choice(np.float32([0.0, 0.5, 1.0]), rows),
    )


def frozen_loss(hidden, kernel, targets, weights):
    return frozen_head_losses(hidden, kernel, targets, weights).sum()


def plain_loss(hidden, kernel, targets, weights):
    logits = (hidden @ kernel).astype(jnp.float32)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()


@pytest.fixture(params=[None, 4 * WORDS, 1], ids=["whole", "pieces of 4 rows", "row by row"])
def _pieces(request, monkeypatch):
    """Runs a test with all rows at once, and with pieces that don't divide the rows."""
    if request.param:
        monkeypatch.setattr(head, "_MAX_LOGITS", request.param)


@pytest.mark.usefixtures("_pieces")
def test_the_loss_and_its_gradient_are_those_of_optax():
    hidden, kernel, targets, weights = case()
    # Scaled from above, as a mean or a sum over parts scales it.
    for loss in (lambda f, *a: f(*a), lambda f, *a: 0.3 * f(*a) ** 2):
        value, gradient = jax.value_and_grad(lambda x, loss=loss: loss(frozen_loss, x, kernel, targets, weights))(
            hidden
        )
        expected, slope = jax.value_and_grad(lambda x, loss=loss: loss(plain_loss, x, kernel, targets, weights))(hidden)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())
    assert not np.asarray(gradient)[weights == 0].any()
    assert np.asarray(gradient)[weights > 0].any(axis=1).all()


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("same_targets", [True, False])
def test_lanes_together_have_the_losses_and_gradients_of_lanes_alone(same_targets):
    cases = [case(seed) for seed in range(3)]
    kernel = cases[0][1]
    hidden, targets, weights = (np.stack([each[i] for each in cases]) for i in (0, 2, 3))
    axes = (0, None, None if same_targets else 0, 0)
    chosen = targets[0] if same_targets else targets
    together = jax.vmap(jax.value_and_grad(frozen_loss), in_axes=axes)(hidden, kernel, chosen, weights)
    for k in range(3):
        lane = (hidden[k], kernel, targets[0 if same_targets else k], weights[k])
        value, gradient = jax.value_and_grad(plain_loss)(*lane)
        np.testing.assert_allclose(together[0][k], value, rtol=1e-6)
        np.testing.assert_allclose(together[1][k], gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


def test_lanes_of_the_same_hidden_states_may_differ_in_their_targets():
    hidden, kernel, *_ = case()
    targets = np.stack([case(seed)[2] for seed in (1, 2)])
    weights = np.ones(ROWS, np.float32)
    losses = jax.vmap(frozen_loss, in_axes=(None, None, 0, None))(hidden, kernel, targets, weights)
    expected = [plain_loss(hidden, kernel, each, weights) for each in targets]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_lanes_with_heads_of_their_own_are_refused():
    hidden, kernel, targets, weights = case()
    with pytest.raises(NotImplementedError, match="lanes share one head"):
        jax.vmap(frozen_loss, in_axes=(None, 0, None, None))(hidden, kernel[None], targets, weights)


def test_hidden_states_of_half_precision_have_a_loss_of_full_and_a_gradient_of_their_own():
    hidden, kernel, targets, weights = case()
    half = jnp.asarray(hidden, jnp.bfloat16)
    value, gradient = jax.value_and_grad(frozen_loss)(half, kernel, targets, weights)
    expected, slope = jax.value_and_grad(plain_loss)(hidden, kernel, targets, weights)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, expected, rtol=0.02)
    np.testing.assert_allclose(gradient.astype(jnp.float32), slope, atol=0.05 * np.abs(slope).max())


# Through the decoder.

BATCH, LENGTH = 2, 6
POSITIONS = np.int32([[2, 5, 5], [0, 3, 1]])


def decoder(num_layers, tied=True, remat="none", patterns=("layers/.*_proj",)):
    """A random decoder, its parameters and adapters."""
    model = Qwen2Decoder(TextConfig(WORDS, 16, 24, num_layers, 2, 1, 8, tie_word_embeddings=tied), remat)
    tokens = np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, method=_all_parts)["params"])
    rng = np.random.default_rng(0)
    base = unflatten(
        {
            path: rng.normal(1.0 if path.endswith("/scale") else 0.0, 0.3, leaf.shape).astype(np.float32)
            for path, leaf in flatten(shapes).items()
        }
    )
    targets = find_targets(base, {"llm": list(patterns)})
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), targets, {"llm": 3}))
    adapters = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), adapters)
    return model, base, adapters


def _all_parts(model, tokens):
    return model.head(model.hidden(model.embed(tokens)))


def at_positions(model, embeddings):
    return model.hidden_at(embeddings, POSITIONS)


def gathered(model, embeddings):
    return take_positions(model.hidden(embeddings), POSITIONS)


@cache
def value_and_gradients(num_layers, remat, method):
    """Hidden states, and the gradients of a random weighing of them with respect to every adapter."""
    model, base, adapters = decoder(num_layers, remat=remat)
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(BATCH, LENGTH, 16)).astype(np.float32)
    weighing = rng.normal(size=(BATCH, POSITIONS.shape[1], 16)).astype(np.float32)

    def weighed(adapters):
        hidden = model.apply({"params": base, "lora": adapters}, embeddings, method=method)
        return (hidden * weighing).sum(), hidden

    (_, hidden), gradients = jit(jax.value_and_grad(weighed, has_aux=True))(adapters)
    return hidden, flatten(gradients)


def assert_same_end(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for path, gradient in expected[1].items():
        largest = np.abs(gradient).max()
        assert largest > 0
        np.testing.assert_allclose(found[1][path], gradient, rtol=1e-4, atol=1e-5 * largest, err_msg=path)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_last_layer_at_some_positions_gives_the_hidden_states_and_gradients_of_the_whole(num_layers):
    found = value_and_gradients(num_layers, "none", at_positions)
    assert_same_end(found, value_and_gradients(num_layers, "none", gathered))


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_rematerialised_layers_give_the_same_gradients(remat):
    assert_same_end(value_and_gradients(3, remat, at_positions), value_and_gradients(3, "none", gathered))


def test_a_decoder_without_adapters_has_hidden_states_at_positions_too():
    model, base, _ = decoder(2)
    embeddings = np.random.default_rng(1).normal(size=(BATCH, LENGTH, 16)).astype(np.float32)

    @jit
    def both(base):
        return [model.apply({"params": base}, embeddings, method=method) for method in (at_positions, gathered)]

    np.testing.assert_allclose(*both(base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "patterns"),
    [(True, ["layers/.*_proj"]), (False, ["layers/.*_proj"]), (False, ["layers/.*_proj", "lm_head"])],
    ids=["tied", "frozen", "adapted"],
)
def test_every_kind_of_head_has_the_loss_and_gradients_of_its_logits(tied, patterns):
    model, base, adapters = decoder(1, tied, patterns=patterns)
    _, _, targets, weights = case(rows=BATCH * 3)
    embeddings = np.random.default_rng(1).normal(size=(BATCH, LENGTH, 16)).astype(np.float32)

    def ours(model, embeddings):
        return model.losses(at_positions(model, embeddings).reshape(-1, 16), targets, weights).sum()

    def plain(model, embeddings):
        logits = model.head(gathered(model, embeddings).reshape(-1, 16))
        return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()

    def run(method):
        def loss(adapters):
            return model.apply({"params": base, "lora": adapters}, embeddings, method=method)

        return jit(jax.value_and_grad(loss))(adapters)

    (value, gradients), (expected, slopes) = run(ours), run(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert ("lm_head" in adapters) == ("lm_head" in patterns)
    for path, slope in flatten(slopes).items():
        found = flatten(gradients)[path]
        np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max(), err_msg=path)
