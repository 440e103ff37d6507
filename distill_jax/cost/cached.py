"""Replaces a live teacher by one whose outputs come from a cache that is not written yet."""

from collections.abc import Mapping

import jax

from distill_jax.cache.codecs.codec import Codec
from distill_jax.cache.teacher.predictor import select_output
from distill_jax.types import CACHED, Batch, Model, Variables


def cached_teacher(
  teacher: Model, batch: Batch, codecs: Mapping[str, Codec]
) -> tuple[Model, Batch]:
  """Returns a teacher without weights, like `Cache.model`, and the batch with its columns.

  Args:
    teacher: model of which only the shapes of the outputs are used.
    batch: shapes of a batch.
    codecs: for each output of the cache the codec that stores it.

  Raises:
    ValueError: the teacher has no such output.
  """

  def predict(key, batch):
    return teacher.apply(*teacher.init(key, batch), batch, train=False, key=None)[0]

  outputs = jax.eval_shape(predict, jax.random.key(0), batch)
  shapes = {}
  for name in codecs:
    output = select_output(outputs, name)
    shapes[name] = jax.ShapeDtypeStruct(output.shape, output.dtype)
  layouts = {name: codec.columns(shapes[name]) for name, codec in codecs.items()}

  def apply(params, state, batch, *, train, key):
    del params, train, key
    outputs = {}
    for name, codec in codecs.items():
      columns = {part: batch[f"{CACHED}{name}.{part}"] for part in layouts[name]}
      rows = next(iter(columns.values())).shape[0]
      output = jax.ShapeDtypeStruct((rows, *shapes[name].shape[1:]), shapes[name].dtype)
      outputs[name] = codec.decode(columns, output)
    return outputs, state

  columns = {
    f"{CACHED}{name}.{part}": jax.ShapeDtypeStruct((shapes[name].shape[0], *rest), dtype)
    for name, layout in layouts.items()
    for part, (dtype, rest) in layout.items()
  }
  model = Model(lambda key, batch: Variables({}, {}), apply, Variables({}, {}))
  return model, {**batch, **columns}
