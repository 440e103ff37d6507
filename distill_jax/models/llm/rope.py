"""Computes rotary position embeddings (Su et al. 2021), with the scaling of Llama 3.1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RopeScaling(NamedTuple):
  """The stretched wavelengths of Llama 3.1; the fields are those of a released config.json."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


def rotation(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns cosine and sine of every pair's angle, float32 [B, L, 1, head_dim / 2].

  Args:
    positions: int [B, L], the position of each token in its document.
    head_dim: size of an attention head, even.
    theta: base of the wavelengths.
    scaling: None: wavelengths are not stretched.
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if scaling is not None:
    frequencies = _stretch(frequencies, scaling)
  angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Returns x [B, L, heads, head_dim] with the pairs (i, i + head_dim / 2) rotated, as released
  checkpoints do."""
  cos, sin = rotation
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _stretch(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
  """Divides low frequencies by the factor, keeps high ones, and interpolates between (Llama 3.1's
  code)."""
  turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
  low = scaling.low_freq_factor
  high = scaling.high_freq_factor
  fraction = jnp.clip((turns - low) / (high - low), 0, 1)
  return (1 - fraction) * frequencies / scaling.factor + fraction * frequencies
