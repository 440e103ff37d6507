"""What a cache is and says, for people."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.dense import output_of
from distill_jax.cache.codecs.sparse import RandomSampling, TopK
from distill_jax.cache.examples import InMemory
from distill_jax.cache.reader import Cache
from distill_jax.data import Source
from distill_jax.teachers import CACHED


def describe(cache: Cache, source: Source | None = None) -> str:
  """What a cache is, for people: identity, size, and how sure and how right its teacher is.

  Args:
    cache: open.
    source: the examples with their labels, for the teacher's accuracy.
  """
  lines = [repr(cache)]
  lines += [f"  (written) {name}: {value}" for name, value in cache.manifest.provenance.items()]
  names = [name for name in cache.outputs if output_of(name) == "logits"]
  if names:
    drawn = [name for name in names if isinstance(cache.outputs[name][0], RandomSampling)]
    lines += _confidence(cache, ([name for name in names if name not in drawn] or drawn)[0], source)
  return "\n".join(lines)


def _confidence(cache: Cache, name: str, source: Source | None) -> list[str]:
  """A histogram of the teacher's largest probability over the first view, and how right it is there."""
  codec, _ = cache.outputs[name]
  if isinstance(codec, RandomSampling):
    return ["  the teacher's confidence is not known: draws were kept"]
  ids = cache.manifest.rows.ids
  ids = ids[cache.shown(ids, np.zeros(len(ids), np.int32))]
  sure, said, own = _first_view(cache, name, ids)
  counts, edges = np.histogram(sure, bins=10, range=(0, 1))
  at = f" at temperature {codec.temperature:g}" if isinstance(codec, TopK) else ""
  lines = [f"  the teacher's largest probability{at}, mean {sure.mean():.3f}:"]
  lines += [
    f"    {low:.1f} to {high:.1f}  {n / sure.size:6.1%}  {'#' * round(40 * n / sure.size)}"
    for n, low, high in zip(counts, edges, edges[1:])
  ]
  if own is not None and (own <= 0).any():
    known = own[own <= 0]
    lines.append(
      f"  its cross entropy{at} on the {known.size:,} labels that it was shown: {-known.mean():.4f}"
    )
  if source is not None and said.ndim == 1:
    known = np.isin(ids, source.ids)
    label = source.arrays["label"][InMemory(source).places(ids[known])]
    right = (said[known] == label)[label >= 0]
    accuracy = f": {right.mean():.4f}" if right.size else ", which has none"
    lines.append(
      f"  its accuracy on the {right.size:,} labeled examples of {source.name}{accuracy}"
    )
  return lines


def _first_view(
  cache: Cache, name: str, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Of each example's logits the largest probability, its class, and the label's log-probability where it was kept."""
  codec, _ = cache.outputs[name]

  @jax.jit
  def top(columns):
    kept = cache.decoded(name, columns)
    if isinstance(codec, TopK):
      return (
        jnp.exp(kept.log_probs[..., 0]),
        kept.indices[..., 0],
        columns[f"{CACHED}{name}.label_log_prob"],
      )
    return jax.nn.softmax(kept.astype(jnp.float32)).max(-1), kept.argmax(-1), None

  batch, parts = min(1024, len(ids)), []
  for first in range(0, len(ids), batch):
    rows = np.minimum(np.arange(first, first + batch), len(ids) - 1)
    joined = cache.join({"id": ids[rows], "view": np.zeros(batch, np.int32)})
    parts.append(
      jax.device_get(top({name: x for name, x in joined.items() if name.startswith(CACHED)}))
    )
  return jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *parts)
