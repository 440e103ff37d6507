"""Terms with a memory of other examples or outputs: CRD's memories, SEED's queue, DINO's center.

The memory is the term's state: it has no gradient, every step returns it (every microbatch, where
a batch is accumulated), and it is checkpointed. Under an axis name it is equal on all devices.
"""

import functools
import math

import jax
import jax.numpy as jnp

from distill_jax import compat, losses
from distill_jax.errors import check_integer
from distill_jax.losses._rows import push
from distill_jax.objectives.hyperparameters import (
  Number,
  at_step,
  check_number,
)
from distill_jax.objectives.learned import learned
from distill_jax.objectives.parts import layer, layer_init, stack, stack_init
from distill_jax.objectives.terms import Term
from distill_jax.types import Tree, Variables


def crd(
  student: str,
  teacher: str,
  examples: int,
  *,
  negatives: int = 16384,
  width: int = 128,
  temperature: Number = 0.07,
  momentum: Number = 0.5,
) -> Term:
  """Contrastive representation distillation: `losses.crd` between learned linear embeddings.

  The negatives of a row are sampled with replacement from all examples but itself, by the step's
  key folded with its id: they do not depend on its position in the batch, nor on the devices.
  (The paper's code samples from the other classes' examples.) Memory: two arrays
  [examples, width], and 2 x rows x (negatives + 1) x width values while a step runs. Weight 0.8
  (Tian et al. 2020, arXiv:1910.10699).

  Args:
    student, teacher: names of the penultimate features, [B, ...], which are flattened.
    examples: number N of examples, one more than the largest id of the training split: the batch's
      'id' is the index of a row's memory. An id outside [0, N) makes its value NaN and leaves the
      memory unchanged, so that the step is skipped and counted as not finite.
    negatives: number of negatives per row.
    width: width of the embeddings.
    temperature, momentum: of the loss, numbers > 0 and in [0, 1), or schedules of the step.

  Raises:
    ValueError: at once, fewer than 2 examples, no negatives, a width < 1, or a temperature or
      momentum out of range; in a step, a batch without 'id', or rows that differ.

  >>> from distill_jax import objectives
  >>> term = objectives.crd("pooled", "pooled", examples=100, negatives=8, width=16)
  >>> student, teacher = {"pooled": np.zeros((2, 4))}, {"pooled": np.zeros((2, 8))}
  >>> params, memory = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> params["teacher"]["kernel"].shape, memory.teacher.shape
  ((8, 16), (100, 16))
  """
  check_integer("examples", examples, 2)
  check_integer("negatives", negatives, 1)
  check_integer("width", width, 1)

  def check():
    check_number("temperature", temperature, low=0, open_low=True)
    check_number("momentum", momentum, low=0, high=1, open_high=True)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    s_key, t_key, state_key = jax.random.split(key, 3)
    embeddings = {
      "student": layer_init(s_key, math.prod(s.shape[1:]), width),
      "teacher": layer_init(t_key, math.prod(t.shape[1:]), width),
    }
    return Variables(embeddings, losses.crd_state(state_key, examples, width))

  def apply(params, state, s, t, *, where, step, key, axis_name, ids):
    sample = functools.partial(_sample_negatives, key, count=negatives, examples=examples)
    return losses.crd(
      layer(params["student"], s.reshape(len(s), -1)),
      layer(params["teacher"], t.reshape(len(t), -1)),
      ids,
      jax.vmap(sample)(ids),
      state,
      temperature=at_step(temperature, step),
      momentum=at_step(momentum, step),
      where=where,
      axis_name=axis_name,
    )

  return learned(student, teacher, init, apply, entries={"ids": "id"})


