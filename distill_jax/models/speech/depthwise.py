"""Convolves each channel with its own kernel, fast on every backend."""

import jax
import jax.numpy as jnp

from distill_jax.models.decoding.steps import vary_like


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the sum over i of x[:, t + i - K // 2] kernel[i], with zeros beyond both ends.

  It adds shifted products, because a grouped convolution is slow on a CPU: 16 x 75 frames of 144
  channels with 15 taps take 0.4 ms instead of 22, and with gradients 11 ms instead of 69 (one core,
  jax 0.10). It has no forward-mode derivative.

  Args:
    x: [B, T, C].
    kernel: [K, C], with an odd K.

  Returns:
    [B, T, C].

  >>> depthwise_conv(jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[1.0], [0.0], [10.0]]))[0, :, 0]
  Array([20., 31.,  2.], dtype=float32)
  """
  # The gradient of a kernel that devices share is their sum: under shard_map, by the cast.
  return _convolve(x, vary_like(kernel, x))


@jax.custom_vjp
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return sum(tap * weights for tap, weights in zip(_taps(x, len(kernel)), kernel))


def _forward(x, kernel):
  return _convolve(x, kernel), (x, kernel)


def _backward(residuals, gradient):
  x, kernel = map(jnp.asarray, residuals)  # A constant is no array in jax 0.7.
  products = [(tap * gradient).sum((0, 1)) for tap in _taps(x, len(kernel))]
  return _convolve(gradient, kernel[::-1]), jnp.stack(products).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def _taps(x: jax.Array, size: int) -> list[jax.Array]:
  """Returns x [B, T, C] shifted by each distance that a kernel of `size` frames reaches."""
  reach = size // 2
  padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
  return [padded[:, i : i + x.shape[1]] for i in range(size)]
