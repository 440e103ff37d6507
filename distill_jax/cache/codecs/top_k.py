"""Stores logits as the log-probabilities of the k most probable classes."""

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

MAX_SPREAD = 100.0  # nats; a class less probable by more is stored as if it were this much less
NO_LABEL = 1.0  # no log-probability is positive


@dataclasses.dataclass(frozen=True)
class TopK:
  """Codec of the k most probable classes (`losses.top_k`): logits [B, ..., V] -> `SparseTargets`.

  Columns, each a row per token:

  - `indices`: most probable first, packed to the bits that V needs.
  - `codes`: packed to `bits` each; n = 2^bits - 2 is the largest number. The first holds the spread
    S = 100 (c / n)^2, rounded up; the others how many nats a class is below the first, S c / n;
    n + 1 is probability 0.
  - `log_odds`: log of the stored over the remaining mass m, float32, from which log m and
    log (1 - m) are exact however small either is. The stored classes are scaled to sum to 1 - m.
  - `label_log_prob`: of batch['label'], float32; 1.0 where it is no class.

  Attributes:
    k: number of classes to store, at least 1.
    temperature: of the log-probabilities (also the label's), > 0.
    bits: of a log-probability, 2 to 16. The error of each is at most `max_error` nats.

  Raises:
    ValueError: a field outside its range; in methods, k above the number of classes.

  >>> import jax.numpy as jnp
  >>> from distill_jax.cache import TopK
  >>> codec = TopK(2, bits=8)
  >>> logits = jnp.array([[3.0, 2.0, 1.0, 0.0]])
  >>> codec.decode(codec.encode(logits, {}), logits).indices
  Array([[0, 1]], dtype=int32)
  """

  k: int
  temperature: float = 1.0
  bits: int = 8

  def __post_init__(self):
    object.__setattr__(self, "k", check_k(self.k))
    object.__setattr__(self, "temperature", check_temperature(self.temperature))
    object.__setattr__(self, "bits", check_integer("bits", self.bits, 2, 16))

  def max_error(self, spread: float) -> float:
    """Returns the largest error of a log-probability in nats, in addition to float32's rounding.

    Args:
      spread: nats between the first and the last stored class; 10 and 8 bits give 0.041, 16 bits
        0.00015.
    """
    top = 2**self.bits - 2
    return (math.sqrt(min(spread, MAX_SPREAD)) + math.sqrt(MAX_SPREAD) / top) ** 2 / top

  def columns(self, output: Any) -> Layout:
    """Returns the columns of logits, or a `ShapeDtypeStruct`, [B, ..., V]."""
    classes, tokens = self._check(output)
    widths = {"indices": bits.bit_width(classes), "codes": self.bits}
    layout: Layout = {}
    for name, width in widths.items():
      layout[name] = (np.dtype(np.uint32), (*tokens, bits.word_count(self.k, width)))
    for name in ("log_odds", "label_log_prob"):
      layout[name] = (np.dtype(np.float32), tokens)
    return layout

  def encode(self, output: jax.Array, batch: Batch, *, first: Any = 0) -> dict[str, jax.Array]:
    """Returns the columns, each [B, ...]; the batch's 'label', integers [B, ...], is optional."""
    del first
    self._check(output)
    targets = losses.top_k(output, self.k, temperature=self.temperature)
    log_mass = jax.nn.logsumexp(targets.log_probs, -1)
    highest = targets.log_probs[..., 0]
    label_log_prob = self._label_log_prob(output, highest, batch.get("label"))
    return self.encode_targets(output, targets, log_mass - targets.log_tail, label_log_prob)

  def encode_targets(
    self, output: Any, targets: SparseTargets, log_odds: jax.Array, label_log_prob: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns the columns of targets whose logits may be unknown, each [B, ...].

    Args:
      output: logits, or a `ShapeDtypeStruct`, [B, ..., V].
      targets: k classes at the codec's temperature, most probable first.
      log_odds: log of their probability over that of all others, [B, ...].
      label_log_prob: log-probability of the label, [B, ...]; `NO_LABEL` where it is unknown.
    """
    classes, _ = self._check(output)
    return {
      "indices": bits.pack(targets.indices, bits.bit_width(classes)),
      "codes": bits.pack(self._quantize(targets.log_probs), self.bits),
      "log_odds": log_odds.astype(jnp.float32),
      "label_log_prob": label_log_prob,
    }

  def decode(self, columns: Mapping[str, Any], output: Any) -> SparseTargets:
    """Returns float32 targets of logits of the shape of `output`."""
    classes, _ = self._check(output)
    indices = bits.unpack(columns["indices"], bits.bit_width(classes), self.k).astype(jnp.int32)
    codes = bits.unpack(columns["codes"], self.bits, self.k)
    log_fractions = jax.nn.log_softmax(self._dequantize(codes))
    log_odds = columns["log_odds"]
    log_probs = jax.nn.log_sigmoid(log_odds)[..., None] + log_fractions
    log_tail = jax.nn.log_sigmoid(-log_odds)
    return SparseTargets(indices, log_probs, log_tail, self.temperature, sampled=False)

  def errors(self, output: jax.Array) -> jax.Array:
    """Returns per example, uint8 [B], why it cannot be stored; see `output_errors`."""
    return output_errors.logit_errors(output)

  def _check(self, output: Any) -> tuple[int, tuple[int, ...]]:
    """Returns the number of classes and the shape of tokens."""
    output_errors.check_output_shape(output, axes=2)
    classes = output.shape[-1]
    if self.k > classes:
      raise ValueError(
        f"k: expected 1 to {classes}, the classes of the output {tuple(output.shape)}, got {self.k}"
      )
    return classes, tuple(output.shape[1:-1])

  def _label_log_prob(
    self, logits: jax.Array, highest: jax.Array, label: jax.Array | None
  ) -> jax.Array:
    missing = jnp.full(highest.shape, NO_LABEL, jnp.float32)
    if label is None or label.shape != highest.shape:
      return missing
    if not jnp.issubdtype(label.dtype, jnp.integer):
      return missing
    logits = logits.astype(highest.dtype)
    classes = logits.shape[-1]
    index = jnp.clip(label, 0, classes - 1)[..., None]
    label_logit = jnp.take_along_axis(logits, index, -1)[..., 0]
    log_prob = highest - (logits.max(-1) - label_logit) / self.temperature
    is_class = (label >= 0) & (label < classes)
    return jnp.where(is_class, log_prob, NO_LABEL).astype(jnp.float32)

  def _quantize(self, log_probs: jax.Array) -> jax.Array:
    top = 2**self.bits - 2
    gaps = log_probs[..., :1] - log_probs
    exists = log_probs > -jnp.inf
    widest = jnp.where(exists, gaps, 0).max(-1, keepdims=True)
    first = jnp.minimum(jnp.ceil(top * jnp.sqrt(widest / MAX_SPREAD)), top)
    spread = MAX_SPREAD * (first / top) ** 2
    codes = jnp.minimum(jnp.round(top * gaps / jnp.where(spread > 0, spread, 1)), top)
    codes = jnp.where(exists, codes, top + 1)
    return jnp.concatenate([first, codes[..., 1:]], -1).astype(jnp.uint32)

  def _dequantize(self, codes: jax.Array) -> jax.Array:
    top = 2**self.bits - 2
    codes = codes.astype(jnp.float32)
    spread = MAX_SPREAD * (codes[..., :1] / top) ** 2
    gaps = jnp.where(codes > top, -jnp.inf, -spread * codes / top)
    return jnp.where(jnp.arange(self.k) == 0, 0.0, gaps)
