"""Learned matching of layers: how much each student layer should follow each teacher layer."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.losses import _checks
from distill_jax.losses.projected import pooled


class LayerAttention(NamedTuple):
  """The learned part of `layer_attention`, for S student and T teacher layers and a width d.

  Attributes:
    queries: one kernel [C_t, d] per teacher layer.
    keys: one kernel [C_s, d] per student layer.
    bilinear: W_QK of every teacher layer, [T, d, d].
    student_position: position embeddings of the student's layers, [S, d].
    teacher_position: position embeddings of the teacher's layers, [T, d].

  >>> params = layer_attention_init(jax.random.key(0), [8, 16], [32], width=4)
  >>> [kernel.shape for kernel in params.keys]  # one for each layer of the student
  [(8, 4), (16, 4)]
  """

  queries: tuple[jax.Array, ...]
  keys: tuple[jax.Array, ...]
  bilinear: jax.Array
  student_position: jax.Array
  teacher_position: jax.Array


def layer_attention_init(
  key: jax.Array,
  student_channels: Sequence[int],
  teacher_channels: Sequence[int],
  *,
  width: int = 128,
) -> LayerAttention:
  """Returns parameters of `layer_attention`, normal with variance 1 / fan-in (1 / d for positions).

  >>> layer_attention_init(jax.random.key(0), [8, 16], [32], width=4).bilinear.shape
  (1, 4, 4)
  """
  keys = iter(jax.random.split(key, len(student_channels) + len(teacher_channels) + 3))

  def kernel(*shape):
    return jax.random.normal(next(keys), shape, jnp.float32) / math.sqrt(shape[-2])

  def positions(count):
    return jax.random.normal(next(keys), (count, width), jnp.float32) / math.sqrt(width)

  students, teachers = len(student_channels), len(teacher_channels)
  return LayerAttention(
    queries=tuple(kernel(c, width) for c in teacher_channels),
    keys=tuple(kernel(c, width) for c in student_channels),
    bilinear=kernel(teachers, width, width),
    student_position=positions(students),
    teacher_position=positions(teachers),
  )


def layer_attention(
  student: Sequence[ArrayLike], teacher: Sequence[ArrayLike], params: LayerAttention
) -> jax.Array:
  """sum_t sum_s a_ts <(Q_s - Q_t)^2>, a_ts a learned softmax over the student's layers.

  a_t = softmax_s((q_t' W_t k_s + p_t' p_s) / sqrt(d)), q_t and k_s linear in the channels' spatial
  means, k_s with a ReLU. Q = vec(mean_c F^2) over its L2 norm, the student's map average-pooled to
  the teacher's size first. The reference code puts a batch norm after each linear layer; the paper
  has none, and neither has this.

  Args:
    student: S maps, each [B, H, W, C] of any size.
    teacher: T maps, each [B, J, K, D] of any size.
    params: parameters from `layer_attention_init`, learned with the student.

  Returns:
    [B].

  Raises:
    ValueError: no maps, not as many maps as params, other channels than params, or batch sizes
      differ.

  Compares: attention maps of all pairs of layers, with learned weights
  Shapes: S x [B, H, W, C], T x [B, J, K, D] -> [B]
  Use: image networks whose layers have no obvious match
  Weight: 200 (reference code, CIFAR-100)
  Source: AFD, Ji et al. 2021, arXiv:2102.02973

  >>> params = layer_attention_init(jax.random.key(0), [3], [5], width=2)
  >>> layer_attention([jnp.ones((1, 4, 4, 3))], [jnp.ones((1, 2, 2, 5))], params).round(6)
  Array([0.], dtype=float32)
  """
  students = _maps("student", student, params.keys)
  teachers = _maps("teacher", teacher, params.queries)
  dtype = reduce.common_dtype(*students, *teachers)
  students, teachers = ([x.astype(dtype) for x in maps] for maps in (students, teachers))
  if len({len(x) for x in (*students, *teachers)}) != 1:
    raise ValueError(
      f"student: expected one batch size in all maps, got student {_shapes(students)} and teacher "
      f"{_shapes(teachers)}"
    )
  params = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), params)
  q = _summaries(teachers, params.queries)
  k = jax.nn.relu(_summaries(students, params.keys))
  scores = jnp.einsum("btd,tde,bse->bts", q, params.bilinear, k, precision=_checks.HIGHEST)
  positions = jnp.matmul(
    params.teacher_position, params.student_position.T, precision=_checks.HIGHEST
  )
  weights = jax.nn.softmax((scores + positions[None]) / math.sqrt(q.shape[-1]))
  distances = jnp.stack([jnp.stack([_distance(s, t) for s in students], -1) for t in teachers], 1)
  return (weights * distances).sum((1, 2))


def _maps(name: str, maps: Sequence[ArrayLike], kernels: Sequence[jax.Array]) -> list[jax.Array]:
  """Returns the maps, checked against the kernels' channels."""
  arrays = [_checks.images(name, x) for x in maps]
  channels = [kernel.shape[0] for kernel in kernels]
  if not arrays or [x.shape[-1] for x in arrays] != channels:
    raise ValueError(
      f"{name}: expected maps of {channels} channels, as in params, got {_shapes(arrays)}"
    )
  return arrays


def _shapes(maps: Sequence[jax.Array]) -> list[tuple[int, ...]]:
  return [x.shape for x in maps]


def _summaries(maps: Sequence[jax.Array], kernels: Sequence[jax.Array]) -> jax.Array:
  """Returns each map's spatial mean times its kernel, [B, layers, d]."""
  means = (x.mean((1, 2)) for x in maps)
  return jnp.stack([jnp.matmul(m, w, precision=_checks.HIGHEST) for m, w in zip(means, kernels)], 1)


def _distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """Returns <(Q_s - Q_t)^2> of two layers, [B]."""
  height, width = teacher.shape[1:3]
  s, t = (
    _checks.unit((x**2).mean(-1).reshape(x.shape[0], -1))
    for x in (pooled(student, (height, width)), teacher)
  )
  return ((s - t) ** 2).mean(-1)
