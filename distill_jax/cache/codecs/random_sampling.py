"""Stores logits as k random samples of a class."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache.codecs import bits, output_errors
from distill_jax.cache.codecs.fields import Layout, check_k, check_temperature
from distill_jax.errors import check_integer
from distill_jax.losses import SparseTargets
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class RandomSampling:
  """Codec of k samples with replacement (`losses.sample_k`): logits [B, ..., V] -> `SparseTargets`.

  The samples of an example are a function of (seed, id, view), and of the token's position where
  it has tokens, so that they can be repeated (Threefry; another kind of device may round a
  probability differently and so, rarely, sample the neighbor). The one column, 'indices', is
  packed to the bits that V needs: 12 samples of 128,000 classes take 28 bytes.

  Attributes:
    k: number of samples, at least 1; about 50 for a language model (Anshumann et al. 2025,
      arXiv:2503.16870).
    temperature: of the sampled teacher, > 0.
    seed: from 0 to 2^32 - 1.

  Raises:
    ValueError: a field outside its range.

  >>> from distill_jax import cache
  >>> logits = jax.ShapeDtypeStruct((1, 128_000), jnp.float32)
  >>> cache.row_bytes(cache.RandomSampling(12), logits)  # 12 samples of 17 bits
  28
  """

  k: int
  temperature: float = 1.0
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, "k", check_k(self.k))
    object.__setattr__(self, "temperature", check_temperature(self.temperature))
    object.__setattr__(self, "seed", check_integer("seed", self.seed, 0, 2**32 - 1))

  def columns(self, output: Any) -> Layout:
    """Returns the column of logits, or a `ShapeDtypeStruct`, [B, ..., V]."""
    output_errors.check_output_shape(output, axes=2)
    words = bits.word_count(self.k, bits.bit_width(output.shape[-1]))
    return {"indices": (np.dtype(np.uint32), (*output.shape[1:-1], words))}

  def encode(self, output: jax.Array, batch: Batch, *, first: Any = 0) -> dict[str, jax.Array]:
    """Returns the column [B, ...].

    Args:
      output: logits [B, ..., V].
      batch: with 'id' and 'view', integers [B].
      first: position of the first token.
    """
    output_errors.check_output_shape(output, axes=2)
    missing = sorted({"id", "view"} - set(batch))
    if missing:
      raise ValueError(
        f"batch: expected 'id' and 'view', of which samples are a function, got no {missing[0]!r}"
      )
    samples = jax.vmap(self._sample, (0, 0, 0, None))(output, batch["id"], batch["view"], first)
    return {"indices": bits.pack(samples, bits.bit_width(output.shape[-1]))}

  def decode(self, columns: Mapping[str, Any], output: Any) -> SparseTargets:
    """Returns targets of the shape of `output`: each sample has probability 1 / k, no tail."""
    width = bits.bit_width(output.shape[-1])
    indices = bits.unpack(columns["indices"], width, self.k).astype(jnp.int32)
    log_probs = jnp.full(indices.shape, -math.log(self.k), jnp.float32)
    no_tail = jnp.full(indices.shape[:-1], -jnp.inf, jnp.float32)
    return SparseTargets(indices, log_probs, no_tail, self.temperature, sampled=True)

  def errors(self, output: jax.Array) -> jax.Array:
    """Returns per example, uint8 [B], why it cannot be stored; see `output_errors`."""
    return output_errors.logit_errors(output)

  def _sample(self, logits: jax.Array, id: jax.Array, view: jax.Array, first: Any) -> jax.Array:
    """Returns samples of one example's logits [..., V], int [..., k]."""
    # No id is so large: augmentation with the same seed never folds in this number.
    base = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), 2**32 - 1)
    key = jax.random.fold_in(jax.random.fold_in(base, id), view)
    if logits.ndim == 1:
      return self._sample_token(key, logits)
    tokens = logits.reshape(-1, logits.shape[-1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(tokens)))
    return jax.vmap(self._sample_token)(keys, tokens).reshape(*logits.shape[:-1], self.k)

  def _sample_token(self, key: jax.Array, logits: jax.Array) -> jax.Array:
    return losses.sample_k(key, logits, self.k, temperature=self.temperature).indices
