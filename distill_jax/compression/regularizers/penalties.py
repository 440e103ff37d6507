"""Penalties that make weights small or zero, and proximal steps that make them exactly zero.

A term of an objective sees what the networks say and not their weights, so a penalty joins the gradient instead,
which is the same for the weights; the reported loss does not contain it:

    optax.chain(add_penalty(l2, 1e-4, pattern="kernel$"), optax.sgd(rate))

A proximal step comes last, after all that changes the update (Parikh & Boyd 2014, section 4.2). Its strength is what
one step subtracts; for the penalty's weight times the learning rate write `lambda step: weight * rate(step)`:

    optax.chain(optax.sgd(rate), proximal(group_soft_threshold, 1e-5, pattern=r"conv/kernel$", axes=OUTPUTS))

Groups are given by the axes that number them, and all else of an array is one group. In kernels [*window, inputs,
outputs] those are `OUTPUTS` (channels, neurons), `INPUTS`, and in attention's kernels [inputs, heads, size] the axis 1;
no axis, `()`, makes the whole array one group: a layer. Groups of several arrays, as heads are: `group_prox`.
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

from distill_jax.trees import chosen, matching
from distill_jax.types import Tree

Strength = float | Callable[[jax.Array], Any]
Axes = tuple[int, ...]
OUTPUTS: Axes = (-1,)
INPUTS: Axes = (-2,)


class StrengthState(NamedTuple):
  """Attributes: step: updates so far, int32, the argument of the strength's schedule."""

  step: jax.Array


def l1(tree: Tree) -> jax.Array:
  """The sum of |w| over all leaves, a scalar."""
  return _sum(jnp.abs, tree)


def l2(tree: Tree) -> jax.Array:
  """Half the sum of w^2 over all leaves, a scalar; its gradient is w, as weight decay's."""
  return _sum(lambda w: 0.5 * w * w, tree)


def group_lasso(tree: Tree, *, axes: Axes = OUTPUTS) -> jax.Array:
  """The sum over groups of sqrt(size) times the group's 2-norm (Yuan & Lin 2006, equation 2.1).

  Args:
    tree: arrays; the gradient of a group that is zero is zero.
    axes: which number the groups.

  Returns:
    A scalar.

  Raises:
    ValueError: a leaf has not these axes.
  """
  return _sum(lambda w: _weight(w, axes) * _norms(w, axes), tree)


def l1_linf(tree: Tree, *, axes: Axes = OUTPUTS) -> jax.Array:
  """The sum over groups of the group's largest |w| (Turlach et al. 2005). Arguments and errors as `group_lasso`."""
  return _sum(lambda w: jnp.abs(w).max(within(w, axes)), tree)


def hoyer_square(tree: Tree, *, axes: Axes | None = None) -> jax.Array:
  """The sum over leaves of (sum of |w|)^2 / (sum of w^2) (DeepHoyer, Yang et al. 2020, section 3).

  It counts the numbers of a leaf that are not zero if they are alike, and does not depend on their scale.

  Args:
    tree: arrays; a leaf of zeros counts 0.
    axes: None: single numbers; else those that number groups, with their 2-norms in place of |w|.

  Raises:
    ValueError: a leaf has not these axes.
  """

  def one(w):
    sizes = jnp.abs(w) if axes is None else _norms(w, axes)
    squares = (w * w).sum()
    return jnp.where(squares > 0, sizes.sum() ** 2 / jnp.where(squares > 0, squares, 1), 0)

  return _sum(one, tree)


def soft_threshold(w: jax.Array, amount: jax.Array) -> jax.Array:
  """The proximal step of amount * |w|: sign(w) max(|w| - amount, 0) (Parikh & Boyd 2014, section 6.5)."""
  return jnp.sign(w) * jnp.maximum(jnp.abs(w) - amount, 0)


def group_soft_threshold(w: jax.Array, amount: jax.Array, *, axes: Axes = OUTPUTS) -> jax.Array:
  """The proximal step of amount * `group_lasso`: each group times max(1 - amount sqrt(size) / 2-norm, 0).

  Parikh & Boyd 2014, section 6.5; arguments and errors as `group_lasso`.
  """
  norms, amount = _norms(w, axes), amount * _weight(w, axes)
  return w * jnp.maximum(1 - amount / jnp.where(norms > 0, norms, 1), 0)


