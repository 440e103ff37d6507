"""Computes a language model's logits from hidden states and a head, a few tokens at a time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.cache.codecs.codec import Codec
from distill_jax.models.llm.head import head_logits
from distill_jax.types import Batch

CHUNK_BYTES = 2**26  # of logits at a time, over all devices; at least one token of each row


class LazyLogits(NamedTuple):
  """Logits [B, L, V] that are not computed yet.

  Attributes:
    hidden: [B, L, W].
    head: (kernel [W, V], bias [V] or None, softcap or None).
    classes: number of leading entries of V that exist; None: all.
  """

  hidden: jax.Array
  head: tuple[jax.Array, Any, Any]
  classes: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the logits."""
    return (*self.hidden.shape[:-1], self.head[0].shape[-1])

  @property
  def dtype(self) -> jnp.dtype:
    """Dtype of the logits."""
    return jnp.dtype(jnp.float32)


def encode_output(
  codecs: Mapping[str, Codec], output: jax.Array | LazyLogits, batch: Batch
) -> dict[str, tuple[dict[str, jax.Array], jax.Array]]:
  """Returns by name a codec's columns [B, ...] and errors [B] of an output [B, ...]."""
  if not isinstance(output, LazyLogits):
    return {
      name: (codec.encode(output, batch), codec.errors(output)) for name, codec in codecs.items()
    }
  label = batch.get("label")
  labels = {} if label is None or label.shape != output.shape[:2] else {"label": label}

  def encode_chunk(logits: jax.Array, first: jax.Array, labels: dict[str, jax.Array]):
    rows = {**batch, "label": None, **labels}
    tokens = logits.reshape(-1, 1, logits.shape[-1])
    return {
      name: (
        codec.encode(logits, rows, first=first),
        codec.errors(tokens).reshape(logits.shape[:2]),
      )
      for name, codec in codecs.items()
    }

  encoded = map_token_chunks(encode_chunk, output, labels)
  return {name: (columns, _first_error(errors)) for name, (columns, errors) in encoded.items()}


def compute_logits(output: LazyLogits) -> jax.Array:
  """Returns all logits, float32 [..., V]."""
  with jax.default_matmul_precision("highest"):  # as in the losses
    logits = head_logits({"hidden": output.hidden, "head": output.head})
  return mask_classes(logits, output.classes)


def mask_classes(logits: jax.Array, classes: int | None) -> jax.Array:
  """Returns logits [..., V] with -inf from class number `classes` on; None: unchanged."""
  if classes is None:
    return logits
  return jnp.where(jnp.arange(logits.shape[-1]) < classes, logits, -jnp.inf)


def map_token_chunks(function: Callable[..., Any], output: LazyLogits, *trees: Any) -> Any:
  """Applies a function to N tokens of each row at a time.

  Args:
    function: `(logits [B, N, V], first, *chunks) -> tree of arrays [B, N, ...]`; `first` is the
      position of the first of the N tokens.
    output: logits of L tokens a row.
    trees: of arrays [B, L, ...]; the function gets their N tokens.

  Returns:
    The function's results for all tokens, a tree of arrays [B, L, ...].
  """
  rows, length, classes = output.shape
  size = min(max(1, CHUNK_BYTES // (4 * rows * classes)), length)
  count = -(-length // size)

  # Chunks are along tokens, because rows are sharded over devices.
  def split(x: jax.Array) -> jax.Array:
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    chunks = jnp.pad(x, padding).reshape(rows, count, size, *x.shape[2:])
    return jnp.moveaxis(chunks, 1, 0)

  def join(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(rows, count * size, *x.shape[3:])[:, :length]

  def apply_to_chunk(chunk: tuple[jax.Array, jax.Array, Any]) -> Any:
    first, hidden, tree_chunks = chunk
    return function(compute_logits(output._replace(hidden=hidden)), first, *tree_chunks)

  firsts = size * jnp.arange(count)
  chunks = jax.tree.map(split, (output.hidden, trees))
  return jax.tree.map(join, jax.lax.map(apply_to_chunk, (firsts, *chunks)))


def _first_error(errors: jax.Array) -> jax.Array:
  """Returns for each example [B] the smallest error above 0 of its tokens [B, L]; 0 for none."""
  smallest = jnp.where(errors > 0, errors, 255).min(1)
  return jnp.where(smallest < 255, smallest, 0).astype(jnp.uint8)
