"""Applies models to any examples, in evaluation mode."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.models.image_inputs import check_image_inputs
from distill_jax.models.input_errors import name_network
from distill_jax.models.networks import trained_model
from distill_jax.train.batch_errors import map_batches, name_field
from distill_jax.train.inputs import as_source, evaluation_batches
from distill_jax.types import Model, Variables

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
  """
  if isinstance(examples, Mapping):
    with name_field("examples"):
      batch = data.to_batch(examples)
      data.check_batch(batch, {})
    model, variables = trained_model("model", model, variables, batch)
    check_inputs([("model", model, variables)], batch)
    return jax.device_get(model_outputs(model.apply, variables, batch))
  batches, first = with_first(iterate(examples, batch_size))
  model, variables = trained_model("model", model, variables, first)
  check_inputs([("model", model, variables)], first)

  def outputs_of_valid(batch: HostBatch) -> dict[str, Any]:
    outputs = jax.device_get(model_outputs(model.apply, variables, batch))
    where = np.asarray(valid_rows(batch))
    return jax.tree.map(lambda x: x[where], outputs)

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
    with name_network(field, batch):
      jax.eval_shape(functools.partial(model_outputs, model.apply), variables, batch)


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
