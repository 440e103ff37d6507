"""Codecs of logits that keep some of V classes: the k most probable, or k draws. `codecs` says what a codec is."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache.codecs import bits, faults
from distill_jax.losses import SparseTargets
from distill_jax.types import Batch

Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]
WIDEST = 100.0  # nats; a class less probable by more than this factor is kept as if by this one
UNKNOWN = 1.0  # no log-probability is positive


@dataclasses.dataclass(frozen=True)
class TopK:
  """The k most probable classes, as `losses.top_k`: logits [B, ..., V] -> `SparseTargets` of K = k.

  Columns, each a row per token:
    indices: most probable first, packed to the bits that V needs.
    codes: packed to `bits` each; n = 2^bits - 2 stands for the largest number. The first holds the spread
      S = 100 (c / n)^2, rounded up; the others how many nats a class lies below the first, S c / n; n + 1 is
      probability 0.
    log_odds: log of the kept over the left-out mass m, float32, from which log m and log (1 - m) are exact however
      small either is. The kept classes are scaled to sum to 1 - m.
    label_log_prob: of batch['label'], float32; 1.0 where it names no class.

  Attributes:
    k: classes kept, at least 1.
    temperature: a number > 0; the log-probabilities (also the label's) are those at it.
    bits: of a log-probability, 2 to 16. None is off by more than `largest_error` nats.

  Raises:
    ValueError: a field outside its range; elsewhere, k above the number of classes.
  """

  k: int
  temperature: float = 1.0
  bits: int = 8

  def __post_init__(self):
    _check_draws(self)
    object.__setattr__(self, "bits", _whole("bits", self.bits, 2, 16))

  def largest_error(self, spread: float) -> float:
    """Nats that a kept log-probability may be off by, beside float32's rounding.

    Args:
      spread: nats between the first and the last kept class; 10 and 8 bits give 0.041, 16 bits 0.00015.
    """
    top = 2**self.bits - 2
    return (math.sqrt(min(spread, WIDEST)) + math.sqrt(WIDEST) / top) ** 2 / top

  def columns(self, output) -> Layout:
    """The columns of logits of this shape [B, ..., V]; a `ShapeDtypeStruct` will do."""
    classes, tokens = self._check(output)
    packed = {"indices": bits.width_of(classes), "codes": self.bits}
    words = {name: (*tokens, bits.words_of(self.k, width)) for name, width in packed.items()}
    return {name: (np.dtype(np.uint32), shape) for name, shape in words.items()} | {
      name: (np.dtype(np.float32), tokens) for name in ("log_odds", "label_log_prob")
    }

  def encode(self, output, batch: Batch, *, first=0) -> dict[str, jax.Array]:
    """The columns, each [B, ...]. The batch's 'label', integers [B, ...], is optional."""
    del first
    classes, _ = self._check(output)
    kept = losses.top_k(output, self.k, temperature=self.temperature)
    log_mass = jax.nn.logsumexp(kept.log_probs, -1)
    return {
      "indices": bits.pack(kept.indices, bits.width_of(classes)),
      "codes": bits.pack(self._quantize(kept.log_probs), self.bits),
      "log_odds": (log_mass - kept.log_tail).astype(jnp.float32),
      "label_log_prob": self._label_log_prob(output, kept.log_probs[..., 0], batch.get("label")),
    }

  def decode(self, columns: Mapping[str, Any], output) -> SparseTargets:
    """The targets of logits of the shape of `output`, float32."""
    classes, _ = self._check(output)
    indices = bits.unpack(columns["indices"], bits.width_of(classes), self.k).astype(jnp.int32)
    shares = jax.nn.log_softmax(self._dequantize(bits.unpack(columns["codes"], self.bits, self.k)))
    log_odds = columns["log_odds"]
    log_probs = jax.nn.log_sigmoid(log_odds)[..., None] + shares
    return SparseTargets(
      indices, log_probs, jax.nn.log_sigmoid(-log_odds), self.temperature, drawn=False
    )

  def faults(self, output) -> jax.Array:
    """Per example [B], uint8, what keeps it from being kept; see `faults.check`."""
    return faults.of_logits(output)

  def _check(self, output):
    faults.check_output(output, axes=2)
    return _check_classes(self.k, output), tuple(output.shape[1:-1])

  def _label_log_prob(self, logits, highest, label):
    if (
      label is None or label.shape != highest.shape or not jnp.issubdtype(label.dtype, jnp.integer)
    ):
      return jnp.full(highest.shape, UNKNOWN, jnp.float32)
    logits, classes = logits.astype(highest.dtype), logits.shape[-1]
    own = jnp.take_along_axis(logits, jnp.clip(label, 0, classes - 1)[..., None], -1)[..., 0]
    log_p = highest - (logits.max(-1) - own) / self.temperature
    return jnp.where((label >= 0) & (label < classes), log_p, UNKNOWN).astype(jnp.float32)

  def _quantize(self, log_probs):
    top = 2**self.bits - 2
    gaps = log_probs[..., :1] - log_probs
    exists = log_probs > -jnp.inf
    widest = jnp.where(exists, gaps, 0).max(-1, keepdims=True)
    first = jnp.minimum(jnp.ceil(top * jnp.sqrt(widest / WIDEST)), top)
    spread = WIDEST * (first / top) ** 2
    codes = jnp.minimum(jnp.round(top * gaps / jnp.where(spread > 0, spread, 1)), top)
    codes = jnp.where(exists, codes, top + 1)
    return jnp.concatenate([first, codes[..., 1:]], -1).astype(jnp.uint32)

  def _dequantize(self, codes):
    top = 2**self.bits - 2
    codes = codes.astype(jnp.float32)
    spread = WIDEST * (codes[..., :1] / top) ** 2
    below = jnp.where(codes > top, -jnp.inf, -spread * codes / top)
    return jnp.where(jnp.arange(self.k) == 0, 0.0, below)


@dataclasses.dataclass(frozen=True)
class RandomSampling:
  """k draws with replacement from the teacher, as `losses.sample_k`: logits [B, ..., V] -> `SparseTargets` of K = k.

  The draws of an example are a function of (seed, id, view), and of the token's place where it has tokens, so that they
  can be made again (Threefry; another kind of device may round a probability differently and so, rarely, draw the
  neighbor). The one column, 'indices', is packed to the bits that V needs: 12 draws of 128,000 classes are 28 bytes.

  Attributes:
    k: draws, at least 1; about 50 for a language model (Anshumann et al. 2025, arXiv:2503.16870).
    temperature: a number > 0, of the teacher that is drawn from.
    seed: from 0 to 2^32 - 1.

  Raises:
    ValueError: a field outside its range.
  """

  k: int
  temperature: float = 1.0
  seed: int = 0

  def __post_init__(self):
    _check_draws(self)
    object.__setattr__(self, "seed", _whole("seed", self.seed, 0, 2**32 - 1))

  def columns(self, output) -> Layout:
    """The column of logits of this shape [B, ..., V]; a `ShapeDtypeStruct` will do."""
    faults.check_output(output, axes=2)
    words = bits.words_of(self.k, bits.width_of(output.shape[-1]))
    return {"indices": (np.dtype(np.uint32), (*output.shape[1:-1], words))}

  def encode(self, output, batch: Batch, *, first=0) -> dict[str, jax.Array]:
    """The column [B, ...]. The batch has 'id' and 'view', integers [B]; `first` is the place of the first token."""
    faults.check_output(output, axes=2)
    missing = sorted({"id", "view"} - set(batch))
    if missing:
      raise ValueError(
        f"draws are a function of 'id' and 'view', and the batch has no {missing[0]!r}"
      )
    # No id is so large: a key that augmentation with the same seed never folds to.
    base = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), 2**32 - 1)

    def draw(key, logits):
      return losses.sample_k(key, logits, self.k, temperature=self.temperature).indices

    def one(logits, id, view):
      key = jax.random.fold_in(jax.random.fold_in(base, id), view)
      if logits.ndim == 1:
        return draw(key, logits)
      tokens = logits.reshape(-1, logits.shape[-1])
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(tokens)))
      return jax.vmap(draw)(keys, tokens).reshape(*logits.shape[:-1], self.k)

    drawn = jax.vmap(one)(output, batch["id"], batch["view"])
    return {"indices": bits.pack(drawn, bits.width_of(output.shape[-1]))}

  def decode(self, columns: Mapping[str, Any], output) -> SparseTargets:
    """The targets of logits of the shape of `output`: each draw of probability 1 / k, and no tail."""
    width = bits.width_of(output.shape[-1])
    indices = bits.unpack(columns["indices"], width, self.k).astype(jnp.int32)
    log_probs = jnp.full(indices.shape, -math.log(self.k), jnp.float32)
    no_tail = jnp.full(indices.shape[:-1], -jnp.inf, jnp.float32)
    return SparseTargets(indices, log_probs, no_tail, self.temperature, drawn=True)

  def faults(self, output) -> jax.Array:
    """Per example [B], uint8, what keeps it from being kept; see `faults.check`."""
    return faults.of_logits(output)


def _check_classes(k: int, output) -> int:
  classes = output.shape[-1]
  if k > classes:
    raise ValueError(
      f"k: expected 1 to {classes}, the classes of the output {tuple(output.shape)}, got {k}"
    )
  return classes


def _check_draws(codec) -> None:
  object.__setattr__(codec, "k", _whole("k", codec.k, 1, 2**31 - 1))
  temperature = float(codec.temperature)
  if not (math.isfinite(temperature) and temperature > 0):
    raise ValueError(f"temperature: expected a finite number > 0, got {codec.temperature}")
  object.__setattr__(codec, "temperature", temperature)


def _whole(name: str, value, low: int, high: int) -> int:
  try:
    number = operator.index(value)
  except TypeError:
    raise ValueError(f"{name}: expected an integer, got {value!r}") from None
  if not low <= number <= high:
    nearest = min(max(number, low), high)
    raise ValueError(
      f"{name}: expected an integer from {low} to {high}, got {number}; nearest is {nearest}"
    )
  return number
