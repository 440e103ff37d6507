"""Describes a cache for people: what it is, and how confident and accurate its teacher is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.codec import output_of
from distill_jax.cache.codecs.random_sampling import RandomSampling
from distill_jax.cache.codecs.top_k import TopK
from distill_jax.cache.reader import Cache
from distill_jax.cache.teacher_inputs import ArrayInputs
from distill_jax.data import Source
from distill_jax.types import CACHED

BATCH_SIZE = 1024


class _TopClass(NamedTuple):
  """The most probable class of each example, and what the cache knows of the label.

  Attributes:
    probability: [N, ...].
    number: of the class, integers [N, ...].
    label_log_prob: [N, ...], above 0 without a label; None where it is not stored.
  """

  probability: Any
  number: Any
  label_log_prob: Any


def describe(cache: Cache, source: Source | None = None) -> str:
  """Returns a text with the identity and the size of a cache, and its teacher's confidence.

  Args:
    cache: an open one.
    source: the examples with their labels, for the teacher's accuracy; None: without it.

  >>> import tempfile
  >>> from distill_jax import cache, models
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> arrays = {"x": np.eye(4, dtype=np.float32)}
  >>> outputs = cache.write_cache(tempfile.mkdtemp(), teacher, arrays, progress=False)
  >>> print(cache.describe(outputs).splitlines()[1])
    4 rows: 4 examples x 1 views, 32 bytes a row, 320 bytes in 1 shards
  """
  lines = [repr(cache)]
  lines += [f"  (written) {name}: {value}" for name, value in cache.manifest.provenance.items()]
  names = [name for name in cache.outputs if output_of(name) == "logits"]
  # Random samples do not show the confidence: another codec of the logits goes first.
  names.sort(key=lambda name: isinstance(cache.outputs[name][0], RandomSampling))
  if names:
    lines += _describe_confidence(cache, names[0], source)
  return "\n".join(lines)


def _describe_confidence(cache: Cache, name: str, source: Source | None) -> list[str]:
  codec, _ = cache.outputs[name]
  if isinstance(codec, RandomSampling):
    return ["  the teacher's confidence is unknown: the cache holds random samples"]
  ids = cache.manifest.rows.ids
  ids = ids[cache.valid_rows(ids, np.zeros(len(ids), np.int32))]
  top = _first_view(cache, name, ids)
  at = f" at temperature {codec.temperature:g}" if isinstance(codec, TopK) else ""
  lines = _histogram(top.probability, at)
  if top.label_log_prob is not None and (top.label_log_prob <= 0).any():
    log_prob = top.label_log_prob[top.label_log_prob <= 0]
    lines.append(f"  cross entropy{at} on {log_prob.size:,} stored labels: {-log_prob.mean():.4f}")
  if source is not None and source.classes is not None and top.number.ndim == 1:
    if np.issubdtype(source.arrays["label"].dtype, np.integer):
      lines.append(_accuracy(top.number, ids, source))
  return lines


def _histogram(probability: np.ndarray, at: str) -> list[str]:
  counts, edges = np.histogram(probability, bins=10, range=(0, 1))
  lines = [f"  largest probability{at}, mean {probability.mean():.3f}:"]
  for count, low, high in zip(counts, edges, edges[1:]):
    fraction = count / probability.size
    lines.append(f"    {low:.1f} to {high:.1f}  {fraction:6.1%}  {'#' * round(40 * fraction)}")
  return lines


def _accuracy(predicted: np.ndarray, ids: np.ndarray, source: Source) -> str:
  in_source = np.isin(ids, source.ids)
  label = source.arrays["label"][ArrayInputs(source).positions(ids[in_source])]
  is_correct = (predicted[in_source] == label)[label >= 0]
  value = f"{is_correct.mean():.4f}" if is_correct.size else "none"
  return f"  accuracy on {is_correct.size:,} labeled examples of {source.name}: {value}"


def _first_view(cache: Cache, name: str, ids: np.ndarray) -> _TopClass:
  codec, _ = cache.outputs[name]

  @jax.jit
  def top_class(columns: dict[str, jax.Array]) -> _TopClass:
    output = cache.decode(name, columns)
    if isinstance(codec, TopK):
      label_log_prob = columns[f"{CACHED}{name}.label_log_prob"]
      return _TopClass(jnp.exp(output.log_probs[..., 0]), output.indices[..., 0], label_log_prob)
    probability = jax.nn.softmax(output.astype(jnp.float32)).max(-1)
    return _TopClass(probability, output.argmax(-1), None)

  size = min(BATCH_SIZE, len(ids))
  views = np.zeros(size, np.int32)
  parts = []
  for first in range(0, len(ids), size):
    rows = np.minimum(np.arange(first, first + size), len(ids) - 1)
    batch = cache.add_columns({"id": ids[rows], "view": views})
    columns = {entry: x for entry, x in batch.items() if entry.startswith(CACHED)}
    parts.append(jax.device_get(top_class(columns)))
  return jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *parts)
