"""Compiles a teacher together with its codecs, with rows sharded over the devices."""

import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.codec import Codec, output_of
from distill_jax.cache.teacher.lazy_logits import LazyLogits, encode_output, mask_classes
from distill_jax.distributed import sharding
from distill_jax.errors import suggest
from distill_jax.teachers.host_function import HostApply
from distill_jax.types import Batch, Model, Outputs, Variables

HOST_BATCHES_AHEAD = 4
"""Of a host teacher: it computes them while a shard is written, and no device holds them."""

Arrays = dict[str, np.ndarray]
Augment = Callable[[Batch], Batch]
OutputFn = Callable[[Variables, Batch], tuple[Outputs, Batch]]


class Predictor(NamedTuple):
  """A teacher that returns columns.

  Attributes:
    start: `(batch, worker) -> finish` begins to compute a batch, and `finish() -> (columns,
      errors)` waits for it and returns host arrays. A host teacher computes in the worker, an
      `Executor` with one thread.
    output_shapes: `batch -> {name: ShapeDtypeStruct}` of the outputs to store.
    num_ahead: number of batches to start before the first one is finished.
  """

  start: Callable[[Batch, Executor], Callable[[], tuple[Arrays, Arrays]]]
  output_shapes: Callable[[Batch], dict[str, jax.ShapeDtypeStruct]]
  num_ahead: int = 1


def make_predictor(
  teacher: Model,
  variables: Variables,
  outputs: Mapping[str, Codec],
  augment: Augment | None,
  mesh: jax.sharding.Mesh,
  classes: int | None = None,
) -> Predictor:
  """Returns the teacher with its codecs, so that only their columns leave the devices.

  Args:
    teacher, variables: the teacher and its weights.
    outputs: the outputs to store, each with its codec.
    augment, classes: as for `make_output_fn`.
    mesh: rows are sharded over its axis `data`.
  """
  output_fn = make_output_fn(teacher, outputs, augment, classes)

  def output_shapes(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = jax.eval_shape(lambda batch: output_fn(variables, batch)[0], batch)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in shapes.items()}

  if isinstance(teacher.apply, HostApply):
    start_on_host = _start_on_host(teacher.apply, outputs, augment, mesh, classes)
    return Predictor(start_on_host, output_shapes, HOST_BATCHES_AHEAD)

  def predict(variables: Variables, batch: Batch):
    return encode_columns(outputs, *output_fn(variables, batch))

  rows = sharding.row_sharding(mesh)
  compiled = jax.jit(predict, in_shardings=(None, rows), out_shardings=rows)
  device_variables = sharding.replicate(variables, mesh)

  def start(batch: Batch, worker: Executor):
    result = compiled(device_variables, jax.device_put(batch, rows))
    return lambda: jax.device_get(result)

  return Predictor(start, output_shapes)


def _start_on_host(
  teacher: HostApply,
  outputs: Mapping[str, Codec],
  augment: Augment | None,
  mesh: jax.sharding.Mesh,
  classes: int | None,
) -> Callable[[Batch, Executor], Callable[[], tuple[Arrays, Arrays]]]:
  """Returns `Predictor.start` of a host teacher: no compiled program waits for its function."""
  rows = sharding.row_sharding(mesh)
  augment_rows = None if augment is None else jax.jit(augment, in_shardings=rows)

  @functools.partial(jax.jit, in_shardings=rows, out_shardings=rows)
  def encode(teacher_outputs: Outputs, batch: Batch):
    selected = {name: select_output(teacher_outputs, name, classes) for name in outputs}
    return encode_columns(outputs, selected, batch)

  def start(batch: Batch, worker: Executor):
    if augment_rows is not None:
      batch = augment_rows(jax.device_put(batch, rows))
    future = worker.submit(teacher.call, teacher.select(batch), batch["id"])
    keys = {name: batch[name] for name in ("id", "view", "label") if name in batch}

    def finish() -> tuple[Arrays, Arrays]:
      return jax.device_get(encode(*jax.device_put((future.result(), keys), rows)))

    return finish

  return start


