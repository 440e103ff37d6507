"""Confidence intervals of differences, which vary with the seeds and with the test examples."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


def example_error(leave_out: np.ndarray) -> float:
  """Returns the standard error over test examples of a score, by the jackknife.

  Args:
    leave_out: float [K], the score without each of K parts of the examples, drawn at random.

  Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), equation 11.5, with parts
  in place of single examples; of a mean of equal parts it is the error of the mean exactly.
  """
  parts = len(leave_out)
  return math.sqrt((parts - 1) / parts * float(((leave_out - leave_out.mean()) ** 2).sum()))


def interval(
  values: Sequence[float], leave_out: Sequence[np.ndarray]
) -> tuple[float, float] | None:
  """Returns the 95 % confidence interval of the mean of one score's differences.

  The variances over seeds and over test examples are added, and the degrees of freedom are those
  of Welch and Satterthwaite. The seeds share their test examples, so the error over examples is
  that of the mean over seeds.

  Args:
    values: the differences, one per seed.
    leave_out: of each seed, the differences float [K] without each of K parts of the test examples;
      empty: unknown, and the interval covers the seeds alone.

  Returns:
    `(low, high)`; None with one seed, and with equal values whose error over examples is unknown.
  """
  if len(values) < 2 or (not leave_out and len(set(values)) == 1):
    return None
  center = float(np.mean(values))
  variances = [(float(np.var(values, ddof=1)) / len(values), len(values) - 1)]
  if leave_out:
    error = example_error(np.mean(leave_out, axis=0))
    variances.append((error**2, len(leave_out[0]) - 1))
  total = sum(variance for variance, _ in variances)
  if not total:
    return center, center
  freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
  half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(total)
  return center - half, center + half