def queue_similarity(
  student: str,
  teacher: str,
  *,
  size: int = 65536,
  student_temperature: Number = 0.2,
  teacher_temperature: Number = 0.01,
) -> Term:
  """SEED: `losses.queue_similarity` against a queue of the teacher's embeddings of earlier batches.

  The student passes through a learned head of two linear layers with a ReLU between, the first as
  wide as the student (MoCo v2's). After each step the valid rows of the teacher replace the oldest
  of the queue; it starts with random directions. Weight 1, without other terms (Fang et al. 2021,
  arXiv:2101.04731).

  Args:
    student: name of features [B, C].
    teacher: name of embeddings [B, D].
    size: number of rows of the queue.
    student_temperature, teacher_temperature: of the loss, numbers > 0 or schedules of the step.

  Raises:
    ValueError: at once, size < 1 or a temperature <= 0; in init, outputs that are not [B, C] and
      [B, D].

  >>> from distill_jax import objectives
  >>> term = objectives.queue_similarity("pooled", "pooled", size=32)
  >>> student, teacher = {"pooled": np.zeros((2, 4))}, {"pooled": np.zeros((2, 8))}
  >>> params, state = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> sorted(params), state["queue"].shape
  (['0', '1'], (32, 8))
  """
  check_integer("size", size, 1)

  def check():
    check_number("student_temperature", student_temperature, low=0, open_low=True)
    check_number("teacher_temperature", teacher_temperature, low=0, open_low=True)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    if len(s.shape) != 2 or len(t.shape) != 2:
      raise ValueError("expected rows of embeddings, [B, C] and [B, D]")
    head_key, queue_key = jax.random.split(key)
    queue = jax.random.normal(queue_key, (size, t.shape[1]), jnp.float32)
    head = stack_init(head_key, (s.shape[1], s.shape[1], t.shape[1]))
    return Variables(head, {"queue": queue, "next": jnp.zeros((), jnp.int32)})

  def apply(params, state, s, t, *, where, step, axis_name):
    values = losses.queue_similarity(
      stack(params, s),
      t,
      state["queue"],
      student_temperature=at_step(student_temperature, step),
      teacher_temperature=at_step(teacher_temperature, step),
    )
    return values, _push(state, t, where, axis_name)

  return learned(student, teacher, init, apply)


def dino(
  student: str,
  teacher: str,
  *,
  student_temperature: Number = 0.1,
  teacher_temperature: Number = 0.04,
  momentum: Number = 0.9,
) -> Term:
  """`losses.dino` with its center, for a teacher that is an EMA of the student.

  `teachers.moving_average` is such a teacher. Weight 1, without other terms (Caron et al. 2021,
  arXiv:2104.14294).

  Args:
    student: name of an output [B, V, K], the head's output for each of V views of an example.
    teacher: name of an output [B, U, K], U <= V; its view i is the student's.
    student_temperature: > 0, or a schedule of the step.
    teacher_temperature: > 0, or a schedule of the step: the paper's is
      `optax.linear_schedule(0.04, 0.07, 30 * steps_per_epoch)`.
    momentum: momentum of the center, in [0, 1), or a schedule of the step.

  Raises:
    ValueError: at once, a hyper-parameter out of range; in init, shapes that do not fit.

  >>> from distill_jax import objectives
  >>> term = objectives.dino("head", "head")
  >>> views = {"head": np.zeros((2, 3, 16))}  # 2 examples, 3 views, 16 values of the head
  >>> params, state = term.init(jax.random.key(0), views, views)
  >>> params, state["center"].shape
  ({}, (16,))
  """

  def check():
    check_number("student_temperature", student_temperature, low=0, open_low=True)
    check_number("teacher_temperature", teacher_temperature, low=0, open_low=True)
    check_number("momentum", momentum, low=0, high=1, open_high=True)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    del key, s
    return Variables({}, {"center": jnp.zeros(t.shape[-1], jnp.float32)})

  def apply(params, state, s, t, *, where, step, axis_name):
    if s.ndim != 3 or t.ndim != 3:
      raise ValueError("expected outputs of views, [B, V, K] and [B, U, K]")
    values, center = losses.dino(
      s.swapaxes(0, 1),
      t.swapaxes(0, 1),
      state["center"],
      student_temperature=at_step(student_temperature, step),
      teacher_temperature=at_step(teacher_temperature, step),
      momentum=at_step(momentum, step),
      where=where,
      axis_name=axis_name,
    )
    return values, {"center": center.astype(state["center"].dtype)}

  return learned(student, teacher, init, apply)


def _sample_negatives(key: jax.Array, own_id: jax.Array, *, count: int, examples: int) -> jax.Array:
  """Returns `count` random ids in [0, examples), none of them the row's own."""
  samples = jax.random.randint(jax.random.fold_in(key, own_id), (count,), 0, examples - 1)
  return samples + (samples >= own_id.astype(samples.dtype)).astype(samples.dtype)


def _push(state: Tree, rows: jax.Array, where: jax.Array | None, axis_name: str | None) -> Tree:
  """Returns the queue with the valid rows of all devices in place of its oldest ones."""
  rows = jax.lax.stop_gradient(rows)
  where = jnp.ones(len(rows), bool) if where is None else where
  if axis_name is not None:
    rows, where = (compat.all_gather_invarying(x, axis_name) for x in (rows, where))
  queue, first = push(state["queue"], state["next"], rows, where)
  return {"queue": queue, "next": first}
