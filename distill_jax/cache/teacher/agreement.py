"""Compares a cache with its teacher: computes random rows again."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache.arguments import check_count
from distill_jax.cache.codecs.codec import Codec, output_of
from distill_jax.cache.codecs.codes import Codes
from distill_jax.cache.codecs.dense_codec import Dense
from distill_jax.cache.codecs.random_sampling import RandomSampling
from distill_jax.cache.codecs.top_k import TopK
from distill_jax.cache.reader import Cache
from distill_jax.cache.teacher.lazy_logits import (
  LazyLogits,
  compute_logits,
  encode_output,
  map_token_chunks,
)
from distill_jax.cache.teacher.predictor import make_output_fn, tokenizer_size
from distill_jax.cache.teacher.variables import teacher_variables_of
from distill_jax.cache.teacher_inputs import TeacherInputs, make_teacher_inputs
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.text.tokenized import PackedText
from distill_jax.data.videos import Streamed
from distill_jax.distributed import sharding
from distill_jax.models.networks import as_model
from distill_jax.models.variables import check_weights
from distill_jax.teachers.host_function import raising_host_errors
from distill_jax.types import Batch, Model, Variables

Scores = dict[str, jax.Array]  # per row [B]: 'difference', and of logits 'kl' and 'top1'


class Agreement(NamedTuple):
  """The differences between the rows of one output and the teacher, at the size that is stored.

  Attributes:
    rows: number of compared rows.
    difference: the largest one: between values of a dense output, or between log-probabilities of
      top k in nats; of random samples the fraction that is another class.
    kl: from teacher to cache, nats, mean over rows; of hidden states that of their logits; None
      without logits and for random samples.
    top1: fraction of rows with the same most probable class; None likewise.

  Example in `verify`.
  """

  rows: int
  difference: float
  kl: float | None
  top1: float | None


@raising_host_errors()
def verify(
  cache: Cache,
  teacher: Any,
  source: Source | Streamed | PackedText,
  n: int = 256,
  *,
  teacher_variables: Variables | None = None,
  crop: Crop | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  batch_size: int = 256,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Agreement]:
  """Computes n random rows of a cache again and compares them.

  Args:
    cache, teacher, teacher_variables, crop, augment, mesh: as for `write_cache`.
    source: the examples, or a part of them; only their rows are compared.
    n: number of rows to compare, views included; at most all.
    batch_size: rows that the teacher takes at once, over all devices.
    seed: of the choice of rows.

  Raises:
    ValueError: no teacher, a number below 1, a `batch_size` that does not divide over the devices,
      no example that is in the cache, or an output that the teacher does not return.
    CorruptCache: a row was changed; the message names shard and example.

  >>> import tempfile
  >>> from distill_jax import cache, data, models
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=3 * jnp.eye(4), inputs="x")
  >>> source = data.Source({"x": np.eye(4, dtype=np.float32), "label": np.arange(4)}, classes=4)
  >>> outputs = cache.write_cache(tempfile.mkdtemp(), teacher, source, progress=False)
  >>> agreement = cache.verify(outputs, teacher, source, n=4)["logits"]
  >>> agreement.rows, agreement.difference, agreement.top1
  (4, 0.0, 1.0)
  """
  if teacher is None:
    raise ValueError(
      f"teacher: expected one that computes rows of the cache in {cache.store.url} again, got "
      "None: Cache.check_checksums checks their bytes without one"
    )
  inputs = make_teacher_inputs(source, crop)
  teacher = as_model("teacher", teacher, inputs.shapes)
  variables = sharding.gather_to_host(teacher_variables_of(teacher, teacher_variables))
  mesh = mesh or sharding.data_mesh()
  sharding.check_divisible(check_count("batch_size", batch_size), mesh)
  check_weights(teacher, variables, inputs.shapes)
  ids, views = _random_rows(cache, source, check_count("n", n), seed)
  compare = _make_compare_fn(cache, teacher, augment, tokenizer_size(source), mesh)
  device_variables = sharding.replicate((variables, cache.model.variables), mesh)
  parts = []
  for batch in _batches(cache, inputs, ids, views, batch_size):
    batch = jax.device_put(batch, sharding.row_sharding(mesh))
    parts.append(jax.device_get(compare(*device_variables, batch)))
  scores = jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *parts)
  return {name: _agreement(cache.outputs[name][0], values) for name, values in scores.items()}


def _random_rows(cache: Cache, source: Any, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids and views of n random rows of the source's examples, in the cache's order."""
  stored = np.flatnonzero(np.isin(cache.manifest.rows.ids, source.ids))
  if not stored.size:
    raise ValueError(
      f"source: expected examples of the cache in {cache.store.url}, got none among the "
      f"{len(source)} of {source.name!r}"
    )
  numbers = np.random.default_rng(seed).permutation(len(stored) * cache.num_views)[:n]
  views, positions = np.divmod(np.sort(numbers), len(stored))
  ids = cache.manifest.rows.ids[stored[positions]]
  valid = cache.valid_rows(ids, views)
  return ids[valid], views[valid]


