"""Adds penalties that make weights small, and proximal steps that make them exactly zero.

A term of an objective reads the outputs of networks and not their weights, so a penalty is added to
the gradient, which is the same for the weights; the reported loss does not contain it:

    optax.chain(add_penalty(l2, 1e-4, pattern="kernel$"), optax.sgd(rate))

A proximal step comes last, after all other changes of the update (Parikh & Boyd 2014, section 4.2).
Its strength is the amount that one step subtracts; for a penalty's weight times the learning rate
write `lambda step: weight * rate(step)`:

    shrink = proximal(group_soft_threshold, 1e-5, pattern=r"conv/kernel$", axes=OUTPUTS)
    optax.chain(optax.sgd(rate), shrink)

The axes of a penalty number its groups, and a group spans all other axes. In kernels [*window,
inputs, outputs] those are `OUTPUTS` (channels, neurons) and `INPUTS`, in attention's kernels
[inputs, heads, size] the axis 1; no axis, `()`, makes the full array one group: a layer. For groups
of several arrays, such as heads, see `regularizers.groups`.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import reduce
from distill_jax.trees import path_mask, select_leaves
from distill_jax.types import Tree

Strength = float | Callable[[jax.Array], Any]
Axes = tuple[int, ...]
OUTPUTS: Axes = (-1,)
INPUTS: Axes = (-2,)


class StrengthState(NamedTuple):
  """The state of a penalty or proximal step.

  Attributes:
    step: number of updates so far, int32, the argument of the strength's schedule.
  """

  step: jax.Array


def l1(tree: Tree) -> jax.Array:
  """Returns the sum of |w| over all leaves, a scalar."""
  return _sum(jnp.abs, tree)


def l2(tree: Tree) -> jax.Array:
  """Returns half the sum of w^2 over all leaves, a scalar; its gradient is weight decay's, w."""
  return _sum(lambda w: 0.5 * w * w, tree)


def group_lasso(tree: Tree, *, axes: Axes = OUTPUTS) -> jax.Array:
  """Returns the sum over groups of sqrt(size) * 2-norm (Yuan & Lin 2006, equation 2.1).

  Args:
    tree: tree of arrays; the gradient of a group of zeros is zero.
    axes: axes that number the groups.

  Returns:
    A scalar.

  Raises:
    ValueError: a leaf lacks these axes.
  """
  return _sum(lambda w: _weight(w, axes) * _norms(w, axes), tree)


def l1_linf(tree: Tree, *, axes: Axes = OUTPUTS) -> jax.Array:
  """Returns the sum over groups of the group's largest |w| (Turlach et al. 2005).

  Arguments and errors are those of `group_lasso`.
  """
  return _sum(lambda w: jnp.abs(w).max(inner_axes(w, axes)), tree)


def hoyer_square(tree: Tree, *, axes: Axes | None = None) -> jax.Array:
  """Returns the sum over leaves of (sum of |w|)^2 / (sum of w^2) (DeepHoyer, Yang et al. 2020).

  It is the number of nonzero values of a leaf where these are equal, and independent of their
  scale.

  Args:
    tree: tree of arrays; a leaf of zeros adds 0.
    axes: axes that number groups, whose 2-norms replace |w|; None: each value is a group.

  Raises:
    ValueError: a leaf lacks these axes.
  """

  def leaf_penalty(w):
    norms = jnp.abs(w) if axes is None else _norms(w, axes)
    squares = (w * w).sum()
    return jnp.where(squares > 0, norms.sum() ** 2 / jnp.where(squares > 0, squares, 1), 0)

  return _sum(leaf_penalty, tree)


def soft_threshold(w: jax.Array, amount: jax.Array) -> jax.Array:
  """Returns the proximal step of amount * |w|: sign(w) max(|w| - amount, 0).

  Parikh & Boyd 2014, section 6.5.
  """
  return jnp.sign(w) * jnp.maximum(jnp.abs(w) - amount, 0)


def group_soft_threshold(w: jax.Array, amount: jax.Array, *, axes: Axes = OUTPUTS) -> jax.Array:
  """Returns the proximal step of amount * `group_lasso`: w max(1 - amount sqrt(size) / 2-norm, 0).

  Parikh & Boyd 2014, section 6.5; axes and errors as of `group_lasso`.
  """
  norms = _norms(w, axes)
  amount = amount * _weight(w, axes)
  return w * jnp.maximum(1 - amount / jnp.where(norms > 0, norms, 1), 0)


def linf_threshold(w: jax.Array, amount: jax.Array, *, axes: Axes = OUTPUTS) -> jax.Array:
  """Returns the proximal step of amount * `l1_linf`: each group less its projection on the 1-ball.

  The ball has radius amount (Parikh & Boyd 2014, section 6.5). The step lowers the group's largest
  values to one level, and a group whose |w| sum up to no more than the amount to 0. Axes and errors
  are those of `group_lasso`.
  """
  group_axes = [axis % w.ndim for axis in _check_axes(w, axes)]
  rows = jnp.moveaxis(w, group_axes, range(len(group_axes)))
  shape = rows.shape
  rows = rows.reshape(math.prod(shape[: len(group_axes)]), -1)
  radius = jnp.asarray(amount, rows.dtype)
  ball = functools.partial(
    optax.projections.projection_l1_ball, scale=jnp.where(radius > 0, radius, 1)
  )
  rows = rows - jnp.where(radius > 0, jax.vmap(ball)(rows), 0)
  return jnp.moveaxis(rows.reshape(shape), range(len(group_axes)), group_axes)


