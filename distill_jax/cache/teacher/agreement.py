"""Does a cache say what its teacher says? Rows computed again."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache.codecs.dense import Codec, Dense, output_of
from distill_jax.cache.codecs.sparse import RandomSampling, TopK
from distill_jax.cache.examples import examples_of
from distill_jax.cache.reader import Cache
from distill_jax.cache.teacher import headed
from distill_jax.cache.teacher.checks import check_count, check_teacher, check_weights
from distill_jax.cache.teacher.headed import LazyLogits
from distill_jax.cache.teacher.predictor import make_output_fn, words_of
from distill_jax.data import Source
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.data.text.tokenized import PackedText
from distill_jax.distributed import sharding
from distill_jax.types import Batch, Model, Variables


class Agreement(NamedTuple):
  """How far the rows of one output are from the teacher that is asked again.

  Attributes:
    rows: how many were compared.
    difference: the largest between numbers: of a dense output itself, of kept log-probabilities in nats; of draws the
      share that is another class.
    kl: from teacher to cache, nats, mean over rows; of hidden states that of their logits; None where there are none.
    top1: the share of rows with the same first class; None likewise, and for draws.
  """

  rows: int
  difference: float
  kl: float | None
  top1: float | None


def verify(
  cache: Cache,
  teacher: Model,
  source: Source | Images | PackedText,
  n: int = 256,
  *,
  teacher_variables: Variables | None = None,
  crop: Crop | None = None,
  augment: Callable[[Batch], Batch] | None = None,
  batch_size: int = 256,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Agreement]:
  """Asks the teacher again about n random rows.

  Args:
    cache, teacher, teacher_variables, crop, augment, mesh: as they were for `write_cache`.
    source: the examples, or a part of them: rows of others are not asked about.
    n: rows to compare, views included; at most all.
    batch_size: rows that the teacher takes at once, over all devices.
    seed: of the choice.

  Raises:
    ValueError: a number is less than 1, `batch_size` does not divide over the devices, none of the examples is in the
      cache, or the teacher does not give what the cache keeps.
    CorruptCache: a row was changed; shard and example are named.
  """
  examples = examples_of(source, crop)
  variables = sharding.gather_to_host(check_teacher(teacher, teacher_variables))
  mesh = mesh or sharding.data_mesh()
  sharding.check_divisible(check_count("batch_size", batch_size), mesh)
  check_weights(teacher, variables, examples.shapes)
  held = np.flatnonzero(np.isin(cache.manifest.rows.ids, source.ids))
  if not held.size:
    raise ValueError(
      f"source: none of the {len(source)} examples of {source.name!r} is in the cache in {cache.store.url}"
    )
  number = np.random.default_rng(seed).permutation(len(held) * cache.num_views)[
    : check_count("n", n)
  ]
  views, at = np.divmod(np.sort(number), len(held))
  ids = cache.manifest.rows.ids[held[at]]
  shown = cache.shown(ids, views)
  ids, views = ids[shown], views[shown]
  head = () if cache.head is None else ("head",)
  answers = make_output_fn(teacher, [*cache.outputs, *head], augment, words_of(source))
  said = cache.model

  def compared(variables, held, batch):
    teacher_outputs, _ = answers(variables, batch)
    kept = said.apply(*held, batch, train=False, key=None)[0]
    return {
      name: _compare(name, codec, kept, teacher_outputs, batch)
      for name, (codec, _) in cache.outputs.items()
    }

  run = jax.jit(compared, in_shardings=(None, None, sharding.row_sharding(mesh)))
  placed, parts = sharding.replicate((variables, said.variables), mesh), []
  for first in range(0, len(ids), batch_size):
    rows = np.minimum(np.arange(first, first + batch_size), len(ids) - 1)
    batch = cache.join(examples.batch(ids[rows], views[rows]))
    found = run(*placed, jax.device_put(batch, sharding.row_sharding(mesh)))
    parts.append(jax.device_get(found))
  joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *parts)
  return {name: _agreement(cache.outputs[name][0], values) for name, values in joined.items()}


def _compare(name: str, codec: Codec, kept, teacher_outputs, batch: Batch) -> dict[str, jax.Array]:
  """Per row [B]: 'difference', and of logits, or of hidden states with a head, 'kl' and 'top1'."""
  output, own, asked = output_of(name), kept[name], teacher_outputs[name]
  if isinstance(codec, RandomSampling):
    columns, _ = headed.encode({name: codec}, asked, batch)[name]
    again = codec.decode(columns, asked)
    return {"difference": _per_row(jnp.mean, own.indices != again.indices)}
  if isinstance(asked, LazyLogits):
    return _by_tokens(asked, own, lambda logits, own: _compare_arrays(codec, own, logits, True))
  found = _compare_arrays(codec, own, asked, output == "logits")
  if output == "hidden" and "head" in kept:
    asked = LazyLogits(asked, teacher_outputs["head"])
    of_logits = _by_tokens(
      asked,
      own,
      lambda logits, own: _compare_arrays(
        codec, headed.logits(LazyLogits(own, kept["head"])), logits, True
      ),
    )
    found |= {name: of_logits[name] for name in ("kl", "top1")}
  return found


def _by_tokens(asked: LazyLogits, own, compare) -> dict[str, jax.Array]:
  """`compare(logits [N, V], own [N, ...]) -> arrays [N]` of all tokens, a few at a time; per row [B]."""

  def part(logits, first, own):
    del first
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (logits, own))
    return {name: x.reshape(logits.shape[:2]) for name, x in compare(*flat).items()}

  found = headed.by_tokens(part, asked, own)
  return {
    name: _per_row(jnp.max if name == "difference" else jnp.mean, x) for name, x in found.items()
  }


def _compare_arrays(
  codec: Dense | TopK, kept, teacher_outputs, is_logits: bool
) -> dict[str, jax.Array]:
  teacher_outputs = teacher_outputs.astype(jnp.float32)
  if isinstance(codec, TopK):
    log_p = jax.nn.log_softmax(teacher_outputs / codec.temperature)
    own = jnp.take_along_axis(log_p, kept.indices, -1)
    return {
      "difference": _per_row(jnp.max, _apart(kept.log_probs, own)),
      "kl": _per_row(jnp.mean, losses.sparse_kl(teacher_outputs, kept) / codec.temperature**2),
      "top1": _per_row(jnp.mean, kept.indices[..., 0] == teacher_outputs.argmax(-1)),
    }
  found = {"difference": _per_row(jnp.max, _apart(kept, teacher_outputs))}
  if is_logits:
    found["kl"] = _per_row(jnp.mean, losses.kl_divergence(kept, teacher_outputs))
    found["top1"] = _per_row(jnp.mean, kept.argmax(-1) == teacher_outputs.argmax(-1))
  return found


def _apart(a, b):
  return jnp.where(a == b, 0, jnp.abs(a - b))  # -inf on both sides is no difference


def _per_row(reduced, x) -> jax.Array:
  return reduced(x.reshape(x.shape[0], -1).astype(jnp.float32), axis=1)


def _agreement(codec: Codec, values: Mapping[str, np.ndarray]) -> Agreement:
  difference = (
    values["difference"].mean() if isinstance(codec, RandomSampling) else values["difference"].max()
  )
  kl, top1 = (float(values[name].mean()) if name in values else None for name in ("kl", "top1"))
  return Agreement(len(values["difference"]), float(difference), kl, top1)
