"""Finds teacher outputs that must not be stored: on the device per example, named on the host."""

import jax
import jax.numpy as jnp
import numpy as np

REASONS = (
  "",
  "has NaN or +inf",
  "has a row of logits that are all -inf: no class exists",
  "has a value that overflows its codec's dtype: use Dense('float32')",
  "has values that its codec's dtype rounds too coarsely: use Dense('float32'), subtract each "
  "row's largest logit, or pass Dense(dtype, logits=True) for logits of another name",
  "has an integer below 0, or above num_codes - 1: use Codes with as many as there are",
)
NOT_FINITE, NO_CLASS, OVERFLOW, COARSE, OUTSIDE = range(1, 6)


def value_errors(output: jax.Array, overflow: jax.Array, coarse: jax.Array) -> jax.Array:
  """Returns the index of a reason for each example, uint8 [B]; 0 for none.

  Args:
    output: [B, ...]; -inf is no error.
    overflow: bool [B, ...], True for values that the dtype does not hold.
    coarse: bool [B], True for examples that it rounds too coarsely.
  """
  marks = (_not_finite(output), NOT_FINITE), (overflow, OVERFLOW), (coarse, COARSE)
  return _first_error(*marks)


def logit_errors(logits: jax.Array) -> jax.Array:
  """Returns what `value_errors` does for logits [B, ..., V]; every row needs a class > -inf."""
  return _first_error((_not_finite(logits), NOT_FINITE), ((logits == -jnp.inf).all(-1), NO_CLASS))


def integer_errors(output: jax.Array, num_codes: int) -> jax.Array:
  """Returns what `value_errors` does for integers [B, ...] from 0 to num_codes - 1."""
  # In the output's dtype num_codes may be too large a number.
  return _first_error(((output < 0) | (output.astype(jnp.uint32) >= num_codes), OUTSIDE))


def check_errors(name: str, errors: np.ndarray, ids: np.ndarray, views: np.ndarray) -> None:
  """Raises for the first example whose output cannot be stored.

  Args:
    name: of the output, for the message.
    errors: a codec's `errors(output)`, integers [B], of the rows that count.
    ids, views: integers [B].

  Raises:
    ValueError: the message names the example, its view and the reason.
  """
  rows = np.flatnonzero(np.asarray(errors))
  if rows.size:
    row = rows[0]
    raise ValueError(
      f"outputs[{name!r}]: example id {int(ids[row])}, view {int(views[row])} "
      f"{REASONS[int(errors[row])]} ({rows.size} such rows of {len(errors)})"
    )


def check_output_shape(output: jax.Array | jax.ShapeDtypeStruct, axes: int) -> None:
  """Checks that an output is floating [B, ...] with at least `axes` axes, none of them empty.

  Raises:
    ValueError: another shape or dtype.
  """
  is_floating = jnp.issubdtype(output.dtype, jnp.floating)
  if len(output.shape) < axes or 0 in output.shape[1:] or not is_floating:
    raise ValueError(
      f"output: expected floating values with at least {axes} axes, rows first, none empty; "
      f"got {output.dtype} {tuple(output.shape)}"
    )


def _not_finite(output: jax.Array) -> jax.Array:
  return jnp.isnan(output) | (output == jnp.inf)


def _first_error(*marks_and_errors: tuple[jax.Array, int]) -> jax.Array:
  """Returns for each example [B] the first error that is marked anywhere in it."""
  errors = jnp.zeros(marks_and_errors[0][0].shape[0], jnp.uint8)
  for marks, error in reversed(marks_and_errors):
    is_marked = marks.reshape(len(errors), -1).any(-1)
    errors = jnp.where(is_marked, jnp.uint8(error), errors)
  return errors
