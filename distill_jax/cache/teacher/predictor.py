"""A teacher as it is asked for what a cache keeps: jitted with its codecs, its rows spread over the devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.cache.codecs.dense import Codec, output_of
from distill_jax.cache.teacher import headed
from distill_jax.cache.teacher.headed import LazyLogits
from distill_jax.distributed import sharding
from distill_jax.errors import suggest
from distill_jax.types import Batch, Model, Outputs, Variables

Augment = Callable[[Batch], Batch]


class Predictor(NamedTuple):
  """A teacher that gives columns.

  Attributes:
    run: `batch -> (columns, faults)`; a jitted call with the weights bound.
    shapes: `batch -> {output: ShapeDtypeStruct}` of the outputs that are kept.
  """

  run: Callable[[Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]]
  shapes: Callable[[Batch], dict[str, jax.ShapeDtypeStruct]]


def make_predictor(
  teacher: Model,
  variables: Variables,
  outputs: Mapping[str, Codec],
  augment: Augment | None,
  mesh: jax.sharding.Mesh,
  classes: int | None = None,
) -> Predictor:
  """The teacher with its codecs, so that only their columns leave the devices; arguments as for `make_output_fn`."""
  answers = make_output_fn(teacher, outputs, augment, classes)

  def predict(variables, batch):
    kept = _encoded(outputs, *answers(variables, batch))
    columns = {
      f"{name}.{part}": x for name, (parts, _) in kept.items() for part, x in parts.items()
    }
    return columns, {name: found for name, (_, found) in kept.items()}

  compiled = jax.jit(
    predict,
    in_shardings=(None, sharding.row_sharding(mesh)),
    out_shardings=sharding.row_sharding(mesh),
  )
  placed = sharding.replicate(variables, mesh)
  return Predictor(
    lambda batch: compiled(placed, jax.device_put(batch, sharding.row_sharding(mesh))),
    lambda batch: {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for name, x in jax.eval_shape(lambda b: answers(variables, b)[0], batch).items()
    },
  )


def make_output_fn(
  teacher: Model, outputs: Iterable[str], augment: Augment | None, classes: int | None = None
) -> Callable[[Variables, Batch], tuple[Outputs, Batch]]:
  """`(variables, batch) -> (what the teacher says under these names, the batch as it saw it)`.

  The names are those of the outputs, or 'output@anything'. Logits of a teacher that gives hidden states and a head are
  `LazyLogits`. Logits from number `classes` on, entries of a padded vocabulary, are -inf; None: there are none.
  """

  def answers(variables, batch):
    batch = batch if augment is None else augment(batch)
    said = teacher.apply(*variables, batch, train=False, key=None)[0]
    return {name: named(said, name, classes) for name in outputs}, batch

  return answers


def words_of(source: Any) -> int | None:
  """How many words the tokenizer of a text has; None of other examples."""
  return source.classes if getattr(source, "vocabulary", "") else None


def named(said: Outputs, name: str, classes: int | None = None):
  """What of a teacher's outputs is kept under a name; arguments as for `make_output_fn`.

  Raises:
    ValueError: it does not give that.
  """
  output = output_of(name)
  if output == "logits" and "logits" in said:
    return headed.existing(said["logits"], classes)
  if output in said:
    return said[output]
  if output == "logits" and "hidden" in said and "head" in said:
    return LazyLogits(said["hidden"], said["head"], classes)
  raise ValueError(f"outputs: the teacher gives no {output!r}{suggest(output, said)}")


def with_cached_outputs(teacher: Model, outputs: Mapping[str, Codec]) -> Model:
  """The live teacher with its outputs as a cache gives them, to compare shapes before there is one.

  Raises (in apply):
    ValueError: the teacher does not give what is to be kept.
  """

  def apply(params, state, batch, *, train, key):
    said, state = teacher.apply(params, state, batch, train=train, key=key)
    whole = {"view": jnp.zeros(len(batch["id"]), jnp.int32), **batch}
    given = {name: named(said, name) for name in outputs}
    encoded = _encoded(outputs, given, whole)
    kept = {name: codec.decode(encoded[name][0], given[name]) for name, codec in outputs.items()}
    if "hidden" in map(output_of, outputs) and "head" in said:
      kept["head"] = said["head"]
    return kept, state

  return teacher._replace(apply=apply)


def _encoded(outputs: Mapping[str, Codec], said: Mapping[str, Any], batch: Batch):
  """By name, columns and faults; what is made of one output is made of it at once."""
  kept: dict[str, tuple[dict[str, jax.Array], jax.Array]] = {}
  for output in dict.fromkeys(map(output_of, outputs)):
    codecs = {name: codec for name, codec in outputs.items() if output_of(name) == output}
    kept |= headed.encode(codecs, said[next(iter(codecs))], batch)
  return kept
