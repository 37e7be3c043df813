"""Cross-entropy through a frozen LM head, with its gradient computed in the forward pass so that logits are not kept.

An adapted head uses `optax.softmax_cross_entropy_with_integer_labels` instead.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.custom_batching import custom_vmap

# Largest number of logits in memory at once: 256 MiB in float32.
_MAX_LOGITS = 2**26


@jax.custom_vjp
def frozen_head_losses(hidden: Array, kernel: Array, targets: Array, weights: Array) -> Array:
    """Weighted cross-entropies of `softmax(hidden @ kernel)`, nats, float32 [N].

    Under `vmap`, lanes and rows are flattened into one axis, which is processed in chunks of bounded memory.

    Args:
        hidden: hidden states [N, D]; the only argument with a gradient.
        kernel: head [D, V].
        targets: token ids, int32 [N].
        weights: weights of the targets, float32 [N].
    """
    losses, _ = _losses_and_gradients(hidden, kernel, targets)
    return losses * weights


def _forward(hidden: Array, kernel: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    losses, gradients = _losses_and_gradients(hidden, kernel, targets)
    return losses * weights, (gradients * weights[:, None]).astype(hidden.dtype)


def _backward(gradients: Array, cotangent: Array) -> tuple[Array, None, None, None]:
    return gradients * cotangent[:, None].astype(gradients.dtype), None, None, None


frozen_head_losses.defvjp(_forward, _backward)


@custom_vmap
def _losses_and_gradients(hidden: Array, kernel: Array, targets: Array) -> tuple[Array, Array]:
    """Cross-entropies [N] and their gradients with respect to `hidden` [N, D], both float32."""

    def row(vector: Array, target: Array) -> tuple[Array, Array]:
        logits = (vector @ kernel.astype(vector.dtype)).astype(jnp.float32)
        error = jax.nn.softmax(logits) - jax.nn.one_hot(target, logits.size)
        gradient = error.astype(vector.dtype) @ kernel.astype(vector.dtype).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, target), gradient.astype(jnp.float32)

    rows = max(1, _MAX_LOGITS // kernel.shape[1])
    if rows >= hidden.shape[0]:
        return jax.vmap(row)(hidden, targets)
    return jax.lax.map(lambda pair: row(*pair), (hidden, targets), batch_size=rows)


@_losses_and_gradients.def_vmap
def _flatten_lanes(
    lanes: int, batched: list[bool], hidden: Array, kernel: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    if batched[1]:
        raise NotImplementedError("lanes share one head: vmap over hidden and targets, with the kernel unmapped")
    spread = partial(jnp.broadcast_to, shape=(lanes, *targets.shape[-1:]))
    targets = targets if batched[2] else spread(targets[None])
    if not batched[0]:
        hidden = jnp.broadcast_to(hidden[None], (lanes, *hidden.shape))
    losses, gradients = _losses_and_gradients(hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1))
    return (losses.reshape(lanes, -1), gradients.reshape(hidden.shape)), (True, True)
