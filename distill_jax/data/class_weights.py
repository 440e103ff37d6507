"""Weights that let rare classes count as much as frequent ones."""

import numpy as np

from distill_jax.data.source import Source
from distill_jax.errors import suggest

FORMULAS = ("inverse_frequency", "median_frequency", "effective_number")


def class_weights(
  source: Source, formula: str = "inverse_frequency", *, beta: float | None = None
) -> np.ndarray:
  """Returns a weight for each class, for `objectives.labels` and `objectives.logits`.

  With n_c labels of class c, n labels in all and C classes that occur:

  - 'inverse_frequency': n / (C n_c), as `compute_class_weight("balanced")` of scikit-learn.
  - 'median_frequency' (Eigen and Fergus 2015): the median of all frequencies over f_c, with f_c =
    n_c over the number of labels in the label maps that contain c.
  - 'effective_number' (Cui et al. 2019): 1 / E_c, with E_c = (1 - beta^n_c) / (1 - beta), scaled so
    that the weights have the mean 1.

  Args:
    source: the examples to train on, with classes; labels [N, ...] without a class do not count.
    formula: one of these.
    beta: of 'effective_number', from 0 (all weights are 1) to less than 1; None: 1 - 1 / n.

  Returns:
    float64 [classes]; 1 for a class that does not occur.

  Raises:
    ValueError: a source without class numbers or without any label, an unknown formula, beta next
      to another one or out of its range, or 'median_frequency' of one label per example.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> label = np.array([[[0, 0], [0, 1]], [[0, 0], [255, 255]]])
  >>> source = data.Source({"label": label}, classes=2, ignore_label=255)
  >>> data.class_weights(source).round(3).tolist()
  [0.6, 3.0]
  >>> data.class_weights(source, "median_frequency").round(3).tolist()
  [0.65, 2.167]
  """
  _check(source, formula, beta)
  assert source.classes is not None  # Checked.
  maps = _label_counts(source.arrays["label"], source.classes)
  counts = maps.sum(0)
  occurs = counts > 0
  if not occurs.any():
    raise ValueError(f"source: expected labels in {source.name}, got none: add some")
  weights = np.ones(source.classes)
  if formula == "median_frequency":
    sizes = (maps.sum(1, keepdims=True) * (maps > 0)).sum(0)
    frequencies = counts[occurs] / sizes[occurs]
    weights[occurs] = np.median(frequencies) / frequencies
    return weights
  if formula == "inverse_frequency":
    weights[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return weights
  beta = 1 - 1 / counts.sum() if beta is None else beta
  inverse = 1 / (1 - beta ** counts[occurs])
  weights[occurs] = inverse / inverse.mean()
  return weights


def _check(source: Source, formula: str, beta: float | None) -> None:
  """Raises a ValueError for arguments that fit no formula."""
  if not isinstance(source, Source):
    raise ValueError(
      f"source: expected a Source, got {type(source).__name__}: write "
      "data.Source({'label': label}, classes=C, ignore_label=255)"
    )
  label = source.arrays.get("label")
  if source.classes is None or label is None or not np.issubdtype(label.dtype, np.integer):
    got = "none" if label is None else f"{label.dtype} {list(label.shape)}"
    raise ValueError(
      f"source: expected classes and labels of class numbers, got {got} in {source.name}: write "
      "data.Source({'label': label}, classes=C)"
    )
  if formula not in FORMULAS:
    raise ValueError(
      f"formula: expected one of {FORMULAS}, got {formula!r}{suggest(str(formula), FORMULAS)}"
    )
  if formula == "median_frequency" and label.ndim == 1:
    raise ValueError(
      "formula: expected label maps [N, ...] for 'median_frequency', got one label per example: "
      "use 'inverse_frequency'"
    )
  if beta is not None and (formula != "effective_number" or not 0 <= beta < 1):
    raise ValueError(
      f"beta: expected a number from 0 to less than 1 for 'effective_number', got {beta} for "
      f"{formula!r}: leave it out"
    )


def _label_counts(label: np.ndarray, classes: int) -> np.ndarray:
  """Returns how many labels of each class each example has, int64 [N, classes]."""
  counts = np.zeros((len(label), classes), np.int64)
  for i, example in enumerate(label.reshape(len(label), -1)):
    counts[i] = np.bincount(example[example >= 0], minlength=classes)
  return counts