def linf_threshold(w: jax.Array, amount: jax.Array, *, axes: Axes = OUTPUTS) -> jax.Array:
  """The proximal step of amount * `l1_linf`: each group less its projection onto the 1-ball of radius amount.

  Parikh & Boyd 2014, section 6.5: it lowers the group's largest numbers to one level, and a group whose |w| sum up to
  no more than the amount to 0. Arguments and errors as `group_lasso`.
  """
  kept = [axis % w.ndim for axis in _checked(w, axes)]
  rows = jnp.moveaxis(w, kept, range(len(kept)))
  shape = rows.shape
  rows = rows.reshape(math.prod(shape[: len(kept)]), -1)
  radius = jnp.asarray(amount, rows.dtype)
  ball = functools.partial(
    optax.projections.projection_l1_ball, scale=jnp.where(radius > 0, radius, 1)
  )
  rows = rows - jnp.where(radius > 0, jax.vmap(ball)(rows), 0)
  return jnp.moveaxis(rows.reshape(shape), range(len(kept)), kept)


def add_penalty(
  penalty: Callable[..., jax.Array], strength: Strength, *, pattern: str = "", **options
) -> optax.GradientTransformation:
  """Adds strength times the penalty's gradient; first in a chain, that is a penalty in the loss.

  Args:
    penalty: a function of a tree, such as `l1`; it gets `{path: leaf}` of the leaves chosen.
    strength: a finite number >= 0, or a schedule of the update's number.
    pattern: which leaves, see `paths.matching`.
    **options: of the penalty.

  Raises:
    ValueError: at once, a strength that is negative or not finite; in init, a pattern that fits nothing.
  """
  check_strength(strength)

  def update(updates, state, params=None):
    params = given(params)
    own = jax.grad(lambda leaves: penalty(leaves, **options))(chosen(params, pattern))
    amount, gradients = at(strength, state.step), iter(own.values())

    def add(u, fits):
      return (u + amount * next(gradients)).astype(u.dtype) if fits else u

    return jax.tree.map(add, updates, matching(params, pattern)), following(state)

  return optax.GradientTransformation(_init(pattern), update)


def proximal(
  prox: Callable[..., jax.Array], strength: Strength, *, pattern: str = "", **options
) -> optax.GradientTransformation:
  """Last in a chain: what the update has made of the parameters goes through a proximal step.

  Numbers that the step sets to zero are zero in the parameters, exactly.

  Args:
    prox: `(array, amount) -> array`, such as `soft_threshold`.
    strength, pattern: as in `add_penalty`.
    **options: of the proximal step.

  Raises:
    ValueError: as `add_penalty`.
  """
  check_strength(strength)

  def update(updates, state, params=None):
    params, amount = given(params), at(strength, state.step)

    def step(u, p, fits):
      if not fits:
        return u
      wide = jnp.promote_types(p.dtype, jnp.float32)
      # p + (0 - p) is 0 in floating point.
      return (prox((p + u).astype(wide), amount, **options) - p).astype(u.dtype)

    return jax.tree.map(step, updates, params, matching(params, pattern)), following(state)

  return optax.GradientTransformation(_init(pattern), update)


def _sum(one, tree) -> jax.Array:
  leaves = [w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in jax.tree.leaves(tree)]
  return jnp.stack([one(w).sum() for w in leaves]).sum()


def _checked(w: jax.Array | np.ndarray, axes: Axes) -> Axes:
  if len({axis % w.ndim for axis in axes if -w.ndim <= axis < w.ndim}) < len(axes):
    raise ValueError(f"axes: expected different axes of an array {w.shape}, got {axes}")
  return axes


def within(w: jax.Array | np.ndarray, axes: Axes) -> Axes:
  """The axes inside a group. Raises a ValueError where w has not these axes."""
  return tuple(set(range(w.ndim)) - {axis % w.ndim for axis in _checked(w, axes)})


def _norms(w: jax.Array, axes: Axes) -> jax.Array:
  """2-norms of the groups, of rank w.ndim; the gradient of a norm that is 0 is 0, where a root's is NaN."""
  squares = (w * w).sum(within(w, axes), keepdims=True)
  return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _weight(w: jax.Array, axes: Axes) -> float:
  return math.sqrt(math.prod(w.shape[axis] for axis in within(w, axes)))


def check_strength(strength: Strength) -> None:
  """Raises a ValueError unless it is a schedule or a finite number >= 0."""
  if callable(strength):
    return
  if not isinstance(strength, numbers.Real) or not (math.isfinite(strength) and strength >= 0):
    raise ValueError(f"strength: expected a finite number >= 0 or a schedule, got {strength!r}")


def at(strength: Strength, step: jax.Array):
  """The strength at an update."""
  return strength(step) if callable(strength) else strength


def _init(pattern: str):
  def init(params):
    matching(params, pattern)
    return StrengthState(jnp.zeros((), jnp.int32))

  return init


def following(state: StrengthState) -> StrengthState:
  """The state of the next update."""
  return StrengthState(optax.safe_increment(state.step))


def given(params):
  """The parameters, or a ValueError: optax allows an update without them."""
  if params is None:
    raise ValueError("update needs the parameters: update(updates, state, params)")
  return params