def _batches(
  cache: Cache, inputs: TeacherInputs, ids: np.ndarray, views: np.ndarray, batch_size: int
):
  """Yields batches of one size with the cache's columns; the last one repeats its last row."""
  for first in range(0, len(ids), batch_size):
    rows = np.minimum(np.arange(first, first + batch_size), len(ids) - 1)
    yield cache.add_columns(inputs.batch(ids[rows], views[rows]))


def _make_compare_fn(
  cache: Cache,
  teacher: Model,
  augment: Callable[[Batch], Batch] | None,
  classes: int | None,
  mesh: jax.sharding.Mesh,
) -> Callable[..., dict[str, Scores]]:
  """Returns the jitted `(teacher's variables, cache's variables, batch) -> scores by output`."""
  head = () if cache.head is None else ("head",)
  output_fn = make_output_fn(teacher, [*cache.outputs, *head], augment, classes)
  cached_model = cache.model

  def compare(variables: Variables, cached_variables: Variables, batch: Batch):
    teacher_outputs, _ = output_fn(variables, batch)
    stored = cached_model.apply(*cached_variables, batch, train=False, key=None)[0]
    return {
      name: _compare(name, codec, stored, teacher_outputs, batch)
      for name, (codec, _) in cache.outputs.items()
    }

  return jax.jit(compare, in_shardings=(None, None, sharding.row_sharding(mesh)))


def _compare(
  name: str,
  codec: Codec,
  stored_outputs: Mapping[str, Any],
  teacher_outputs: Mapping[str, Any],
  batch: Batch,
) -> Scores:
  output = output_of(name)
  stored = stored_outputs[name]
  live = teacher_outputs[name]
  if isinstance(codec, RandomSampling):
    columns, _ = encode_output({name: codec}, live, batch)[name]
    repeated = codec.decode(columns, live)
    return {"difference": _per_row(jnp.mean, stored.indices != repeated.indices)}
  if isinstance(codec, Codes):
    return {"difference": _per_row(jnp.mean, stored != live)}
  if isinstance(live, LazyLogits):
    return _compare_tokens(codec, live, stored, lambda stored: stored)
  scores = _compare_arrays(codec, stored, live, output == "logits")
  if output == "hidden" and "head" in stored_outputs:
    head = stored_outputs["head"]
    logits = LazyLogits(live, teacher_outputs["head"])
    of_logits = _compare_tokens(
      codec, logits, stored, lambda hidden: compute_logits(LazyLogits(hidden, head))
    )
    scores |= {name: of_logits[name] for name in ("kl", "top1")}
  return scores


def _compare_tokens(
  codec: Dense | TopK, live: LazyLogits, stored: Any, logits_of: Callable[[Any], Any]
) -> Scores:
  """Compares stored with live logits a few tokens at a time; `logits_of` decodes stored tokens."""

  def compare_chunk(logits: jax.Array, first: jax.Array, stored: Any) -> Scores:
    del first
    shape = logits.shape[:2]
    logits, stored = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (logits, stored))
    scores = _compare_arrays(codec, logits_of(stored), logits, True)
    return {name: x.reshape(shape) for name, x in scores.items()}

  scores = map_token_chunks(compare_chunk, live, stored)
  return {
    name: _per_row(jnp.max if name == "difference" else jnp.mean, x) for name, x in scores.items()
  }


def _compare_arrays(codec: Dense | TopK, stored: Any, live: jax.Array, is_logits: bool) -> Scores:
  live = live.astype(jnp.float32)
  if isinstance(codec, TopK):
    # Divided by a temperature, large logits would lose digits of their differences.
    centered = live - live.max(-1, keepdims=True)
    log_probs = jax.nn.log_softmax(centered / codec.temperature)
    live_log_probs = jnp.take_along_axis(log_probs, stored.indices, -1)
    kl = losses.sparse_kl(live, stored) / codec.temperature**2
    return {
      "difference": _per_row(jnp.max, _distance(stored.log_probs, live_log_probs)),
      "kl": _per_row(jnp.mean, kl),
      "top1": _per_row(jnp.mean, stored.indices[..., 0] == jnp.argmax(live, -1).astype(jnp.int32)),
    }
  # What a smaller size loses is no error of the cache: `estimate` measures it.
  live = codec.restore(codec.reduce(live), live)
  scores = {"difference": _per_row(jnp.max, _distance(stored, live))}
  if is_logits:
    scores["kl"] = _per_row(jnp.mean, losses.kl_divergence(stored, live))
    scores["top1"] = _per_row(jnp.mean, stored.argmax(-1) == live.argmax(-1))
  return scores


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
  # -inf on both sides is no difference.
  return jnp.where(a == b, 0, jnp.abs(a - b))


def _per_row(reduce_fn: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
  return reduce_fn(x.reshape(x.shape[0], -1).astype(jnp.float32), axis=1)


def _agreement(codec: Codec, scores: Mapping[str, np.ndarray]) -> Agreement:
  difference = scores["difference"]
  overall = difference.mean() if isinstance(codec, RandomSampling | Codes) else difference.max()
  kl, top1 = (float(scores[name].mean()) if name in scores else None for name in ("kl", "top1"))
  return Agreement(len(difference), float(overall), kl, top1)
