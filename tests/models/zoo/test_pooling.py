"""Tests max pooling: values and gradients of `nnx.max_pool`, equal maxima, and axes of length 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models.zoo.pooling import max_pool


@pytest.mark.parametrize("shape", [(2, 7, 9, 2), (3, 2, 2, 1)])
def test_pooling_equals_reduce_window(shape, rng):
  x = jnp.asarray(rng.permutation(int(np.prod(shape))).reshape(shape), jnp.float32)  # No ties.
  weights = jnp.asarray(
    rng.normal(size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3])), x.dtype
  )

  def value_and_grad(pool):
    return jax.jit(
      jax.value_and_grad(lambda x: ((pool(x) * weights).sum(), pool(x)), has_aux=True)
    )(x)

  (_, actual), gradient = value_and_grad(max_pool)
  (_, expected), expected_gradient = value_and_grad(lambda x: nnx.max_pool(x, (2, 2), (2, 2)))
  np.testing.assert_array_equal(actual, expected)
  np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_maxima_share_their_gradient(dtype):
  inf, nan = np.inf, np.nan
  patches = [
    [3, 3, 3, 3],
    [0, 5, 5, 5],
    [0, 7, 1, 7],
    [inf, inf, -inf, 0],
    [-inf, -inf, -inf, -inf],
    [nan, 1, 2, inf],
  ]
  fractions = [
    [1 / 4] * 4,
    [0, 1 / 3, 1 / 3, 1 / 3],
    [0, 1 / 2, 0, 1 / 2],
    [1 / 2, 1 / 2, 0, 0],
    [1 / 4] * 4,
    [1 / 3, 1 / 3, 0, 1 / 3],
  ]
  x = jnp.asarray(patches, dtype).reshape(-1, 2, 2, 1)

  @jax.jit
  def run(x):
    gradient = jax.grad(lambda x: max_pool(x).sum())(x)
    return max_pool(x), gradient, jax.jvp(max_pool, (x[:1],), (x[:1],))[1]

  value, gradient, tangent = run(x)
  np.testing.assert_array_equal(value.ravel().astype(float), np.max(patches, 1))
  assert gradient.dtype == dtype
  np.testing.assert_array_equal(gradient.reshape(-1, 4), jnp.asarray(fractions, dtype))
  np.testing.assert_array_equal(tangent, x[:1, :1, :1])


def test_pooling_leaves_axes_of_length_one():
  x = jnp.arange(5.0).reshape(1, 1, 5, 1)
  np.testing.assert_array_equal(max_pool(x).ravel(), [1, 3])
  np.testing.assert_array_equal(max_pool(x[:, :, :1]), x[:, :, :1])
