"""Replays rows that the student generated before: generation is most of an on-policy step's
time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.types import Batch, OnPolicy, Tree, Variables


class Replay(NamedTuple):
  """An `on_policy` with a buffer; `with_replay` makes one.

  Attributes:
    init: `batch -> buffer`: arrays, which the train state holds in `model_state["replay"]`.
    apply: `(student Variables, buffer, step, key, batch) -> (batch, buffer)`.
  """

  init: Callable[[Batch], Tree]
  apply: Callable[..., tuple[Batch, Tree]]


def with_replay(on_policy: OnPolicy, *, every: int, buffer_size: int) -> Replay:
  """Generates rows in every `every`-th step; in between, rows of earlier steps replace the batch's.

  A row returns whole, with its id, and as many rows return as were generated last. Which rows are
  replaced, and by which ones of the buffer (uniformly, with replacement), follows from key and id.
  The teacher scores a replayed row again. Source: the replay buffer of DistiLLM, Ko et al. 2024,
  section 3.2, where the probability of new rows follows the validation loss; here `every` is fixed.

  Args:
    on_policy: `(student Variables, key, batch) -> batch` with the bool entry 'generated' [B], such
      as `models.llm.on_policy.generate_on_policy`'s.
    every: steps from one generation to the next, at least 2.
    buffer_size: number of rows in the buffer, at least those of a batch; new rows replace the
      oldest.

  Returns:
    A `Replay`, for `make_init` and `StepOptions`.

  Raises:
    ValueError: `every` is less than 2; in init, `buffer_size` is less than a batch's rows.

  >>> from distill_jax import train
  >>> generate = lambda student, key, batch: batch | {"generated": jnp.ones(4, bool)}
  >>> replay = train.with_replay(generate, every=4, buffer_size=64)
  >>> batch = {"id": np.arange(4), "tokens": np.zeros((4, 16), np.int32)}
  >>> jax.eval_shape(replay.init, batch)["rows"]["tokens"].shape
  (64, 16)
  """
  if every < 2:
    raise ValueError(
      f"every: expected at least 2 steps, got {every}: without replay, pass on_policy as it is"
    )

  def init(batch: Batch) -> Tree:
    rows = len(batch["id"])
    if buffer_size < rows:
      raise ValueError(
        f"buffer_size: expected at least the {rows} rows of a batch, got {buffer_size}: raise it"
      )
    shapes = {name: (buffer_size, *x.shape[1:]) for name, x in batch.items()}
    dtypes = {name: jax.dtypes.canonicalize_dtype(x.dtype) for name, x in batch.items()}
    zero = jnp.zeros((), jnp.int32)
    return {
      "rows": {name: jnp.zeros(shapes[name], dtypes[name]) for name in batch},
      "next": zero,
      "filled": zero + 0,
      "last": zero + 0,
    }

  def apply(student: Variables, buffer: Tree, step, key, batch: Batch) -> tuple[Batch, Tree]:
    def generate():
      generated = on_policy(student, key, batch)
      return generated, _append(buffer, generated, buffer_size)

    # A skipped update forgets the rows it generated, so the buffer may still be empty.
    is_due = (step % every == 0) | (buffer["filled"] == 0)
    return jax.lax.cond(is_due, generate, lambda: (_replay(buffer, key, batch), buffer))

  return Replay(init, apply)


def _append(buffer: Tree, batch: Batch, buffer_size: int) -> dict[str, Any]:
  """Returns the buffer with the batch's generated rows in place of the oldest."""
  generated = batch["generated"] & batch.get("where", True)
  count = generated.sum(dtype=jnp.int32)
  order = generated.cumsum(dtype=jnp.int32) - 1
  # An index behind the end drops the row.
  index = jnp.where(generated, (buffer["next"] + order) % buffer_size, buffer_size)
  rows = {name: x.at[index].set(batch[name], mode="drop") for name, x in buffer["rows"].items()}
  return {
    "rows": rows,
    "next": (buffer["next"] + count) % buffer_size,
    "filled": jnp.minimum(buffer["filled"] + count, buffer_size),
    "last": count,
  }


def _replay(buffer: Tree, key: jax.Array, batch: Batch) -> Batch:
  """Returns the batch with as many rows of the buffer as were generated last."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["id"])
  order_keys, index_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(2))
  ranks = jax.vmap(jax.random.uniform)(order_keys).argsort().argsort().astype(jnp.int32)
  replaced = ranks < buffer["last"]
  index = jax.vmap(lambda k: jax.random.randint(k, (), 0, buffer["filled"], jnp.int32))(index_keys)

  def replace(name: str, values: jax.Array) -> jax.Array:
    rows = buffer["rows"].get(name)
    if rows is None:
      return values
    mask = replaced.reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(mask, rows[index], values)

  return {**{name: replace(name, x) for name, x in batch.items()}, "generated": replaced}
