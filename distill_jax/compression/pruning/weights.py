"""Pruning of single weights while training: optax transformations around an optimizer, with masks in their state.

    prune(optax.adamw(1e-3), PolynomialSchedule(1000, 8000, 100), sparsity=0.9, pattern=r"^student/.*kernel$")

The names are jaxpruner's (Lee et al. 2023), and so is what they mean: a mask is made of the parameters and gradients
before an update and holds after it. Other than there, no parameter that was pruned comes back. An update that
is skipped (it was not finite) does not count as a step.
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
  masked,
)
from distill_jax.errors import suggest
from distill_jax.trees import chosen, matching
from distill_jax.types import Tree

Score = Callable[[jax.Array, jax.Array], jax.Array]
Shapes = Mapping[str, tuple[int, ...]]
KERNELS = r"(^|/)kernel$"
DISTRIBUTIONS = ("uniform", "erk", "global")


def magnitude(w: jax.Array, gradient: jax.Array) -> jax.Array:
  """|w|: what is pruned is small."""
  del gradient
  return jnp.abs(w)


def saliency(w: jax.Array, gradient: jax.Array) -> jax.Array:
  """|w g|: what is pruned changes the loss least, to first order (Molchanov et al. 2019, section 3.1)."""
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
  """Unstructured pruning: ever more of the parameters with the lowest scores are zero.

  Args:
    inner: the optimizer.
    schedule: when, and how much at each time.
    sparsity: the share in [0, 1) of the chosen parameters that are zero in the end; of each array round(size * (1 -
      sparsity)) are kept, and at least one.
    pattern: which leaves, see `paths.matching`.
    distribution: 'uniform', the same share of each array; 'erk', see `erk`; 'global', the lowest scores of all.
    score: `(array, its gradient) -> scores`; the highest are kept.

  Raises:
    ValueError: at once, a sparsity or distribution that there is not; in init, a pattern that fits nothing.
  """
  check_sparsity(sparsity)
  if distribution not in DISTRIBUTIONS:
    raise ValueError(
      f"distribution: expected one of {DISTRIBUTIONS}, got {distribution!r}{suggest(distribution, DISTRIBUTIONS)}"
    )

  def remake(which, masks, params, gradients):
    own, flat = chosen(params, pattern), [mask.ravel() for mask in jax.tree.leaves(masks)]
    scores = [
      score(w, g).ravel().astype(jnp.float32)
      for w, g in zip(own.values(), chosen(gradients, pattern).values(), strict=True)
    ]
    sizes = [w.size for w in own.values()]
    if distribution == "global":
      kept = jnp.asarray(schedule.kept(sum(sizes), sparsity))[which]
      whole = keep_highest(jnp.concatenate(scores), jnp.concatenate(flat), kept)
      new = list(jnp.split(whole, np.cumsum(sizes)[:-1].tolist()))
    else:
      shares = (erk if distribution == "erk" else uniform)(
        {n: w.shape for n, w in own.items()}, sparsity
      )
      counts = [jnp.asarray(schedule.kept(w.size, shares[name]))[which] for name, w in own.items()]
      new = list(map(keep_highest, scores, flat, counts))
    new = [mask.reshape(w.shape) for mask, w in zip(new, own.values(), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(masks), new)

  return masked(
    inner,
    schedule,
    start=functools.partial(_open, pattern=pattern),
    remake=remake,
    spread=_as_they_are,
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
  """N:M pruning: of every m neighbors along an axis the n with the highest scores are kept, from one step on.

  Args:
    inner: the optimizer.
    step: number of the update, from 0, at which the masks are made.
    n, m: 1 <= n <= m; 2:4 is what NVIDIA's sparse tensor cores compute with (Mishra et al. 2021).
    axis: the one that a product sums over: the inputs of kernels [*window, inputs, outputs].
    pattern, score: as in `prune`.

  Raises:
    ValueError: at once, n or m that cannot be; in init, an array whose axis does not divide into parts of m, or a
      pattern that fits nothing.
  """
  if not 1 <= n <= m:
    raise ValueError(f"n, m: expected 1 <= n <= m, got {n} and {m}")

  def start(params):
    for name, w in chosen(params, pattern).items():
      if not -w.ndim <= axis < w.ndim or w.shape[axis] % m:
        raise ValueError(f"{name} {list(w.shape)}: axis {axis} does not divide into parts of m={m}")
    return _open(params, pattern)

  def one(w, gradient):
    scores = jnp.moveaxis(score(w, gradient), axis, -1)
    parts = scores.reshape(*scores.shape[:-1], -1, m)
    ranks = jnp.argsort(jnp.argsort(parts, descending=True, stable=True))
    return jnp.moveaxis((ranks < n).reshape(scores.shape), -1, axis)

  def remake(which, masks, params, gradients):
    del which
    new = map(one, chosen(params, pattern).values(), chosen(gradients, pattern).values())
    return jax.tree.unflatten(jax.tree.structure(masks), list(new))

  return masked(
    inner, PolynomialSchedule(step, step), start=start, remake=remake, spread=_as_they_are
  )


def hold_zeros(
  inner: optax.GradientTransformation, pattern: str = KERNELS
) -> optax.GradientTransformationExtraArgs:
  """Weights that are zero at the start stay zero, exactly: to fine-tune a student whose single weights were pruned.

      student = student._replace(init=lambda key, batch: pruned)      # the pruned Variables
      fit(student, teacher, objective, hold_zeros(optax.adamw(1e-4), r"^student/.*kernel$"), source, ...)

  Args:
    inner: the optimizer; it gets the whole gradient.
    pattern: which leaves, see `paths.matching`; biases begin at zero without having been pruned.

  Returns:
    A transformation whose init makes the masks of the parameters it gets; they are in its state, as `prune`'s are.

  Raises:
    ValueError: in init, a pattern that fits nothing.
  """

  def start(params):
    def one(w, fits):
      return w != 0 if fits else optax.MaskedNode()

    return jax.tree.map(one, params, matching(params, pattern))

  def same(which, masks, params, gradients):
    del which, params, gradients
    return masks

  return masked(inner, PolynomialSchedule(0, 0), start=start, remake=same, spread=_as_they_are)


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
  """The same sparsity for every array."""
  return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
  """Erdos-Renyi-Kernel (Evci et al. 2020, section 3): densities in proportion to the sum of a shape over its product.

  Args:
    shapes: by name; the window of a kernel counts in both.
    sparsity: of all of them together, in [0, 1).

  Returns:
    The sparsity of each; 0 where its density would be above 1, and the others are then the sparser.
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
  """(zeros, numbers) of each chosen leaf; `reduce.value` makes the sparsity of it. Raises as `paths.matching`."""
  return {name: reduce.total(leaf == 0) for name, leaf in chosen(tree, pattern).items()}


def sparsity(tree: Tree, pattern: str = KERNELS) -> reduce.Pair:
  """(zeros, numbers) of the chosen leaves together, as `layer_sparsity`."""
  zeros, numbers = zip(*layer_sparsity(tree, pattern).values(), strict=True)
  return jnp.stack(zeros).sum(), jnp.stack(numbers).sum()


def _open(params: Tree, pattern: str) -> Tree:
  """Masks of the parameters' structure, so that they are placed on a mesh as the parameters are."""

  def one(w, fits):
    return jnp.ones(w.shape, bool) if fits else optax.MaskedNode()

  return jax.tree.map(one, params, matching(params, pattern))


def _as_they_are(masks: Tree, params: Tree) -> Tree:
  del params
  return masks
