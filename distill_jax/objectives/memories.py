"""Terms that remember other examples or outputs: CRD's memories, SEED's queue, DINO's center.

What is remembered is the term's state: it has no gradient, comes out of each step (of each microbatch, where a batch
is accumulated), and is checkpointed. Under an axis name all devices hold the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.objectives.learned import learned
from distill_jax.objectives.parts import layer, layer_init, stack, stack_init
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def crd(
  student: str,
  teacher: str,
  examples: int,
  *,
  negatives: int = 16384,
  width: int = 128,
  temperature: float = 0.07,
  momentum: float = 0.5,
) -> Term:
  """Contrastive representation distillation: `losses.crd` between two learned linear embeddings.

  The negatives of a row are drawn with replacement from all examples but itself, by a key folded with its id, so that
  they do not depend on its place in the batch; the train step gives each device of an axis name its own key, so there
  the draws are others than in the jitted step. (The paper's code draws from the other classes' examples.) Memory: two
  of [examples, width], and 2 x rows x (negatives + 1) x width numbers while a step runs. Weight 0.8 (Tian et al. 2020,
  arXiv:1910.10699).

  Args:
    student, teacher: names of the penultimate features, [B, ...], which are flattened.
    examples: N, one more than the largest id of the training split: the batch's 'id' says which memory is a row's. An
      id outside [0, N) makes its value NaN and leaves the memory alone, so that the step is skipped and counted as
      not finite.
    negatives: K per row.
    width: of the embeddings.
    temperature, momentum: of the loss.

  Raises:
    ValueError: at once, fewer than 2 examples or no negatives; in init, a width < 1; in a step, a batch without
      'id', rows that differ, or a hyper-parameter that the loss refuses.
  """
  if examples < 2 or negatives < 1:
    raise ValueError(
      f"crd needs at least 2 examples and 1 negative, got examples={examples}, negatives={negatives}"
    )

  def init(key, s, t):
    keys = jax.random.split(key, 3)
    embeddings = {
      name: layer_init(k, _flat_width(x), width)
      for name, k, x in (("student", keys[0], s), ("teacher", keys[1], t))
    }
    return Variables(embeddings, losses.crd_state(keys[2], examples, width))

  def apply(params, state, s, t, *, where, key, axis_name, ids):
    inside = (ids >= 0) & (ids < examples)
    embedded_s, embedded_t = (
      layer(params[name], x.reshape(len(x), -1)) for name, x in (("student", s), ("teacher", t))
    )
    others = jax.vmap(lambda i: _others(jax.random.fold_in(key, i), i, negatives, examples))(ids)
    values, state = losses.crd(
      embedded_s,
      embedded_t,
      jnp.where(inside, ids, 0),
      others,
      state,
      temperature=temperature,
      momentum=momentum,
      where=inside if where is None else inside & where,
      axis_name=axis_name,
    )
    return jnp.where(inside, values, jnp.nan), state

  return learned(student, teacher, init, apply, entries={"ids": "id"})


def queue_similarity(
  student: str,
  teacher: str,
  *,
  size: int = 65536,
  student_temperature: float = 0.2,
  teacher_temperature: float = 0.01,
) -> Term:
  """SEED: `losses.queue_similarity` against a queue of the teacher's embeddings of earlier batches.

  The student goes through a learned head of two linear layers with a ReLU between, the first as wide as the student
  (MoCo v2's). After each step the valid rows of the teacher replace the oldest of the queue; it starts with random
  directions. Weight 1, alone (Fang et al. 2021, arXiv:2101.04731).

  Args:
    student: name of features [B, C].
    teacher: name of embeddings [B, D].
    size: rows of the queue.
    student_temperature, teacher_temperature: of the loss.

  Raises:
    ValueError: at once, size < 1; in init, what are not [B, C] and [B, D], or a temperature <= 0.
  """
  if size < 1:
    raise ValueError(f"size: expected at least 1, got {size}")

  def init(key, s, t):
    if len(s.shape) != 2 or len(t.shape) != 2:
      raise ValueError("expected rows of embeddings, [B, C] and [B, D]")
    head, start = jax.random.split(key)
    state = {
      "queue": jax.random.normal(start, (size, t.shape[1])),
      "next": jnp.zeros((), jnp.int32),
    }
    return Variables(stack_init(head, (s.shape[1], s.shape[1], t.shape[1])), state)

  def apply(params, state, s, t, *, where, axis_name):
    values = losses.queue_similarity(
      stack(params, s),
      t,
      state["queue"],
      student_temperature=student_temperature,
      teacher_temperature=teacher_temperature,
    )
    return values, _push(state, t, where, axis_name)

  return learned(student, teacher, init, apply)


def dino(
  student: str,
  teacher: str,
  *,
  student_temperature: float = 0.1,
  teacher_temperature: float | Callable[[jax.Array], jax.Array] = 0.04,
  momentum: float = 0.9,
) -> Term:
  """`losses.dino` with its center; for a teacher that follows the student (`teachers.moving_average`).

  Weight 1, alone (Caron et al. 2021, arXiv:2104.14294).

  Args:
    student: name of an output [B, V, K], the head's output for each of V views of an example.
    teacher: name of an output [B, U, K], U <= V; its view i is the student's.
    student_temperature: > 0.
    teacher_temperature: > 0, or a schedule of the step: the paper's is
      `optax.linear_schedule(0.04, 0.07, 30 * steps_per_epoch)`.
    momentum: of the center, in [0, 1).

  Raises:
    ValueError: in init, shapes that do not fit, or a hyper-parameter that the loss refuses.
  """

  def init(key, s, t):
    del key, s
    return Variables({}, {"center": jnp.zeros(t.shape[-1])})

  def apply(params, state, s, t, *, where, step, axis_name):
    if s.ndim != 3 or t.ndim != 3:
      raise ValueError("expected outputs of views, [B, V, K] and [B, U, K]")
    warm = teacher_temperature(step) if callable(teacher_temperature) else teacher_temperature
    values, center = losses.dino(
      s.swapaxes(0, 1),
      t.swapaxes(0, 1),
      state["center"],
      student_temperature=student_temperature,
      teacher_temperature=warm,
      momentum=momentum,
      where=where,
      axis_name=axis_name,
    )
    return values, {"center": center.astype(state["center"].dtype)}

  return learned(student, teacher, init, apply)


def _flat_width(x):
  width = 1
  for size in x.shape[1:]:
    width *= size
  return width


def _others(key, own, count, examples):
  """`count` indices in [0, examples), none of them `own`."""
  drawn = jax.random.randint(key, (count,), 0, examples - 1)
  return drawn + (drawn >= own)


def _push(state, rows, where, axis_name):
  """The queue with the valid rows of all devices in place of its oldest ones."""
  queue, first = state["queue"], state["next"]
  rows = jax.lax.stop_gradient(rows).astype(queue.dtype)
  where = jnp.ones(len(rows), bool) if where is None else where
  if axis_name is not None:
    rows, where = (
      jax.lax.all_gather(x, axis_name, tiled=True, to="invarying") for x in (rows, where)
    )
  order = jnp.cumsum(where) - 1
  count = where.sum()
  # Of more rows than the queue holds, the last: written twice, a place would hold either (on a GPU).
  kept = where & (order >= count - len(queue))
  place = jnp.where(kept, (first + order) % len(queue), len(queue))
  queue = queue.at[place].set(rows, mode="drop")
  return {"queue": queue, "next": ((first + count) % len(queue)).astype(first.dtype)}
