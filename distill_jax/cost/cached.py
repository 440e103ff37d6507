"""Replaces a live teacher by one whose outputs come from a cache that is not written yet."""

from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.cache.codecs.codec import Codec, output_of
from distill_jax.cache.teacher.lm_head import LMHead
from distill_jax.cache.teacher.predictor import select_output
from distill_jax.types import CACHED, Batch, Model, Outputs, Variables


def cached_teacher(
  teacher: Model, batch: Batch, codecs: Mapping[str, Codec]
) -> tuple[Model, Batch]:
  """Returns a teacher like `Cache.model`, without weights but a head, and the batch's columns.

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
  head = _head(outputs) if "hidden" in map(output_of, codecs) else None
  layouts = {name: codec.columns(shapes[name]) for name, codec in codecs.items()}

  def apply(params, state, batch, *, train, key):
    del train, key
    outputs: dict[str, Any] = {}
    for name, codec in codecs.items():
      columns = {part: batch[f"{CACHED}{name}.{part}"] for part in layouts[name]}
      rows = next(iter(columns.values())).shape[0]
      output = jax.ShapeDtypeStruct((rows, *shapes[name].shape[1:]), shapes[name].dtype)
      outputs[name] = codec.decode(columns, output)
    if head is not None:
      outputs["head"] = params["head"]["kernel"], params["head"].get("bias"), head.softcap
    return outputs, state

  columns = {
    f"{CACHED}{name}.{part}": jax.ShapeDtypeStruct((shapes[name].shape[0], *rest), dtype)
    for name, layout in layouts.items()
    for part, (dtype, rest) in layout.items()
  }
  variables = Variables({} if head is None else {"head": head.arrays}, {})
  return Model(lambda key, batch: variables, apply, variables), {**batch, **columns}


def _head(outputs: Outputs) -> LMHead | None:
  """Returns the shapes of a language model's head, with any number as the soft-cap it has."""
  if "head" not in outputs:
    return None
  kernel, bias, softcap = outputs["head"]
  return LMHead(kernel, bias, None if softcap is None else 1.0)
