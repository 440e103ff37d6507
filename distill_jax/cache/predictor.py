"""A teacher as it is asked for what a cache keeps: jitted with its codecs, its rows spread over the devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax

from distill_jax import sharding
from distill_jax.cache.codecs import Codec
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
) -> Predictor:
  """The teacher with its codecs, so that only their columns leave the devices."""
  answers = make_answers(teacher, outputs, augment)

  def predict(variables, batch):
    said, batch = answers(variables, batch)
    columns = {
      f"{name}.{part}": x
      for name, codec in outputs.items()
      for part, x in codec.encode(said[name], batch).items()
    }
    return columns, {name: codec.faults(said[name]) for name, codec in outputs.items()}

  compiled = jax.jit(
    predict, in_shardings=(None, sharding.by_rows(mesh)), out_shardings=sharding.by_rows(mesh)
  )
  placed = sharding.replicate(variables, mesh)
  return Predictor(
    lambda batch: compiled(placed, jax.device_put(batch, sharding.by_rows(mesh))),
    lambda batch: jax.eval_shape(lambda b: answers(variables, b)[0], batch),
  )


def make_answers(
  teacher: Model, outputs: Iterable[str], augment: Augment | None
) -> Callable[[Variables, Batch], tuple[Outputs, Batch]]:
  """`(variables, batch) -> (what the teacher says under these names, the batch as it saw it)`."""

  def answers(variables, batch):
    batch = batch if augment is None else augment(batch)
    said = teacher.apply(*variables, batch, train=False, key=None)[0]
    for name in outputs:
      if name not in said:
        raise ValueError(f"outputs: the teacher gives no {name!r}{suggest(name, said)}")
    return {name: said[name] for name in outputs}, batch

  return answers
