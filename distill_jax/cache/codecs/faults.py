"""Teacher outputs that must not be kept: found on the device for each example, named on the host."""

import jax
import jax.numpy as jnp
import numpy as np

REASONS = (
  "",
  "holds NaN or +inf",
  "has a row of logits that are all -inf: no class exists",
  "holds a number that its codec's dtype does not: keep it as float32",
)
NOT_FINITE, NO_CLASS, OVERFLOW = range(1, 4)


def of_numbers(output: jax.Array, over: jax.Array) -> jax.Array:
  """Per example [B], uint8, the number of a reason, 0 for none.

  Args:
    output: [B, ...]; -inf is no fault.
    over: bool [B, ...], numbers that the dtype does not hold.
  """
  return _first((_not_finite(output), NOT_FINITE), (over, OVERFLOW))


def of_logits(logits: jax.Array) -> jax.Array:
  """As `of_numbers`, of logits [B, ..., V]: each row of V needs a class that exists."""
  return _first((_not_finite(logits), NOT_FINITE), ((logits == -jnp.inf).all(-1), NO_CLASS))


def check(name: str, found, ids, views) -> None:
  """Stop at the first example whose output cannot be kept.

  Args:
    name: the output's, for the message.
    found: a codec's `faults(output)`, integers [B]; leave out rows that do not count.
    ids, views: integers [B].

  Raises:
    ValueError: it names the example, its view and the reason.
  """
  rows = np.flatnonzero(np.asarray(found))
  if rows.size:
    row = rows[0]
    raise ValueError(
      f"teacher output {name!r} of example id {int(ids[row])}, view {int(views[row])} "
      f"{REASONS[int(found[row])]} ({rows.size} such rows of {len(found)})"
    )


def check_indices(name: str, indices, classes: int, ids) -> None:
  """Stop at the first example that keeps what is no class. `encode` makes none, and the losses give NaN for one.

  Args:
    name: the output's, for the message.
    indices: decoded, integers [B, ..., K].
    classes: V.
    ids: integers [B].

  Raises:
    ValueError: it names the example and the index.
  """
  indices = np.asarray(indices)
  wrong = np.argwhere((indices < 0) | (indices >= classes))
  if wrong.size:
    value, row = int(indices[tuple(wrong[0])]), wrong[0][0]
    raise ValueError(
      f"teacher output {name!r} of example id {int(ids[row])} keeps class {value}; "
      f"the classes are 0 to {classes - 1}"
    )


def check_output(output, axes: int) -> None:
  """A ValueError unless the output, or its `ShapeDtypeStruct`, is floating [B, ...] with so many axes."""
  if (
    len(output.shape) < axes
    or 0 in output.shape[1:]
    or not jnp.issubdtype(output.dtype, jnp.floating)
  ):
    raise ValueError(
      f"a teacher's output must be floating with at least {axes} axes, rows first, none empty; "
      f"got {output.dtype} {tuple(output.shape)}"
    )


def _not_finite(output):
  return jnp.isnan(output) | (output == jnp.inf)


def _first(*marked):
  """Per example [B], the first fault that is marked anywhere in it."""
  worst = jnp.zeros(marked[0][0].shape[0], jnp.uint8)
  for marks, fault in reversed(marked):
    worst = jnp.where(marks.reshape(len(worst), -1).any(-1), jnp.uint8(fault), worst)
  return worst