def make_output_fn(
  teacher: Model, outputs: Iterable[str], augment: Augment | None, classes: int | None = None
) -> OutputFn:
  """Returns `(variables, batch) -> (outputs to store, augmented batch)`.

  Args:
    teacher: its logits are `LazyLogits` where it returns hidden states and a head instead.
    outputs: names of outputs, or 'output@anything'.
    augment: `batch -> batch`; None: none.
    classes: number of classes that exist; later logits, entries of a padded vocabulary, are -inf.
      None: all.
  """

  def output_fn(variables: Variables, batch: Batch) -> tuple[Outputs, Batch]:
    batch = batch if augment is None else augment(batch)
    teacher_outputs = teacher.apply(*variables, batch, train=False, key=None)[0]
    return {name: select_output(teacher_outputs, name, classes) for name in outputs}, batch

  return output_fn


def tokenizer_size(source: Any) -> int | None:
  """Returns the vocabulary size of a text's tokenizer; None for other examples."""
  return source.classes if getattr(source, "vocabulary", "") else None


def select_output(
  teacher_outputs: Outputs, name: str, classes: int | None = None
) -> jax.Array | LazyLogits:
  """Returns the one of a teacher's outputs that is stored under a name.

  Args:
    teacher_outputs: what `teacher.apply` returns.
    name, classes: as for `make_output_fn`.

  Raises:
    ValueError: the teacher does not return it, or it is no array; 'head' may be a tuple.
  """
  output = output_of(name)
  if output == "logits" and "logits" in teacher_outputs:
    return mask_classes(teacher_outputs["logits"], classes)
  if output in teacher_outputs:
    # `verify` compares hidden states by the logits that their head makes of them.
    if output != "head" and not hasattr(teacher_outputs[output], "shape"):
      raise ValueError(
        f"outputs: expected one array to store as {name!r}, got a "
        f"{type(teacher_outputs[output]).__name__}: return each of its arrays under a name"
      )
    return teacher_outputs[output]
  if output == "logits" and "hidden" in teacher_outputs and "head" in teacher_outputs:
    return LazyLogits(teacher_outputs["hidden"], teacher_outputs["head"], classes)
  raise ValueError(
    f"outputs: expected outputs of the teacher, got {output!r}{suggest(output, teacher_outputs)}"
  )


def with_cached_outputs(teacher: Model, outputs: Mapping[str, Codec]) -> Model:
  """Returns the live teacher with its outputs as a cache decodes them, to compare shapes early.

  Its `apply` raises ValueError where the teacher does not return an output to store.
  """

  def apply(params: Any, state: Any, batch: Batch, *, train: bool, key: Any):
    teacher_outputs, state = teacher.apply(params, state, batch, train=train, key=key)
    selected = {name: select_output(teacher_outputs, name) for name in outputs}
    keyed_batch = {"view": jnp.zeros(len(batch["id"]), jnp.int32), **batch}
    encoded = _encode(outputs, selected, keyed_batch)
    decoded = {
      name: codec.decode(encoded[name][0], selected[name]) for name, codec in outputs.items()
    }
    if "hidden" in map(output_of, outputs) and "head" in teacher_outputs:
      decoded["head"] = teacher_outputs["head"]
    return decoded, state

  return teacher._replace(apply=apply)


def encode_columns(
  outputs: Mapping[str, Codec], teacher_outputs: Mapping[str, Any], batch: Batch
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns the columns by their names, and the errors by output."""
  encoded = _encode(outputs, teacher_outputs, batch)
  columns = {
    f"{name}.{part}": x for name, (parts, _) in encoded.items() for part, x in parts.items()
  }
  return columns, {name: errors for name, (_, errors) in encoded.items()}


def _encode(
  outputs: Mapping[str, Codec], teacher_outputs: Mapping[str, Any], batch: Batch
) -> dict[str, tuple[dict[str, jax.Array], jax.Array]]:
  """Returns by name columns and errors; all codecs of one output share its chunks."""
  encoded: dict[str, tuple[dict[str, jax.Array], jax.Array]] = {}
  for output in dict.fromkeys(map(output_of, outputs)):
    codecs = {name: codec for name, codec in outputs.items() if output_of(name) == output}
    encoded |= encode_output(codecs, teacher_outputs[next(iter(codecs))], batch)
  return encoded
