"""Checks before training that the objective has something to learn from."""

from typing import Any

import jax
import numpy as np

from distill_jax import data
from distill_jax.objectives.left_out import is_fraction
from distill_jax.train.arguments import Arguments, Inputs
from distill_jax.train.loss_fn import count_terms, make_loss_fn
from distill_jax.types import TrainState


def check_terms(arguments: Arguments, inputs: Inputs, state: TrainState) -> None:
  """Checks that a set in memory has a value for some term of the objective: labels, for one.

  Raises:
    ValueError: no term has one in any batch; training would change nothing.
  """
  source, teacher = arguments.source, arguments.teacher
  if not isinstance(source, data.Source):
    return
  ignore_label = arguments.run.ignore_label
  blank = _blank_entries(source, ignore_label)
  if not blank:
    return
  loss_fn = make_loss_fn(arguments.student, teacher, arguments.objective)
  average = teacher is not None and teacher.ema_update is not None
  teacher_variables = state.average if average else inputs.teacher_variables

  @jax.jit
  def count(batch):
    _, aux = loss_fn(
      state.params, state.model_state, teacher_variables, batch, step=state.step, key=state.key
    )
    return count_terms(aux.terms)

  counts: dict[str, Any] = {}
  for batch in data.eval_batches(source, arguments.batch_size):
    labels = {name: data.mark_unlabeled(batch[name], ignore_label) for name in blank}
    columns = {} if arguments.cache is None else arguments.cache.add_columns(batch)
    counts = count({**batch, **columns, **labels})
    if any(n > 0 for name, n in counts.items() if not is_fraction(name)):
      return
  raise ValueError(
    f"source: expected labels, or others that give {' or '.join(counts)} a value, got none in all "
    f"{len(source)} examples, so that nothing would be trained: add labels, or a term that "
    "compares with a teacher"
  )


def _blank_entries(source: data.Source, ignore_label: int | None) -> list[str]:
  """Returns the entries that may leave out all rows: labels that are none, masks of zeros."""
  names = []
  for name, values in source.arrays.items():
    no_label = np.issubdtype(values.dtype, np.integer) & (values < 0)
    if name != "id" and (no_label | (values == ignore_label) | (values == 0)).all():
      names.append(name)
  return names
