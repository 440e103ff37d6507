"""Tells an `EncoderDecoder` where tokens are: by sines that are added, or distances that score."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models.seq2seq.encoder_decoder_config import RelativePositions


def sinusoids(length: int, width: int) -> np.ndarray:
  """Returns the positions [length, width] of Vaswani et al. 2017: sines first, then cosines.

  >>> sinusoids(2, 4).round(2)
  array([[0.  , 0.  , 1.  , 1.  ],
         [0.84, 0.01, 0.54, 1.  ]], dtype=float32)
  """
  rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
  angles = np.arange(length)[:, None] * rates
  return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def relative_buckets(
  query_positions: jax.Array,
  key_positions: jax.Array,
  relative: RelativePositions,
  *,
  causal: bool,
) -> jax.Array:
  """Returns the bucket of the distance between each query and key, as T5 has them, int [T, S].

  Args:
    query_positions: int [T].
    key_positions: int [S].
    relative: number and reach of the buckets.
    causal: whether all buckets are of earlier keys; else half of them are of later ones.

  >>> positions = jnp.arange(5)
  >>> relative_buckets(positions[-1:], positions, RelativePositions(4, 4), causal=True)
  Array([[3, 3, 2, 1, 0]], dtype=int32)
  """
  distance = query_positions[:, None] - key_positions[None]
  count = relative.num_buckets if causal else relative.num_buckets // 2
  is_later = 0 if causal else jnp.where(distance < 0, count, 0)
  distance = jnp.maximum(distance, 0) if causal else abs(distance)
  exact = count // 2
  # Distances below `exact` have a bucket each; the others share the rest on a logarithmic scale.
  scale = (count - exact) / np.log(relative.max_distance / exact)
  ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
  shared = exact + (jnp.log(ratio) * scale).astype(distance.dtype)
  return is_later + jnp.where(distance < exact, distance, jnp.minimum(shared, count - 1))
