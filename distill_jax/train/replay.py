"""Earlier samples of the student, used again: sampling is most of an on-policy step's time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.types import Batch, OnPolicy, Tree, Variables


class Replay(NamedTuple):
  """An `on_policy` that remembers; `replayed` makes one.

  Attributes:
    init: `batch -> buffer`, what is remembered: arrays, kept in the train state's
      `model_state["replay"]`.
    apply: `(student Variables, buffer, step, key, batch) -> (batch, buffer)`.
  """

  init: Callable[[Batch], Tree]
  apply: Callable[..., tuple[Batch, Tree]]


def replayed(on_policy: OnPolicy, *, every: int, kept: int) -> Replay:
  """RandomSampling in every so many-th step only; in the steps between, rows are replaced by
  samples of earlier steps.

  A row comes back whole, with the id that it had, and by the same share as was sampled last. Which
  rows give way, and to which samples (evenly, with replacement), is drawn by key and id. The
  teacher judges a sample each time anew.
  Source: the replay buffer of DistiLLM, Ko et al. 2024, section 3.2, where the odds of new samples
    follow the
  validation loss; here `every` is fixed.

  Args:
    on_policy: `(student Variables, key, batch) -> batch` with the bool entry 'generated' [B], such
      as `models.on_policy.generate_on_policy`'s.
    every: steps from one sampling to the next, at least 2.
    kept: samples that are remembered, at least the rows of a batch; the oldest give way to new
      ones.

  Returns:
    A `Replay`, for `make_init` and `make_train_step`, or `fit`.

  Raises:
    ValueError: every < 2; in init, fewer samples kept than a batch has rows.
  """
  if every < 2:
    raise ValueError(
      f"every: expected at least 2 steps, got {every}: without replay, pass on_policy as it is"
    )

  def init(batch: Batch) -> Tree:
    rows = len(batch["id"])
    if kept < rows:
      raise ValueError(
        f"kept: {kept} samples are fewer than the {rows} rows of a batch; at least {rows}"
      )
    shapes = {name: (kept, *x.shape[1:]) for name, x in batch.items()}
    types = {name: jax.dtypes.canonicalize_dtype(x.dtype) for name, x in batch.items()}
    zero = jnp.zeros((), jnp.int32)
    return {
      "rows": {name: jnp.zeros(shapes[name], types[name]) for name in batch},
      "next": zero,
      "filled": zero + 0,
      "last": zero + 0,
    }

  def apply(student: Variables, buffer, step, key, batch: Batch):
    def sample():
      new = on_policy(student, key, batch)
      return new, _remembered(buffer, new, kept)

    # A skipped update forgets what it sampled, so that the first samples may be missing.
    fresh = (step % every == 0) | (buffer["filled"] == 0)
    return jax.lax.cond(fresh, sample, lambda: (_reused(buffer, key, batch), buffer))

  return Replay(init, apply)


def _remembered(buffer, new: Batch, kept: int) -> dict[str, Any]:
  """The buffer with the batch's sampled rows in the places of the oldest."""
  counts = new["generated"] & new.get("where", True)
  number = counts.sum(dtype=jnp.int32)
  places = jnp.where(
    counts, (buffer["next"] + counts.cumsum() - 1) % kept, kept
  )  # behind the end: dropped
  return {
    "rows": {name: x.at[places].set(new[name], mode="drop") for name, x in buffer["rows"].items()},
    "next": (buffer["next"] + number) % kept,
    "filled": jnp.minimum(buffer["filled"] + number, kept),
    "last": number,
  }


def _reused(buffer, key, batch: Batch) -> Batch:
  """The batch with as many remembered rows as were sampled last."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["id"])
  order, places = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(2))
  taken = jax.vmap(jax.random.uniform)(order).argsort().argsort() < buffer["last"]
  places = jax.vmap(lambda k: jax.random.randint(k, (), 0, buffer["filled"]))(places)

  def put(name, new):
    rows = buffer["rows"].get(name)
    return (
      new
      if rows is None
      else jnp.where(taken.reshape(-1, *(1,) * (rows.ndim - 1)), rows[places], new)
    )

  return {**{name: put(name, x) for name, x in batch.items()}, "generated": taken}
