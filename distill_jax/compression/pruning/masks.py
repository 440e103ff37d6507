"""Keeps masks in the state of an optax transformation, updates them and holds their zeros."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.types import Tree


class PruneState(NamedTuple):
  """The state of a pruning transformation: only arrays, so that a checkpoint holds all of it.

  Attributes:
    step: number of updates so far, int32.
    masks: tree of bools, False where a parameter, or a channel, is pruned.
    inner: the state of the wrapped optimizer.
  """

  step: jax.Array
  masks: Tree
  inner: Tree


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule:
  """The steps at which masks are updated, and the fraction of the target that is pruned at each.

  This is the cubic of Zhu & Gupta 2018, equation 1, from 0: at the update t = start, start + freq,
  ..., end the fraction is 1 - (1 - (t - start) / (end - start))^3. (The names are jaxpruner's,
  whose fraction at t is this one's at t + 1.) start = end prunes once.

  Attributes:
    update_start_step: number of the first of these updates, from 0.
    update_end_step: number of the last of these updates.
    update_freq: number of updates from one to the next.

  Raises:
    ValueError: negative numbers, an end before the start, or an end that no update hits.
  """

  update_start_step: int
  update_end_step: int
  update_freq: int = 1

  def __post_init__(self):
    start, end, freq = dataclasses.astuple(self)
    if not 0 <= start <= end:
      raise ValueError(
        f"update_start_step, update_end_step: expected 0 <= start <= end, got {start} and {end}"
      )
    if freq < 1:
      raise ValueError(f"update_freq: expected an integer >= 1, got {freq}")
    if (end - start) % freq:
      nearest = start + (end - start) // freq * freq
      raise ValueError(
        f"update_end_step: expected {nearest} or {nearest + freq}, which updates from {start} on "
        f"in steps of {freq} hit, got {end}"
      )

  def fractions(self) -> np.ndarray:
    """Returns the fraction of the target that is pruned at each update, float64 [updates]."""
    start, end, freq = dataclasses.astuple(self)
    if start == end:
      return np.ones(1)
    progress = np.arange(0, end - start + 1, freq) / (end - start)
    return 1 - (1 - progress) ** 3

  def remaining(self, size: int, sparsity: float) -> np.ndarray:
    """Returns how many of `size` remain at each of the updates, int32 [updates]; at least one."""
    counts = np.round(size * (1 - sparsity * self.fractions()))
    return np.maximum(1, counts).astype(np.int32)

  def at(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (whether masks are updated at this step, the index of the update), scalars."""
    start, end, freq = dataclasses.astuple(self)
    due = (step >= start) & (step <= end) & ((step - start) % freq == 0)
    return due, jnp.clip((step - start) // freq, 0, (end - start) // freq)


def with_masks(
  inner: optax.GradientTransformation,
  schedule: PolynomialSchedule,
  *,
  init_masks: Callable[[Tree], Tree],
  update_masks: Callable[[jax.Array, Tree, Tree, Tree], Tree],
  broadcast: Callable[[Tree, Tree], Tree],
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that parameters are exactly zero where a mask is False.

  Args:
    inner: the optimizer; it gets the full gradient.
    schedule: the steps at which masks are updated.
    init_masks: `params -> masks`; it raises where there cannot be any.
    update_masks: `(index of the update, masks, params, gradients) -> masks`; params and gradients
      are those before the update.
    broadcast: `(masks, params) -> a tree like params` of bools that broadcast, with
      `optax.MaskedNode()` for leaves without a mask.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return PruneState(jnp.zeros((), jnp.int32), init_masks(params), inner.init(params))

  def update(gradients, state, params=None, **extra):
    if params is None:
      raise ValueError(
        "params: expected the parameters, got None: call update(updates, state, params)"
      )
    due, index = schedule.at(state.step)
    # A sort of all parameters would cost more than the update, so it runs only where it is due.
    masks = jax.lax.cond(
      due, lambda: update_masks(index, state.masks, params, gradients), lambda: state.masks
    )
    updates, inner_state = inner.update(gradients, state.inner, params, **extra)
    updates = jax.tree.map(
      _hold_zero, broadcast(masks, params), updates, params, is_leaf=_is_masked_node
    )
    return updates, PruneState(optax.safe_increment(state.step), masks, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def keep_highest(scores: jax.Array, masks: jax.Array, count: jax.Array) -> jax.Array:
  """Returns a mask of the `count` highest scores among those whose mask is True.

  Args:
    scores: float [n]; of equal ones the first comes first.
    masks: bool [n]; pruned entries stay pruned.
    count: an integer scalar.

  Returns:
    bool [n].
  """
  order = jnp.argsort(jnp.where(masks, scores, -jnp.inf), descending=True, stable=True)
  return jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(scores.size) < count) & masks


def check_sparsity(sparsity: float) -> None:
  """Raises a ValueError unless it is in [0, 1)."""
  if not 0 <= sparsity < 1:
    raise ValueError(f"sparsity: expected a fraction in [0, 1), got {sparsity!r}")


def _is_masked_node(x: Tree) -> bool:
  return isinstance(x, optax.MaskedNode)


def _hold_zero(mask: Tree, update: jax.Array, param: jax.Array) -> jax.Array:
  """Returns the update, and -param where the mask is False: p + (-p) is 0 in floating point."""
  if _is_masked_node(mask):
    return update
  return jnp.where(mask, update, -param).astype(update.dtype)
