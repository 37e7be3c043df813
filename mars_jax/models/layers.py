"""The few layers that every module shares: a dense layer that takes an adapter, norms, activations, rotations.

No architecture lives here. Neither ranks nor methods are attributes: a dense layer is adapted exactly when the
collection of an adapter method, such as `lora`, has leaves for it, so one compiled model serves every rank pair.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import CollectionFilter
from jax import Array

from mars_jax.adapters.method import NO_CONTEXT, AdapterMethod, Context, Leaves, dense
from mars_jax.adapters.registry import METHODS

# Axes of `nn.scan` for parameters and adapters of any method: all are stacked over layers.
STACKED: Mapping[CollectionFilter, int] = {True: 0}

# Layers of a scan unrolled at a time: the whole of a small model (1.4x faster steps on CPU), a bounded program for a
# large one.
SCAN_UNROLL = 4

# What a layer keeps for its backward pass when it is rematerialised; the rest is computed twice.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# By their names in transformers; those with parameters of their own (prelu, xielu) are left out.
_gelu, _tanh_gelu = partial(jax.nn.gelu, approximate=False), partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def rematerialised(layer: Callable[..., nn.Module], remat: str) -> Callable[..., nn.Module]:
    """The layer class as it is for "none", else with the memory of a policy of `REMAT_POLICIES`."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT_POLICIES[remat])


class Dense(nn.Module):
    """`y = x W + bias`, or what an adapter method makes of it where its collection has leaves for this layer.

    Attributes:
        features: output width.
        use_bias: whether the layer has a bias.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, context: Context = NO_CONTEXT) -> Array:
        """Maps x [..., in] to [..., features]; adapter methods may ask for the context of x."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        adapter = self.adapter()
        if adapter is None:
            return dense(x, kernel, bias)
        method, leaves = adapter
        return method.apply(x, kernel, bias, leaves, context)

    def adapter(self) -> tuple[AdapterMethod, Leaves] | None:
        """The adapter method of this layer and its leaves, if there are any.

        Raises:
            ValueError: leaves of several methods.
        """
        found = [name for name in METHODS.names if self.variables.get(name)]
        if len(found) > 1:
            raise ValueError(f"{'/'.join(self.path)} has adapters of {' and '.join(found)}; a layer takes one method.")
        return (METHODS[found[0]], self.variables[found[0]]) if found else None


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
        scale, bias = (_over(vector.astype(jnp.float32), x) for vector in (scale, bias))
        return (normal * scale + bias).astype(x.dtype)


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
