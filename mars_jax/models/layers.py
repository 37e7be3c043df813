"""The few layers that every module shares: a dense layer that takes an adapter, norms, activations, rotations.

No architecture lives here. Ranks are never attributes: a dense layer adds a low-rank update exactly when the `lora`
collection has leaves for it, so one compiled model serves every rank pair.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mars_jax.adapters.lora import lora_dense

# Layers of a scan unrolled at a time: the whole of a small model (1.4x faster steps on CPU), a bounded program for a
# large one.
SCAN_UNROLL = 4

# What a layer keeps for its backward pass when it is rematerialised; the rest is computed twice.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def rematerialised(layer: Callable[..., nn.Module], remat: str) -> Callable[..., nn.Module]:
    """The layer class as it is for "none", else with the memory of a policy of `REMAT_POLICIES`."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT_POLICIES[remat])


class Dense(nn.Module):
    """`y = x W + bias`, plus the low-rank update of the `lora` collection where there is one.

    Attributes:
        features: output width.
        use_bias: whether the layer has a bias.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., in] to [..., features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        if not self.has_variable("lora", "a"):
            return lora_dense(x, kernel, bias, None)
        return lora_dense(x, kernel, bias, {name: self.get_variable("lora", name) for name in ("a", "b", "scale")})


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] to [..., D] in the dtype of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normal * _over(scale, x) + _over(bias, x)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] to [..., D] in the dtype of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * _over(scale, x).astype(x.dtype)


def rotate(x: Array, angles: Array) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout.

    Args:
        x: [B, T, H, head].
        angles: float32 [B or 1, T, head / 2], by which each pair of numbers turns.

    Returns:
        [B, T, H, head] in the dtype of x.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _over(vector: Array, x: Array) -> Array:
    """Gives a [D] parameter the rank of x, since rank promotion is never left to chance."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
