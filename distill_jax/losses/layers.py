"""Learned matching of layers: which student layer should follow which teacher layer, and how much."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks
from distill_jax.losses.projected import pooled


class LayerAttention(NamedTuple):
  """The learned part of `layer_attention`, for S student and T teacher layers and a width d.

  Attributes:
    queries: a kernel [C_t, d] for each teacher layer.
    keys: a kernel [C_s, d] for each student layer.
    bilinear: W_QK of each teacher layer, [T, d, d].
    student_position: [S, d].
    teacher_position: [T, d].
  """

  queries: tuple[jax.Array, ...]
  keys: tuple[jax.Array, ...]
  bilinear: jax.Array
  student_position: jax.Array
  teacher_position: jax.Array


def layer_attention_init(
  key, student_channels: Sequence[int], teacher_channels: Sequence[int], *, width: int = 128
) -> LayerAttention:
  """Parameters of `layer_attention`, normal with variance 1 / fan-in (1 / d for positions).

  >>> layer_attention_init(jax.random.key(0), [8, 16], [32], width=4).bilinear.shape
  (1, 4, 4)
  """
  keys = iter(jax.random.split(key, len(student_channels) + len(teacher_channels) + 3))

  def draw(*shape):
    return jax.random.normal(next(keys), shape) / math.sqrt(shape[-2])

  def positions(count):
    return jax.random.normal(next(keys), (count, width)) / math.sqrt(width)

  students, teachers = len(student_channels), len(teacher_channels)
  return LayerAttention(
    queries=tuple(draw(c, width) for c in teacher_channels),
    keys=tuple(draw(c, width) for c in student_channels),
    bilinear=draw(teachers, width, width),
    student_position=positions(students),
    teacher_position=positions(teachers),
  )


def layer_attention(student, teacher, params: LayerAttention) -> jax.Array:
  """sum_t sum_s a_ts <(Q_s - Q_t)^2>, Q the attention maps, a_ts a learned softmax over the student's layers.

  a_t = softmax_s((q_t' W_t k_s + p_t' p_s) / sqrt(d)), q_t and k_s linear in the channels' spatial means, k_s
  with a ReLU. Q = vec(mean_c F^2) over its L2 norm, the student's map average-pooled to the teacher's size first.
  The reference code puts a batch norm after each linear layer; the paper has none, and neither has this.

  Args:
    student: S maps, each [B, H, W, C] of its own size.
    teacher: T maps, each [B, J, K, D] of its own size.
    params: from `layer_attention_init`, learned with the student.

  Returns:
    [B].

  Raises:
    ValueError: no maps, not as many maps as params, other channels than params, or batch sizes differ.

  Compares: attention maps of all pairs of layers, weighed by what is learned
  Shapes: S x [B, H, W, C], T x [B, J, K, D] -> [B]
  Use: image networks whose layers nobody wants to match by hand
  Weight: 200 (reference code, CIFAR-100)
  Source: AFD, Ji et al. 2021, arXiv:2102.02973

  >>> params = layer_attention_init(jax.random.key(0), [3], [5], width=2)
  >>> layer_attention([jnp.ones((1, 4, 4, 3))], [jnp.ones((1, 2, 2, 5))], params).round(6)
  Array([0.], dtype=float32)
  """
  student, teacher = (
    _maps("student", student, params.keys),
    _maps("teacher", teacher, params.queries),
  )
  dtype = jnp.result_type(*student, *teacher)
  student, teacher = ([x.astype(dtype) for x in maps] for maps in (student, teacher))
  if len({len(x) for x in (*student, *teacher)}) != 1:
    raise ValueError(f"batch sizes differ: student {_shapes(student)}, teacher {_shapes(teacher)}")
  params = jax.tree.map(lambda x: jnp.asarray(x).astype(student[0].dtype), params)
  q, k = _summaries(teacher, params.queries), jax.nn.relu(_summaries(student, params.keys))
  scores = jnp.einsum("btd,tde,bse->bts", q, params.bilinear, k, precision=_checks.HIGHEST)
  positions = jnp.matmul(
    params.teacher_position, params.student_position.T, precision=_checks.HIGHEST
  )
  weights = jax.nn.softmax((scores + positions) / math.sqrt(q.shape[-1]))
  distances = jnp.stack([jnp.stack([_distance(s, t) for s in student], -1) for t in teacher], 1)
  return (weights * distances).sum((1, 2))


def _maps(name, maps, kernels):
  maps = [_checks.array(name, x, exactly=4) for x in maps]
  if not maps or [x.shape[-1] for x in maps] != [kernel.shape[0] for kernel in kernels]:
    raise ValueError(
      f"{name} {_shapes(maps)} does not fit params for {[k.shape[0] for k in kernels]} channels"
    )
  return maps


def _shapes(maps):
  return [x.shape for x in maps]


def _summaries(maps, kernels):
  means = (x.mean((1, 2)) for x in maps)
  return jnp.stack([jnp.matmul(m, w, precision=_checks.HIGHEST) for m, w in zip(means, kernels)], 1)


def _distance(student, teacher):
  s, t = (
    _checks.unit((x**2).mean(-1).reshape(x.shape[0], -1))
    for x in (pooled(student, teacher.shape[1:3]), teacher)
  )
  return ((s - t) ** 2).mean(-1)
