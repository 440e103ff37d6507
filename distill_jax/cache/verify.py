"""Does a cache say what its teacher says, and what does it say? Rows computed again, and a summary."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses, sharding
from distill_jax.cache.codecs import Codec
from distill_jax.cache.reader import CACHED, Cache
from distill_jax.cache.sparse import Samples, TopK
from distill_jax.cache.writer import frozen, rows_of
from distill_jax.data import Source
from distill_jax.types import Batch, Model, Variables


class Agreement(NamedTuple):
  """How far the rows of one output are from the teacher that is asked again.

  Attributes:
    rows: how many were compared.
    difference: the largest between numbers: of a dense output itself, of kept log-probabilities in nats; of draws the
      share that is another class.
    kl: from teacher to cache, nats, mean over rows; None where the output is no logits.
    top1: the share of rows with the same first class; None likewise, and for draws.
  """

  rows: int
  difference: float
  kl: float | None
  top1: float | None


def verify(
  cache: Cache,
  teacher: Model,
  source: Source,
  n: int = 256,
  *,
  teacher_variables: Variables | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  batch_size: int = 256,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Agreement]:
  """Asks the teacher again about n random rows.

  Args:
    cache, teacher, source, teacher_variables, augment, mesh: as they were for `write_cache`.
    n: rows to compare, views included; at most all.
    batch_size: rows that the teacher takes at once.
    seed: of the choice.

  Raises:
    ValueError: n is less than 1.
    Damaged: a row was changed; shard and example are named.
  """
  if n < 1:
    raise ValueError(f"n: expected at least 1, got {n}")
  mesh, variables = mesh or sharding.data_mesh(), frozen(teacher, teacher_variables)
  number = np.sort(np.random.default_rng(seed).permutation(len(cache))[:n])
  ids, views = cache.manifest.rows.ids[number % cache.examples], number // cache.examples
  order = np.argsort(source.ids)
  places = order[np.searchsorted(source.ids[order], ids)]

  def compared(variables, batch):
    taught = teacher.apply(*variables, batch if augment is None else augment(batch), train=False, key=None)[0]
    kept = cache.model.apply({}, {}, batch, train=False, key=None)[0]
    return {
      name: _compare(codec, kept[name], taught[name], batch, name == "logits")
      for name, (codec, _) in cache.outputs.items()
    }

  run = jax.jit(compared, in_shardings=(None, sharding.by_rows(mesh)))
  placed, parts = sharding.replicate(variables, mesh), []
  for first in range(0, len(number), batch_size):
    rows = np.minimum(np.arange(first, first + batch_size), len(number) - 1)
    found = run(placed, cache.join(rows_of(source, places[rows], views[rows])))
    parts.append(jax.device_get(found))
  joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(number)], *parts)
  return {name: _agreement(cache.outputs[name][0], values) for name, values in joined.items()}


def _compare(codec: Codec, kept, taught, batch: Batch, is_logits: bool) -> dict[str, jax.Array]:
  """Per row [B]: 'difference', and of logits 'kl' and 'top1'."""
  if isinstance(codec, Samples):
    again = codec.decode(codec.encode(taught, batch), taught)
    return {"difference": _per_row(jnp.mean, kept.indices != again.indices)}
  taught = taught.astype(jnp.float32)
  if isinstance(codec, TopK):
    log_p = jax.nn.log_softmax(taught / codec.temperature)
    own = jnp.take_along_axis(log_p, kept.indices, -1)
    return {
      "difference": _per_row(jnp.max, _apart(kept.log_probs, own)),
      "kl": _per_row(jnp.mean, losses.sparse_kl(taught, kept) / codec.temperature**2),
      "top1": _per_row(jnp.mean, kept.indices[..., 0] == taught.argmax(-1)),
    }
  found = {"difference": _per_row(jnp.max, _apart(kept, taught))}
  if is_logits:
    found["kl"] = _per_row(jnp.mean, losses.kl_divergence(kept, taught))
    found["top1"] = _per_row(jnp.mean, kept.argmax(-1) == taught.argmax(-1))
  return found


def _apart(a, b):
  return jnp.where(a == b, 0, jnp.abs(a - b))  # -inf on both sides is no difference


def _per_row(reduced, x) -> jax.Array:
  return reduced(x.reshape(x.shape[0], -1).astype(jnp.float32), axis=1)


def _agreement(codec: Codec, values: Mapping[str, np.ndarray]) -> Agreement:
  difference = values["difference"].mean() if isinstance(codec, Samples) else values["difference"].max()
  kl, top1 = (float(values[name].mean()) if name in values else None for name in ("kl", "top1"))
  return Agreement(len(values["difference"]), float(difference), kl, top1)


def describe(cache: Cache, source: Source | None = None) -> str:
  """What a cache is, for people: identity, size, and how sure and how right its teacher is.

  Args:
    cache: open.
    source: the examples with their labels, for the teacher's accuracy.
  """
  made = cache.manifest
  size = made.header(0).record.itemsize
  lines = [
    f"cache in {cache.store.url}",
    f"  {len(made.rows):,} rows: {cache.examples:,} examples x {cache.views} views, {size} bytes a row, "
    f"{size * len(made.rows):,} bytes in {len(made.plan)} shards",
  ]
  lines += [f"  {name}: {value}" for name, value in _flat(made.identity).items()]
  lines += [f"  (written) {name}: {value}" for name, value in made.provenance.items()]
  if "logits" in cache.outputs:
    lines += _confidence(cache, source)
  return "\n".join(lines)


def _confidence(cache: Cache, source: Source | None) -> list[str]:
  """A histogram of the teacher's largest probability over the first view, and its accuracy there."""
  codec, _ = cache.outputs["logits"]
  if isinstance(codec, Samples):
    return ["  the teacher's confidence is not known: draws were kept"]

  @jax.jit
  def top(columns):
    kept = cache.model.apply({}, {}, columns, train=False, key=None)[0]["logits"]
    if isinstance(codec, TopK):
      return jnp.exp(kept.log_probs[..., 0]), kept.indices[..., 0]
    return jax.nn.softmax(kept.astype(jnp.float32)).max(-1), kept.argmax(-1)

  ids, batch = cache.manifest.rows.ids, min(1024, cache.examples)
  sure, said = [], []
  for first in range(0, len(ids), batch):
    rows = np.minimum(np.arange(first, first + batch), len(ids) - 1)
    joined = cache.join({"id": ids[rows], "view": np.zeros(batch, np.int32)})
    joined = {name: x for name, x in joined.items() if name.startswith(CACHED)}
    p, c = jax.device_get(top(joined))
    sure.append(p)
    said.append(c)
  p, c = np.concatenate(sure)[: len(ids)], np.concatenate(said)[: len(ids)]
  counts, edges = np.histogram(p, bins=10, range=(0, 1))
  at = f" at temperature {codec.temperature:g}" if isinstance(codec, TopK) else ""
  lines = [f"  the teacher's largest probability{at}, mean {p.mean():.3f}:"]
  bars = [
    f"    {low:.1f} to {high:.1f}  {n / p.size:6.1%}  {'#' * round(40 * n / p.size)}"
    for n, low, high in zip(counts, edges, edges[1:])
  ]
  if source is not None and c.ndim == 1:
    order = np.argsort(source.ids)
    known = np.isin(ids, source.ids)
    label = source.arrays["label"][order[np.searchsorted(source.ids[order], ids[known])]]
    right = (c[known] == label)[label >= 0]
    bars.append(f"  its accuracy on the {len(right):,} labelled examples: {right.mean():.4f}")
  return lines + bars


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in values.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
  return flat
