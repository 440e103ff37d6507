"""Prunes single weights while training: transformations around an optimizer, with masks as state.

    schedule = PolynomialSchedule(1000, 8000, 100)
    prune(optax.adamw(1e-3), schedule, sparsity=0.9, pattern=r"^student/.*kernel$")

Names and meaning are jaxpruner's (Lee et al. 2023): a mask follows from the parameters and
gradients before an update and holds after it. Unlike there, a pruned parameter stays pruned. An
update that is skipped (it was not finite) does not count as a step.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import reduce
from distill_jax.compression.pruning.masks import (
  PolynomialSchedule,
  check_sparsity,
  keep_highest,
  with_masks,
)
from distill_jax.errors import suggest
from distill_jax.trees import path_mask, select_leaves
from distill_jax.types import Tree

Score = Callable[[jax.Array, jax.Array], jax.Array]
Shapes = Mapping[str, tuple[int, ...]]
KERNELS = r"(^|/)kernel$"
DISTRIBUTIONS = ("uniform", "erk", "global")


def magnitude(w: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns |w|: the smallest weights are pruned."""
  del gradient
  return jnp.abs(w)


def saliency(w: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns |w g|, to first order the effect on the loss (Molchanov et al. 2019, section 3.1)."""
  return jnp.abs(w * gradient)


def prune(
  inner: optax.GradientTransformation,
  schedule: PolynomialSchedule,
  *,
  sparsity: float,
  pattern: str = KERNELS,
  distribution: str = "uniform",
  score: Score = magnitude,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer with unstructured pruning: the weights with the lowest scores become zero.

  Args:
    inner: the optimizer.
    schedule: the steps of pruning, and how much is pruned at each.
    sparsity: final fraction of zeros among the selected parameters, in [0, 1); of each array
      round(size * (1 - sparsity)) values remain, and at least one.
    pattern: regular expression found in the paths of the leaves to prune, see `trees.path_mask`.
    distribution: 'uniform', the same fraction of each array; 'erk', see `erk`; 'global', the lowest
      scores of all.
    score: `(array, its gradient) -> scores`; the highest remain.

  Raises:
    ValueError: at once, an invalid sparsity or distribution; in init, a pattern that fits nothing.
  """
  check_sparsity(sparsity)
  if distribution not in DISTRIBUTIONS:
    raise ValueError(
      f"distribution: expected one of {DISTRIBUTIONS}, got {distribution!r}"
      f"{suggest(distribution, DISTRIBUTIONS)}"
    )

  def update_masks(index, masks, params, gradients):
    leaves = select_leaves(params, pattern)
    scores = [
      score(w, g).ravel().astype(jnp.float32)
      for w, g in zip(leaves.values(), select_leaves(gradients, pattern).values(), strict=True)
    ]
    flat = [mask.ravel() for mask in jax.tree.leaves(masks)]
    if distribution == "global":
      sizes = [w.size for w in leaves.values()]
      count = jnp.asarray(schedule.remaining(sum(sizes), sparsity))[index]
      mask = keep_highest(jnp.concatenate(scores), jnp.concatenate(flat), count)
      new = list(jnp.split(mask, np.cumsum(sizes)[:-1].tolist()))
    else:
      distribute = erk if distribution == "erk" else uniform
      sparsities = distribute({name: w.shape for name, w in leaves.items()}, sparsity)
      counts = [
        jnp.asarray(schedule.remaining(w.size, sparsities[name]))[index]
        for name, w in leaves.items()
      ]
      new = list(map(keep_highest, scores, flat, counts))
    new = [mask.reshape(w.shape) for mask, w in zip(new, leaves.values(), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(masks), new)

  return with_masks(
    inner,
    schedule,
    init_masks=functools.partial(_full_masks, pattern=pattern),
    update_masks=update_masks,
    broadcast=_unchanged,
  )


def prune_n_by_m(
  inner: optax.GradientTransformation,
  step: int,
  *,
  n: int = 2,
  m: int = 4,
  axis: int = -2,
  pattern: str = KERNELS,
  score: Score = magnitude,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer with N:M pruning: of m neighbors the n with the highest scores remain.

  Args:
    inner: the optimizer.
    step: number of the update, from 0, at which the masks are set.
    n: number of values that remain of m neighbors, from 1 to m.
    m: number of neighbors; NVIDIA's sparse tensor cores compute with 2:4 (Mishra et al. 2021).
    axis: the axis of neighbors, over which a product sums: the inputs of kernels [*window, inputs,
      outputs].
    pattern: as in `prune`.
    score: as in `prune`.

  Raises:
    ValueError: at once, an invalid n or m; in init, an array whose axis does not divide into parts
      of m, or a pattern that fits nothing.
  """
  if not 1 <= n <= m:
    raise ValueError(f"n, m: expected 1 <= n <= m, got {n} and {m}")

  def init_masks(params):
    for name, w in select_leaves(params, pattern).items():
      if not -w.ndim <= axis < w.ndim or w.shape[axis] % m:
        raise ValueError(
          f"axis: expected one that divides into parts of m={m}, got {axis} of {name} "
          f"{list(w.shape)}"
        )
    return _full_masks(params, pattern)

  def leaf_mask(w, gradient):
    scores = jnp.moveaxis(score(w, gradient), axis, -1)
    parts = scores.reshape(*scores.shape[:-1], -1, m)
    ranks = jnp.argsort(jnp.argsort(parts, descending=True, stable=True))
    return jnp.moveaxis((ranks < n).reshape(scores.shape), -1, axis)

  def update_masks(index, masks, params, gradients):
    del index
    new = map(
      leaf_mask, select_leaves(params, pattern).values(), select_leaves(gradients, pattern).values()
    )
    return jax.tree.unflatten(jax.tree.structure(masks), list(new))

  return with_masks(
    inner,
    PolynomialSchedule(step, step),
    init_masks=init_masks,
    update_masks=update_masks,
    broadcast=_unchanged,
  )


def hold_zeros(
  inner: optax.GradientTransformation, pattern: str = KERNELS
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that weights that are zero in `init` stay exactly zero.

  It fine-tunes a student whose single weights were pruned:

      optimizer = hold_zeros(optax.adamw(1e-4), r"^student/.*kernel$")
      fit(student, teacher, objective, optimizer, source, student_variables=pruned, ...)

  Args:
    inner: the optimizer; it gets the full gradient.
    pattern: regular expression found in the paths of the leaves to hold, see `trees.path_mask`;
      biases are zero at the start without having been pruned.

  Returns:
    A transformation whose init derives the masks from its parameters; they are in its state, as
    those of `prune`.

  Raises:
    ValueError: in init, a pattern that fits nothing.
  """

  def init_masks(params):
    def leaf_mask(w, fits):
      return w != 0 if fits else optax.MaskedNode()

    return jax.tree.map(leaf_mask, params, path_mask(params, pattern))

  def update_masks(index, masks, params, gradients):
    del index, params, gradients
    return masks

  return with_masks(
    inner,
    PolynomialSchedule(0, 0),
    init_masks=init_masks,
    update_masks=update_masks,
    broadcast=_unchanged,
  )


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
  """Returns the same sparsity for every array."""
  return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
  """Returns the sparsities of Erdos-Renyi-Kernel (Evci et al. 2020, section 3).

  Densities are in proportion to the sum of a shape over its product.

  Args:
    shapes: shapes by name; the window of a kernel is included.
    sparsity: fraction of zeros in all arrays together, in [0, 1).

  Returns:
    The sparsity of each; 0 where its density would be above 1, and the others are then sparser.
  """
  sizes = {name: math.prod(shape) for name, shape in shapes.items()}
  dense: set[str] = set()
  while True:
    rest = shapes.keys() - dense
    left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
    scale = left / sum(sum(shapes[name]) for name in rest) if rest else 0.0
    densities = {name: scale * sum(shapes[name]) / sizes[name] for name in rest}
    full = {name for name in rest if densities[name] > 1}
    if not full:
      return {name: 1 - densities.get(name, 1.0) for name in shapes}
    dense |= full


def layer_sparsity(tree: Tree, pattern: str = KERNELS) -> dict[str, reduce.Pair]:
  """Returns (zeros, size) of each selected leaf; `reduce.value` of it is the sparsity.

  Raises:
    ValueError: as `trees.path_mask`.
  """
  return {name: reduce.total(leaf == 0) for name, leaf in select_leaves(tree, pattern).items()}


def sparsity(tree: Tree, pattern: str = KERNELS) -> reduce.Pair:
  """Returns (zeros, size) of the selected leaves together, as `layer_sparsity`.

  >>> import jax.numpy as jnp
  >>> from distill_jax import reduce
  >>> from distill_jax.compression.pruning import weights
  >>> reduce.value(weights.sparsity({"dense": {"kernel": jnp.array([[0.0, 1.0]])}}))
  Array(0.5, dtype=float32)
  """
  zeros, sizes = zip(*layer_sparsity(tree, pattern).values(), strict=True)
  return jnp.stack(zeros).sum(), jnp.stack(sizes).sum()


def _full_masks(params: Tree, pattern: str) -> Tree:
  """Returns masks of True in the parameters' structure, so that a mesh shards both alike."""

  def leaf_mask(w, fits):
    return jnp.ones(w.shape, bool) if fits else optax.MaskedNode()

  return jax.tree.map(leaf_mask, params, path_mask(params, pattern))


def _unchanged(masks: Tree, params: Tree) -> Tree:
  del params
  return masks
