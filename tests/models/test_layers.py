"""Activations and norms that the models share, against those of PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from mars_jax.models.layers import ACTIVATIONS, LayerNorm

WITH_PARAMETERS = {"prelu", "xielu"}


def test_every_activation_of_transformers_without_parameters_is_there():
    assert set(ACT2CLS) - WITH_PARAMETERS <= set(ACTIVATIONS)
    assert not WITH_PARAMETERS & set(ACTIVATIONS)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) & set(ACT2CLS)))
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-12.0, 12.0, 97, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=1e-5, atol=2e-6)
    assert ACTIVATIONS[name](jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_layer_norm_in_bfloat16_is_computed_in_float32():
    rng = np.random.default_rng(0)
    x, scale, bias = (torch.from_numpy(rng.normal(size=size)).bfloat16() for size in ((3, 16), 16, 16))
    expected = torch.nn.functional.layer_norm(x, (16,), scale, bias, eps=1e-5).float().numpy()
    ours = [jnp.asarray(value.float().numpy(), jnp.bfloat16) for value in (x, scale, bias)]
    found = LayerNorm(1e-5).apply({"params": {"scale": ours[1], "bias": ours[2]}}, ours[0])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-7, atol=2**-9)
