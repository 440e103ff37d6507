"""A teacher whose outputs will come from a cache that nobody has written yet."""

from collections.abc import Mapping

import jax

from distill_jax.cache.codecs.dense import Codec
from distill_jax.cache.teacher.predictor import named
from distill_jax.teachers import CACHED
from distill_jax.types import Batch, Model, Variables


def from_cache(teacher: Model, kept: Mapping[str, Codec], batch: Batch) -> tuple[Model, Batch]:
  """The teacher without weights, as a `Cache.model` is one, and the batch with the columns that it decodes.

  Args:
    teacher: of whose outputs the shapes are used.
    kept: which of them a cache keeps, and how.
    batch: shapes of a batch.

  Raises:
    ValueError: the teacher does not give what is to be kept.
  """

  def said(key, batch):
    return teacher.apply(*teacher.init(key, batch), batch, train=False, key=None)[0]

  outputs = jax.eval_shape(said, jax.random.key(0), batch)
  whole = {name: named(outputs, name) for name in kept}
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in whole.items()}
  layouts = {name: codec.columns(shapes[name]) for name, codec in kept.items()}

  def apply(params, state, batch, *, train, key):
    del params, train, key
    decoded = {}
    for name, codec in kept.items():
      columns = {part: batch[f"{CACHED}{name}.{part}"] for part in layouts[name]}
      rows = next(iter(columns.values())).shape[0]
      output = jax.ShapeDtypeStruct((rows, *shapes[name].shape[1:]), shapes[name].dtype)
      decoded[name] = codec.decode(columns, output)
    return decoded, state

  columns = {
    f"{CACHED}{name}.{part}": jax.ShapeDtypeStruct((shapes[name].shape[0], *rest), dtype)
    for name, layout in layouts.items()
    for part, (dtype, rest) in layout.items()
  }
  return Model(lambda key, batch: Variables({}, {}), apply, Variables({}, {})), {**batch, **columns}
