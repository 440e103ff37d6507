"""Adds several terms to one, such as those of the levels of a detector's neck."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.objectives.terms import Term, apply_parts, init_parts
from distill_jax.types import Batch


def summed(*terms: Term) -> Term:
  """Returns one term, the sum of several: one weight and one metric for the levels of a neck.

      summed(*[fgd(f"p{k}", f"p{k}", stride=2**k) for k in (3, 4, 5)])

  Its value is the sum of the terms' values, each the mean over what counts in that term, as if they
  were terms of their own under one weight. Learned parts and memories are those of '0', '1', ....

  Where the terms do not mask the same rows, or mask positions, each mean is over what counts in a
  microbatch, while the sum is a mean over the rows of the batch: under gradient accumulation the
  result then differs slightly from that of separate terms.

  Args:
    *terms: at least one, of values [B, ...] or scalars.

  Raises:
    ValueError: at once, no term, or something else; in init and in a step, what a term raises,
      after its number.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> levels = [objectives.features(name, name, losses.hint) for name in ("p3", "p4")]
  >>> term = objectives.summed(*levels)
  >>> student = {"p3": jnp.ones((2, 4, 4, 1)), "p4": jnp.ones((2, 2, 2, 1))}
  >>> teacher = {"p3": jnp.zeros((2, 4, 4, 1)), "p4": jnp.zeros((2, 2, 2, 1))}
  >>> params, state = term.init(jax.random.key(0), student, teacher)
  >>> options = {"step": 0, "key": jax.random.key(0)}
  >>> (values, where), state = term.apply(params, state, student, teacher, {}, **options)
  >>> values
  Array([2., 2.], dtype=float32)
  """
  if not terms:
    raise ValueError("terms: expected at least one, got none: pass summed(fgd(...), fgd(...))")
  for i, term in enumerate(terms):
    if not isinstance(term, Term):
      hint = "; the weight belongs to the sum" if isinstance(term, tuple) else ""
      raise ValueError(
        f"terms: expected Terms such as fgd(...), got {type(term).__name__} at {i}{hint}: pass "
        "summed(*terms)"
      )
  parts = {str(i): term for i, term in enumerate(terms)}

  def init(key, student, teacher):
    return init_parts(parts, key, student, teacher)

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    values, new_state = apply_parts(
      parts, params, state, student, teacher, batch, step=step, key=key, axis_name=axis_name
    )
    return sum_values(list(values.values()), batch, axis_name), new_state

  return Term(init, apply)


def sum_values(values: list[Any], batch: Batch, axis_name: str | None) -> Any:
  """Returns one value: a scalar if all are, or one a row whose mean is the sum of the means."""
  rows = [value for value in values if isinstance(value, tuple)]
  if not rows:
    return sum(values[1:], values[0])
  where = batch.get("where")
  size = len(rows[0][0])
  parts = []
  for value in values:
    if isinstance(value, tuple):
      unreduced, counted = value
      value = _per_row(unreduced, counted, where, axis_name)
    dtype = reduce.common_dtype(value.dtype, jnp.float32)
    parts.append(jnp.broadcast_to(value.astype(dtype), size))
  return sum(parts[1:], parts[0]), where


def _per_row(
  values: jax.Array, counted: jax.Array | None, where: jax.Array | None, axis_name: str | None
) -> jax.Array:
  """Returns numbers [B] whose mean over the batch's valid rows is the mean of what is counted.

  Args:
    values: unreduced, [B, ...].
    counted: which of them count, bool, a prefix of their shape; None: all.
    where: the batch's valid rows, bool [B]; None: all.
    axis_name: mapped axis whose devices hold the other rows.
  """
  values = values.astype(reduce.common_dtype(values.dtype, jnp.float32))
  axes = tuple(range(1, values.ndim))
  if counted is where:
    return reduce.blank(where, values).mean(axes)
  rows = jnp.ones(len(values), bool) if where is None else where
  _, valid_rows = reduce.total(jnp.zeros(len(values), values.dtype), rows, axis_name=axis_name)
  _, count = reduce.total(jnp.zeros_like(values), counted, axis_name=axis_name)
  return reduce.blank(counted, values).sum(axes) * (valid_rows / jnp.maximum(count, 1))
