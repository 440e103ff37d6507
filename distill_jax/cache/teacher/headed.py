"""Logits of a language model that gives hidden states and a head: made a few tokens at a time, never held whole."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.cache.codecs.dense import Codec
from distill_jax.models.llm import decoder
from distill_jax.types import Batch

MEMORY = 2**26  # bytes of logits at a time, over all devices; one token of each row at least


class LazyLogits(NamedTuple):
  """Logits [B, L, V] that are not made.

  Attributes:
    hidden: [B, L, W].
    head: (kernel [W, V], bias [V] or None, softcap or None).
    classes: how many of V exist, the first ones; None: all.
  """

  hidden: jax.Array
  head: tuple[jax.Array, Any, Any]
  classes: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.hidden.shape[:-1], self.head[0].shape[-1])

  @property
  def dtype(self) -> jnp.dtype:
    return jnp.dtype(jnp.float32)


def encode(
  codecs: Mapping[str, Codec], output, batch: Batch
) -> dict[str, tuple[dict[str, jax.Array], jax.Array]]:
  """By name, a codec's columns [B, ...] and faults [B] of an output; of what is `LazyLogits`, those of its logits."""
  if not isinstance(output, LazyLogits):
    return {
      name: (codec.encode(output, batch), codec.faults(output)) for name, codec in codecs.items()
    }
  label = batch.get("label")
  known = {} if label is None or label.shape != output.shape[:2] else {"label": label}

  def part(logits, first, known):
    rows, flat = {**batch, "label": None, **known}, logits.reshape(-1, 1, logits.shape[-1])
    return {
      name: (codec.encode(logits, rows, first=first), codec.faults(flat).reshape(logits.shape[:2]))
      for name, codec in codecs.items()
    }

  kept = by_tokens(part, output, known)
  return {name: (columns, _worst(found)) for name, (columns, found) in kept.items()}


def _worst(found: jax.Array) -> jax.Array:
  """Of the faults of an example's tokens [B, L] the one that comes first, as `faults` has them."""
  least = jnp.where(found > 0, found, 255).min(1)
  return jnp.where(least < 255, least, 0).astype(jnp.uint8)


def logits(output: LazyLogits) -> jax.Array:
  """Made whole, float32 [..., V]."""
  with jax.default_matmul_precision("highest"):  # as in the losses
    made = decoder.logits({"hidden": output.hidden, "head": output.head})
  return existing(made, output.classes)


def existing(logits: jax.Array, classes) -> jax.Array:
  """Logits [..., V], -inf from number `classes` on; None: as they are."""
  return (
    logits
    if classes is None
    else jnp.where(jnp.arange(logits.shape[-1]) < classes, logits, -jnp.inf)
  )


def by_tokens(part: Callable[..., Any], output: LazyLogits, *trees):
  """`part(logits [B, N, V], first, *trees)` of N tokens of each row at a time, `first` being the first one's place.

  Args:
    part: gives a tree of arrays [B, N, ...].
    output: of L tokens a row.
    trees: of arrays [B, L, ...]; `part` gets its N of them.

  Returns:
    What `part` gives for all tokens, [B, L, ...].
  """
  rows, length, classes = output.shape
  size = min(max(1, MEMORY // (4 * rows * classes)), length)
  count = -(-length // size)

  # Along tokens: rows are spread over devices.
  def split(x):
    padded = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(rows, count, size, *x.shape[2:]), 1, 0)

  def one(piece):
    first, hidden, own = piece
    return part(logits(output._replace(hidden=hidden)), first, *own)

  pieces = jax.lax.map(
    one, (size * jnp.arange(count), *jax.tree.map(split, (output.hidden, trees)))
  )
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, count * size, *x.shape[3:])[:, :length], pieces
  )
