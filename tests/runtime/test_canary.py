"""jax 0.10.2 computes a vmapped matrix-vector product wrongly on CPU (jax-ml/jax#39103): the pin must keep it out."""

import jax
import jax.numpy as jnp


def squared_norms(rows):
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3, dtype=rows.dtype) @ row) ** 2))(rows)


def test_installed_jax_does_not_miscompile_vmapped_matrix_vector_products():
    index = jnp.arange(32769, dtype=jnp.float32)
    rows = jnp.stack((index, jnp.zeros_like(index), jnp.zeros_like(index)), axis=1)
    eager, jitted = squared_norms(rows)[-1], jax.jit(squared_norms)(rows)[-1]
    assert float(eager) == float(jitted) == 32768.0**2
