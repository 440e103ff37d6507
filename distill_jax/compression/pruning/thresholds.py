"""How far each layer can be cut: thresholds under which its weights are zero and the score stays high enough.

The last step of structured sparsity by regularization (Wen et al. 2016, section 3): a penalty of `regularize` has made
groups of weights small, and each layer gets the highest threshold that the accuracy on validation examples allows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.pruning.groups import Groups, widths
from distill_jax.compression.pruning.weights import KERNELS
from distill_jax.compression.regularizers.penalties import OUTPUTS, Axes, within
from distill_jax.trees import chosen, named_leaves
from distill_jax.types import Tree


class Cut(NamedTuple):
  """What `search_thresholds` found.

  Attributes:
    params: with zeros for all groups whose root mean square is at most their layer's threshold.
    thresholds: by path; 0 where nothing could be cut.
    sparsity: by path, the share of groups that are zero.
    score: of `params`, by `evaluate`.
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
) -> Cut:
  """Cuts one layer after the other, each as far as the score allows, from the largest array to the smallest.

  The score may fall from what it is to `minimum`; of that fall each layer may use an equal share, and what earlier ones
  left. A layer's threshold is found by bisection over its groups in the order of their size, so `evaluate` is called
  about log2(groups) times for each layer.

  Args:
    params: of the network, trained.
    evaluate: `params -> score`, the higher the better, such as the accuracy on validation examples.
    minimum: the lowest score allowed.
    pattern: which leaves are layers, see `paths.matching`.
    axes: which number a layer's groups, see `regularize`; None: single numbers. One group of each layer stays.

  Raises:
    ValueError: the budget cannot be met: the score is below `minimum` before anything is cut; a pattern that fits
      nothing; or an array that has not these axes.
  """
  layers = sorted(chosen(params, pattern).items(), key=lambda item: -item[1].size)
  leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
  thresholds, sparsity = {}, {}

  def rebuilt(changed: dict[str, np.ndarray]) -> Tree:
    return jax.tree.unflatten(
      jax.tree.structure(params), [jnp.asarray(changed[name]) for name in leaves]
    )

  score = start = float(evaluate(params))
  if not score >= minimum:
    raise ValueError(
      f"minimum: expected a score that the network reaches uncut, got {minimum}; it reaches {start:.6g}"
    )
  for number, (name, leaf) in enumerate(layers, 1):
    allowed = start - (start - minimum) * number / len(layers)
    sizes = _sizes(np.asarray(leaf), axes)
    levels = np.unique(sizes)[:-1]  # the largest group stays
    good, bad = -1, len(levels)
    while bad - good > 1:
      middle = (good + bad) // 2
      tried = leaves | {name: np.where(sizes <= levels[middle], 0, leaves[name])}
      reached = float(evaluate(rebuilt(tried)))
      if reached >= allowed:
        good, score, best = middle, reached, tried
      else:
        bad = middle
    if good >= 0:
      leaves = best
    thresholds[name] = float(levels[good]) if good >= 0 else 0.0
    sparsity[name] = float((sizes <= thresholds[name]).mean())
  return Cut(rebuilt(leaves), thresholds, sparsity, score)


def cleared(params: Tree, groups: Groups) -> Tree:
  """With channels whose kernels are zero dead as a whole: their biases, and batch norm's, become zero as well.

  What such a channel said, its bias, was the same for every input; `shrink` removes it only where it says nothing.

  Raises:
    ValueError: groups that are not the tree's (`groups.widths`).
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
      own = living.repeat(leaves[path].shape[axis] // width).reshape(shape)
      leaves[path] = np.where(own, leaves[path], 0).astype(leaves[path].dtype)
  return jax.tree.unflatten(jax.tree.structure(params), list(map(jnp.asarray, leaves.values())))


def _sizes(w: np.ndarray, axes: Axes | None) -> np.ndarray:
  """The root mean square of each number's group, of a shape that broadcasts to w's."""
  w = w.astype(np.float64)
  if axes is None:
    return np.abs(w)
  return np.sqrt((w**2).mean(within(w, axes), keepdims=True))
