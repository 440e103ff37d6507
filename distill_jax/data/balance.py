"""Orders an epoch so that all classes are equally frequent."""

import numpy as np

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source


def balanced_order(
  classes: np.ndarray, generator: np.random.Generator, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows of an epoch in which each class has the same number of rows, up to one.

  A rare class's rows come several times, each time as another view; of a frequent one some are
  left out, others in each epoch. (Class-balanced sampling, Kang et al. 2020, section 4.1.)

  Args:
    classes: the class of each row, int [N].
    generator: of the epoch.
    epoch: number of the epoch.

  Returns:
    Indices of rows and views, int64 [N] each.
  """
  values, sizes = np.unique(classes, return_counts=True)
  share, rest = divmod(len(classes), len(values))
  has_one_more = generator.permutation(len(values)) < rest
  max_repeats = -(-(share + 1) // sizes.min())
  positions, views = [], []
  for value, size, one_more in zip(values, sizes, has_one_more):
    count = share + one_more
    rows = np.flatnonzero(classes == value)
    repeats = -(-count // size)
    orders = [rows[generator.permutation(size)] for _ in range(repeats)]
    positions.append(np.concatenate([rows[:0], *orders])[:count])
    views.append(epoch * max_repeats + np.arange(count) // size)
  order = generator.permutation(len(classes))
  return np.concatenate(positions)[order], np.concatenate(views)[order]


def check_balance(source: Source, entry: str, ignore_label: int | None = None) -> np.ndarray:
  """Returns the classes of the rows of a source, int [N].

  Args:
    source: the examples.
    entry: the entry with the classes.
    ignore_label: the value that marks rows without a label in a source without classes; or None.

  Raises:
    ValueError: the source has no such entry, it holds no integers [N], or a row has no label.
  """
  classes = source.integers("balance", entry)
  is_unlabeled = np.zeros(len(classes), bool) if ignore_label is None else classes == ignore_label
  if entry == "label" and source.classes is not None:
    is_unlabeled |= classes == UNLABELED
  if is_unlabeled.any():
    value = classes[is_unlabeled][0]
    raise ValueError(
      f"balance: expected a label of all examples of {source.name}, got {is_unlabeled.sum()} "
      f"without ({value}): train on source.take(source.arrays[{entry!r}] != {value}), or balance "
      "another entry"
    )
  return classes