def add_penalty(
  penalty: Callable[..., jax.Array], strength: Strength, *, pattern: str = "", **options
) -> optax.GradientTransformation:
  """Adds strength times the penalty's gradient; first in a chain, it is a penalty in the loss.

  Args:
    penalty: a function of a tree, such as `l1`; it gets `{path: leaf}` of the selected leaves.
    strength: a finite number >= 0, or a schedule of the update's number.
    pattern: regular expression found in the paths of the leaves, see `trees.path_mask`.
    **options: further arguments of the penalty.

  Raises:
    ValueError: at once, a strength that is negative or not finite; in init, a pattern that fits
      nothing.
  """
  check_strength(strength)

  def update(updates, state, params=None):
    params = require_params(params)
    penalty_gradients = jax.grad(lambda leaves: penalty(leaves, **options))(
      select_leaves(params, pattern)
    )
    gradients = iter(penalty_gradients.values())
    amount = strength_at(strength, state.step)

    def add(u, fits):
      return (u + amount * next(gradients)).astype(u.dtype) if fits else u

    return jax.tree.map(add, updates, path_mask(params, pattern)), next_state(state)

  return optax.GradientTransformation(_init(pattern), update)


def proximal(
  prox: Callable[..., jax.Array], strength: Strength, *, pattern: str = "", **options
) -> optax.GradientTransformation:
  """Applies a proximal step to the updated parameters; the last step of a chain.

  Values that the step sets to zero are exactly zero in the parameters.

  Args:
    prox: `(array, amount) -> array`, such as `soft_threshold`.
    strength: as in `add_penalty`.
    pattern: as in `add_penalty`.
    **options: further arguments of the proximal step.

  Raises:
    ValueError: as `add_penalty`.
  """
  check_strength(strength)

  def update(updates, state, params=None):
    params = require_params(params)
    amount = strength_at(strength, state.step)

    def step(u, p, fits):
      if not fits:
        return u
      wide = reduce.common_dtype(p.dtype, jnp.float32)
      # p + (0 - p) is 0 in floating point.
      return (prox((p + u).astype(wide), amount, **options) - p).astype(u.dtype)

    return jax.tree.map(step, updates, params, path_mask(params, pattern)), next_state(state)

  return optax.GradientTransformation(_init(pattern), update)


def _sum(leaf_penalty: Callable[[jax.Array], jax.Array], tree: Tree) -> jax.Array:
  """Returns the sum of a penalty over all leaves, in float32 or wider."""
  leaves = [w.astype(reduce.common_dtype(w.dtype, jnp.float32)) for w in jax.tree.leaves(tree)]
  return jnp.stack([leaf_penalty(w).sum() for w in leaves]).sum()


def _check_axes(w: jax.Array | np.ndarray, axes: Axes) -> Axes:
  if len({axis % w.ndim for axis in axes if -w.ndim <= axis < w.ndim}) < len(axes):
    raise ValueError(f"axes: expected different axes of an array {list(w.shape)}, got {axes}")
  return axes


def inner_axes(w: jax.Array | np.ndarray, axes: Axes) -> Axes:
  """Returns the axes that a group spans. Raises a ValueError where w lacks the axes of groups."""
  return tuple(set(range(w.ndim)) - {axis % w.ndim for axis in _check_axes(w, axes)})


def _norms(w: jax.Array, axes: Axes) -> jax.Array:
  """Returns the groups' 2-norms, of rank w.ndim; the gradient of a zero norm is 0, not NaN."""
  squares = (w * w).sum(inner_axes(w, axes), keepdims=True)
  return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _weight(w: jax.Array, axes: Axes) -> float:
  return math.sqrt(math.prod(w.shape[axis] for axis in inner_axes(w, axes)))


def check_strength(strength: Strength) -> None:
  """Raises a ValueError unless it is a schedule or a finite number >= 0."""
  if callable(strength):
    return
  if not isinstance(strength, numbers.Real) or not (math.isfinite(strength) and strength >= 0):
    raise ValueError(f"strength: expected a finite number >= 0 or a schedule, got {strength!r}")


def strength_at(strength: Strength, step: jax.Array) -> Any:
  """Returns the strength at an update."""
  return strength(step) if callable(strength) else strength


def _init(pattern: str) -> Callable[[Tree], StrengthState]:
  def init(params):
    path_mask(params, pattern)
    return StrengthState(jnp.zeros((), jnp.int32))

  return init


def next_state(state: StrengthState) -> StrengthState:
  """Returns the state of the next update."""
  return StrengthState(optax.safe_increment(state.step))


def require_params(params: Tree | None) -> Tree:
  """Returns the parameters, or raises a ValueError: optax allows an update without them."""
  if params is None:
    raise ValueError(
      "params: expected the parameters, got None: call update(updates, state, params)"
    )
  return params
