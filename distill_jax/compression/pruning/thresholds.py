"""Searches the highest threshold for each layer: smaller weights become zero, the score stays high.

The last step of structured sparsity by regularization (Wen et al. 2016, section 3): a penalty of
`regularizers` has made groups of weights small, and each layer gets the highest threshold that the
score on validation examples allows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.pruning.groups import Groups, widths
from distill_jax.compression.pruning.weights import KERNELS
from distill_jax.compression.regularizers.penalties import OUTPUTS, Axes, inner_axes
from distill_jax.trees import named_leaves, select_leaves
from distill_jax.types import Tree


class ThresholdResult(NamedTuple):
  """The result of `search_thresholds`.

  Attributes:
    params: parameters with zeros in each group whose root mean square is at most its layer's
      threshold.
    thresholds: threshold by path; 0 where nothing could be cut.
    sparsity: fraction of zero groups by path.
    score: score of `params`, by `evaluate`.
  """

  params: Tree
  thresholds: dict[str, float]
  sparsity: dict[str, float]
  score: float


def search_thresholds(
  params: Tree,
  evaluate: Callable[[Tree], float],
  *,
  minimum: float,
  pattern: str = KERNELS,
  axes: Axes | None = OUTPUTS,
) -> ThresholdResult:
  """Cuts one layer after the other, from the largest array on, each as far as the score allows.

  The score may fall to `minimum`; each layer may use an equal fraction of that fall, and what
  earlier ones left. Bisection over the groups of a layer, in the order of their size, calls
  `evaluate` about log2(groups) times for each layer.

  Args:
    params: trained parameters of the network.
    evaluate: `params -> score`, the higher the better, such as the accuracy on validation examples.
    minimum: lowest allowed score.
    pattern: regular expression found in the paths of the layers, see `trees.path_mask`.
    axes: axes that number a layer's groups, see `regularizers.penalties`; None: each value is a
      group. One group of each layer remains.

  Raises:
    ValueError: the score is below `minimum` before anything is cut; a pattern that fits nothing; or
      an array without these axes.
  """
  layers = sorted(select_leaves(params, pattern).items(), key=lambda item: -item[1].size)
  leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
  thresholds, sparsity = {}, {}
  score = start = float(evaluate(params))
  if not score >= minimum:
    raise ValueError(
      f"minimum: expected at most the score of the uncut network, {start:.6g}, got {minimum}"
    )
  for number, (name, leaf) in enumerate(layers, 1):
    allowed = start - (start - minimum) * number / len(layers)
    sizes = _group_sizes(np.asarray(leaf), axes)
    # The largest group remains.
    levels = np.unique(sizes)[:-1]
    good, bad = -1, len(levels)
    while bad - good > 1:
      middle = (good + bad) // 2
      candidate = leaves | {name: np.where(sizes <= levels[middle], 0, leaves[name])}
      candidate_score = float(evaluate(_rebuild(params, candidate)))
      if candidate_score >= allowed:
        good, score, best = middle, candidate_score, candidate
      else:
        bad = middle
    if good >= 0:
      leaves = best
    thresholds[name] = float(levels[good]) if good >= 0 else 0.0
    sparsity[name] = float((sizes <= thresholds[name]).mean())
  return ThresholdResult(_rebuild(params, leaves), thresholds, sparsity, score)


def zero_dead_channels(params: Tree, groups: Groups) -> Tree:
  """Sets the biases and norms of channels whose kernels are zero to zero as well.

  The output of such a channel, its bias, was the same for every input; `shrink` removes only
  channels without any output.

  Raises:
    ValueError: groups that do not fit the tree (`groups.widths`).
  """
  leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
  for name, width in widths(groups, params).items():
    living = np.zeros(width, bool)
    for path, axis in groups[name].writers:
      if leaves[path].ndim > 1:
        living |= (np.moveaxis(leaves[path], axis, 0).reshape(width, -1) != 0).any(1)
    for path, axis in groups[name].writers:
      shape = [1] * leaves[path].ndim
      shape[axis] = -1
      mask = living.repeat(leaves[path].shape[axis] // width).reshape(shape)
      leaves[path] = np.where(mask, leaves[path], 0).astype(leaves[path].dtype)
  return _rebuild(params, leaves)


def _rebuild(params: Tree, leaves: dict[str, np.ndarray]) -> Tree:
  """Returns a tree of the params' structure with these leaves, in their order."""
  return jax.tree.unflatten(jax.tree.structure(params), list(map(jnp.asarray, leaves.values())))


def _group_sizes(w: np.ndarray, axes: Axes | None) -> np.ndarray:
  """Returns the root mean square of each value's group, of a shape that broadcasts to w's."""
  w = w.astype(np.float64)
  if axes is None:
    return np.abs(w)
  return np.sqrt((w**2).mean(inner_axes(w, axes), keepdims=True))
