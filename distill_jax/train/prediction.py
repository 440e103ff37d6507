"""Applies models to any examples, in evaluation mode."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distill_jax import data
from distill_jax.distributed import sharding
from distill_jax.models.image_inputs import check_image_inputs
from distill_jax.models.input_errors import name_network
from distill_jax.models.networks import trained_model
from distill_jax.train.batch_errors import map_batches, name_field
from distill_jax.train.inputs import as_source, evaluation_batches, fill_up
from distill_jax.types import Batch, Model, Variables

HostBatch = Mapping[str, np.ndarray]
Examples = data.Source | Iterable[HostBatch]


def predict(
  model: Any,
  variables: Any,
  examples: Examples | HostBatch,
  *,
  batch_size: int = 256,
) -> dict[str, Any]:
  """Returns a model's outputs in evaluation mode, as host arrays.

  Args:
    model, variables, batch_size: as in `evaluate`.
    examples: one batch (a mapping of arrays), a `Source`, or an iterable of batches; outputs of all
      valid rows are joined, in order.

  Raises:
    ValueError: no variables, no batch, batches that are not alike, NaN, or uint8 images.

  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from distill_jax import models
  >>> model = models.from_apply(None, lambda w, x: x @ w, variables=jnp.eye(2), inputs="x")
  >>> batch = {"x": np.eye(2, dtype=np.float32)}
  >>> from distill_jax.train import predict
  >>> predict(model, model.variables, batch)["logits"].shape
  (2, 2)
  """
  if isinstance(examples, Mapping):
    with name_field("examples"):
      batch = data.to_batch(examples)
      data.check_batch(batch, {})
    model, variables = trained_model("model", model, variables, batch)
    check_inputs([("model", model, variables)], batch)
    rows = split_rows(batch, variables)
    outputs = jax.device_get(model_outputs(model.apply, variables, rows))
    count = data.count_rows(batch)
    return outputs if count == data.count_rows(rows) else jax.tree.map(lambda x: x[:count], outputs)
  batches, first = with_first(iterate(examples, batch_size))
  model, variables = trained_model("model", model, variables, first)
  check_inputs([("model", model, variables)], first)

  def outputs_of_valid(batch: HostBatch) -> dict[str, Any]:
    rows = split_rows(batch, variables)
    outputs = jax.device_get(model_outputs(model.apply, variables, rows))
    where = np.asarray(valid_rows(batch))
    return jax.tree.map(lambda x: x[: len(where)][where], outputs)

  parts = list(map_batches(outputs_of_valid, batches, "examples"))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def iterate(examples: Examples, batch_size: int) -> Iterator[HostBatch]:
  """Yields every example once, in order, in batches; 'where' marks padding of the last one.

  Raises (while it iterates):
    ValueError: there is no batch, or one is not like the first or holds NaN.
  """
  source = as_source("examples", examples)
  batches = evaluation_batches(source, batch_size, None, classes={}, field="examples")
  return batches()


def split_rows(batch: HostBatch, variables: Variables) -> Batch:
  """Returns a batch whose rows are split over the mesh of the variables, filled up under 'where'.

  Without a mesh, or in a run of several processes, whose rows are not known, it stays as it is.
  """
  shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(tuple(variables))]
  meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)]
  meshes = [mesh for mesh in meshes if mesh.size > 1]
  if not meshes or jax.process_count() > 1:
    return batch
  rows = sharding.next_divisible(data.count_rows(batch), meshes[0])
  if rows > data.count_rows(batch):
    batch = fill_up(batch, rows)
  return sharding.place_rows(batch, meshes[0], rows)


@functools.partial(jax.jit, static_argnums=0)
def model_outputs(apply, variables, batch):
  """Returns a model's outputs for a batch."""
  return apply(*variables, batch, train=False, key=None)[0]


def check_inputs(models: Sequence[tuple[str, Model, Variables]], batch: HostBatch) -> None:
  """Checks that networks take a batch, and the images that they read.

  Args:
    models: (name of the argument, Model, variables) each.
    batch: the first one.

  Raises:
    ValueError: a network does not take the batch's shapes, or reads uint8 images.
  """
  check_image_inputs("examples", [(model, variables) for _, model, variables in models], batch)
  for field, model, variables in models:
    output_shapes = functools.partial(jax.eval_shape, model_outputs, model.apply, variables)
    with name_network(field, batch, output_shapes):
      output_shapes(batch)


def valid_rows(batch: Mapping[str, Any]) -> Any:
  """Returns which rows of a batch count, bool [rows]."""
  rows = len(next(iter(batch.values())))
  return batch.get("where", np.ones(rows, bool))


def with_first(batches: Iterator[HostBatch]) -> tuple[Iterator[HostBatch], HostBatch]:
  """Returns the batches, none lost, and the first one.

  Raises:
    ValueError: there is no batch.
  """
  first = next(batches, None)
  if first is None:
    raise ValueError("examples: expected at least one batch, got none: give a Source or batches")
  return itertools.chain([first], batches), first
