"""Lets models generate the text that a task scores."""

import jax
import jax.numpy as jnp

from distill_jax.types import Batch, Model, Variables


def check_sample(field: str, model: Model) -> None:
  """Checks that a model generates text.

  Args:
    field: name of the argument, for messages.
    model: the Model.

  Raises:
    ValueError: it has no `sample`.
  """
  if model.sample is None:
    raise ValueError(
      f"{field}: expected a Model with `sample`, whose text the task scores, got none: write "
      "model._replace(sample=function), (variables, key, batch) -> (tokens int [B, L], "
      "lengths int [B])"
    )


def sample_text(
  field: str, model: Model, variables: Variables, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Returns the text that a model generates for a batch: tokens int [B, L] and lengths int [B].

  The key is the same for all batches and evaluations.

  Args:
    field: name of the model, for messages.
    model, variables: the Model, and its variables.
    batch: the inputs, and whatever else the batch has.

  Raises:
    ValueError: the model has no `sample`, or it returns something else.
  """
  check_sample(field, model)
  assert model.sample is not None
  sample = model.sample(variables, jax.random.key(0), batch)
  rows = len(next(iter(batch.values())))
  shapes = jax.tree.map(jnp.shape, sample)
  is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2
  if not is_pair or len(shapes[0]) != 2 or shapes[0][0] != rows or shapes[1] != (rows,):
    raise ValueError(
      f"{field}.sample: expected (tokens [{rows}, L], lengths [{rows}]), got shapes {shapes}: "
      "return one text a row, filled up behind its length"
    )
  tokens, lengths = map(jnp.asarray, sample)
  if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (tokens, lengths)):
    raise ValueError(
      f"{field}.sample: expected integers, got {tokens.dtype} tokens and {lengths.dtype} lengths: "
      "return token ids"
    )
  return tokens, lengths
