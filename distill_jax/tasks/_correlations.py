"""Correlations of two rows of numbers, on the host."""

import numpy as np


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
  """Returns 'pearson' and 'spearman' (scipy's `pearsonr` and `spearmanr`) of float [N] each.

  One rule for what is undefined: where the true numbers define no correlation (fewer than two, or
  all equal) there is none; where the predicted ones define none (all equal, or one not finite) both
  are NaN.
  """
  predicted, true = (np.asarray(x, np.float64) for x in (predicted, true))
  if len(true) < 2 or not np.ptp(true):
    return {}
  if not np.isfinite(predicted).all() or not np.ptp(predicted):
    return {"pearson": np.nan, "spearman": np.nan}
  from scipy import stats

  return {
    "pearson": float(stats.pearsonr(predicted, true).statistic),
    "spearman": float(stats.spearmanr(predicted, true).statistic),
  }
