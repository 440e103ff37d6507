"""Masks in the state of an optax transformation: when they are made anew, and that they hold."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.types import Tree


class PruneState(NamedTuple):
  """The state of a pruning transformation: arrays alone, so that a checkpoint holds all of it.

  Attributes:
    step: updates so far, int32.
    masks: bool, True where a parameter, or a channel, is kept.
    inner: the state of the optimizer that is wrapped.
  """

  step: jax.Array
  masks: Tree
  inner: Tree


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule:
  """When masks are made anew, and how much is pruned then: the cubic of Zhu & Gupta 2018, equation 1, from 0.

  At the update t = start, start + freq, ..., end a share 1 - (1 - (t - start) / (end - start))^3 of the target is
  pruned. (The names are jaxpruner's, whose share at t is this one's at t + 1.) start = end prunes once.

  Attributes:
    update_start_step, update_end_step: numbers of the first and the last of these updates, from 0.
    update_freq: updates between them.

  Raises:
    ValueError: numbers that are negative or the wrong way round, or an end that no update hits.
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
        f"update_end_step {end}: no update hits it from {start} on in steps of {freq}; nearest: {nearest} or "
        f"{nearest + freq}"
      )

  def shares(self) -> np.ndarray:
    """The share of the target that is pruned at each of the updates, float64 [updates]."""
    start, end, freq = dataclasses.astuple(self)
    progress = (
      np.arange(0, end - start + 1, freq) / max(1, end - start) if end > start else np.ones(1)
    )
    return 1 - (1 - progress) ** 3

  def kept(self, size: int, sparsity: float) -> np.ndarray:
    """How many of `size` are kept at each of the updates, int32 [updates]; always at least one."""
    return np.maximum(1, np.round(size * (1 - sparsity * self.shares()))).astype(np.int32)

  def at(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether masks are made at this update, which one of the updates it is), scalars."""
    start, end, freq = dataclasses.astuple(self)
    due = (step >= start) & (step <= end) & ((step - start) % freq == 0)
    return due, jnp.clip((step - start) // freq, 0, (end - start) // freq)


def masked(
  inner: optax.GradientTransformation,
  schedule: PolynomialSchedule,
  *,
  start: Callable[[Tree], Tree],
  remake: Callable[[jax.Array, Tree, Tree, Tree], Tree],
  spread: Callable[[Tree, Tree], Tree],
) -> optax.GradientTransformationExtraArgs:
  """An optimizer after whose updates the parameters are zero, exactly, where a mask is False.

  Args:
    inner: the optimizer; it gets the whole gradient.
    schedule: when the masks are made anew.
    start: `params -> masks`; it raises where they cannot be.
    remake: `(which update, masks, params, gradients) -> masks`; params and gradients from before the update.
    spread: `(masks, params) -> a tree like params` of bools that broadcast, and `optax.MaskedNode()` for leaves
      without a mask.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return PruneState(jnp.zeros((), jnp.int32), start(params), inner.init(params))

  def update(gradients, state, params=None, **extra):
    if params is None:
      raise ValueError("update needs the parameters: update(updates, state, params)")
    due, which = schedule.at(state.step)
    # A sort of every parameter would cost more than the update: only where it is due.
    masks = jax.lax.cond(
      due, lambda: remake(which, state.masks, params, gradients), lambda: state.masks
    )
    updates, inner_state = inner.update(gradients, state.inner, params, **extra)

    def hold(mask, u, p):
      # p + (-p) is 0 in floating point.
      return u if isinstance(mask, optax.MaskedNode) else jnp.where(mask, u, -p).astype(u.dtype)

    keep = spread(masks, params)
    updates = jax.tree.map(
      hold, keep, updates, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    return updates, PruneState(optax.safe_increment(state.step), masks, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def keep_highest(scores: jax.Array, masks: jax.Array, kept: jax.Array) -> jax.Array:
  """The `kept` highest scores of those whose mask is True: what is pruned stays so.

  Args:
    scores: float [n]; of equal ones the first is kept.
    masks: bool [n].
    kept: an integer scalar.

  Returns:
    bool [n].
  """
  order = jnp.argsort(jnp.where(masks, scores, -jnp.inf), descending=True, stable=True)
  return jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(scores.size) < kept) & masks


def check_sparsity(sparsity: float) -> None:
  """Raises a ValueError unless it is in [0, 1)."""
  if not 0 <= sparsity < 1:
    raise ValueError(f"sparsity: expected a share in [0, 1), got {sparsity!r}")
