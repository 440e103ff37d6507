"""Pairs layers of a student with layers of its teacher."""

from collections.abc import Sequence
from typing import Any

import jax

from distill_jax.errors import check_integer, suggest
from distill_jax.objectives.hyperparameters import is_integer

Pairs = Sequence[tuple[int, int]]
MAPS = ("uniform", "last", "skip")


def layer_map(
  student_depth: int, teacher_depth: int, how: str = "uniform"
) -> tuple[tuple[int, int], ...]:
  """Returns pairs (student layer m, teacher layer g(m)) for m = 1 ... S, counted from 1.

  Patient knowledge distillation (Sun et al. 2019, section 3.2) leaves the last student layer to
  the logits: its PKD-Skip is 'uniform' and its PKD-Last 'last', both without the last pair,
  `layer_map(6, 12)[:-1]`.

  Args:
    student_depth: number of student layers S.
    teacher_depth: number of teacher layers T >= S. Quotients are rounded down.
    how: 'uniform': g(m) = m T / S, every n-th up to the last (TinyBERT, Jiao et al. 2020,
      section 4). 'last': g(m) = m + T - S, the last ones (its 'top'). 'skip':
      g(m) = 1 + (m - 1) T / S, every n-th from the first (DistilBERT's initialization, Sanh et
      al. 2019).

  Raises:
    ValueError: another map, a depth below 1, or more layers than the teacher has.

  >>> layer_map(3, 6, "skip")
  ((1, 1), (2, 3), (3, 5))
  """
  if how not in MAPS:
    raise ValueError(f"how: expected one of {MAPS}, got {how!r}{suggest(how, MAPS)}")
  check_integer("student_depth", student_depth, 1)
  check_integer("teacher_depth", teacher_depth, 1)
  if student_depth > teacher_depth:
    raise ValueError(
      f"student_depth: expected 1 to {teacher_depth}, the teacher's layers, got {student_depth}"
    )
  teacher_layer = {
    "uniform": lambda m: m * teacher_depth // student_depth,
    "last": lambda m: m + teacher_depth - student_depth,
    "skip": lambda m: 1 + (m - 1) * teacher_depth // student_depth,
  }[how]
  return tuple((m, teacher_layer(m)) for m in range(1, student_depth + 1))


def check_pairs(pairs: Pairs, last: int | None) -> None:
  """Raises a `ValueError` for invalid pairs of layers, or an invalid number of last tokens."""
  if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
    raise ValueError(f"pairs: expected [(student layer, teacher layer), ...], got {pairs!r}")
  for pair in pairs:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_layer, pair)):
      raise ValueError(
        f"pairs: expected (student layer, teacher layer) each, integers from 1, got {pair!r}"
      )
  if last is not None:
    check_integer("last", last, 1)


def _is_layer(layer: Any) -> bool:
  return is_integer(layer) and layer >= 1


def last_entries(x: jax.Array, last: int | None, axes: tuple[int, ...]) -> jax.Array:
  """Returns the last entries along these axes; None: all."""
  if last is None:
    return x
  for axis in axes:
    x = jax.lax.slice_in_dim(x, max(0, x.shape[axis] - last), None, axis=axis)
  return x
