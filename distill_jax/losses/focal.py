"""Focal and global distillation for detectors (FGD): four terms, box weights, a learned context."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax
from distill_jax.losses._checks import Scalar


class Context(NamedTuple):
  """One global context block: attention pooling over space, then a bottleneck added to the map.

  Attributes:
    attention: kernel [C] and bias [] of the pooling's scores.
    reduce: kernel [C, C/2] and bias [C/2].
    norm: layer norm's scale [C/2] and bias [C/2].
    expand: kernel [C/2, C] and bias [C].

  >>> student, teacher = fgd_init(jax.random.key(0), 4)
  >>> student.reduce[0].shape, student.expand[0].shape  # a bottleneck of half the channels
  ((4, 2), (2, 4))
  """

  attention: tuple[jax.Array, jax.Array]
  reduce: tuple[jax.Array, jax.Array]
  norm: tuple[jax.Array, jax.Array]
  expand: tuple[jax.Array, jax.Array]


def fgd_init(key: jax.Array, channels: int) -> tuple[Context, Context]:
  """Returns learned blocks of student and teacher for `fgd`.

  The last kernel is 0, so that both blocks start as the identity.

  >>> fgd_init(jax.random.key(0), 4)[0].reduce[0].shape
  (4, 2)
  """
  half = max(channels // 2, 1)

  def block(key):
    pool, narrow = jax.random.split(key)
    context = Context(
      attention=(jax.random.normal(pool, (channels,)) * math.sqrt(2 / channels), jnp.zeros(())),
      reduce=(jax.random.normal(narrow, (channels, half)) / math.sqrt(channels), jnp.zeros(half)),
      norm=(jnp.ones(half), jnp.zeros(half)),
      expand=(jnp.zeros((half, channels)), jnp.zeros(channels)),
    )
    return jax.tree.map(lambda x: x.astype(jnp.float32), context)

  student, teacher = jax.random.split(key)
  return block(student), block(teacher)


def box_weights(boxes: ArrayLike, valid: ArrayLike, *, height: int, width: int) -> jax.Array:
  """Returns the foreground of `fgd`: 1 / area of the smallest box at a position, 0 outside all.

  A box covers the positions from floor of its low edge to ceil of its high edge, both included, as
  in the reference code.

  Args:
    boxes: (x0, y0, x1, y1) in positions of the map, [B, N, 4].
    valid: boxes that exist, bool [B, N].
    height: height of the map.
    width: width of the map.

  Returns:
    [B, height, width].

  Raises:
    ValueError: boxes are not [B, N, 4], or valid is not bool [B, N].

  >>> box_weights(jnp.array([[[0., 0., 0., 1.]]]), jnp.array([[True]]), height=2, width=2)
  Array([[[0.5, 0. ],
          [0.5, 0. ]]], dtype=float32)
  """
  boxes = _checks.array("boxes", boxes, exactly=3)
  valid = jnp.asarray(valid)
  if boxes.shape[-1] != 4 or valid.shape != boxes.shape[:2] or valid.dtype != jnp.bool_:
    raise ValueError(
      f"boxes, valid: expected [B, N, 4] and bool [B, N], got {boxes.shape} and {valid.dtype} "
      f"{valid.shape}"
    )
  low, high = jnp.floor(boxes[..., :2]), jnp.ceil(boxes[..., 2:])
  weight = 1 / jnp.maximum(high - low + 1, 1).prod(-1)
  x, y = (jnp.arange(n, dtype=boxes.dtype) for n in (width, height))
  x, y = x[None, None, None], y[None, None, :, None]
  low, high = low[..., None, None], high[..., None, None]
  covers = (x >= low[:, :, 0]) & (x <= high[:, :, 0]) & (y >= low[:, :, 1]) & (y <= high[:, :, 1])
  return jnp.where(covers & valid[..., None, None], weight[..., None, None], 0).max(1)


def fgd(
  student: ArrayLike,
  teacher: ArrayLike,
  foreground: ArrayLike,
  context: tuple[Context, Context],
  *,
  temperature: Scalar = 0.5,
  alpha: Scalar = 1e-3,
  beta: Scalar = 5e-4,
  gamma: Scalar = 1e-3,
  relation: Scalar = 5e-6,
) -> jax.Array:
  """alpha foreground + beta background + gamma attention + relation global, as sums over the map.

  Foreground and background: sum of M A_t (s - t)^2, A_t the teacher's attention over space times
  over channels (softmax at T of mean |F|, times H W and C), M = `foreground`, or 1 / (number of
  positions outside all boxes). Attention: sum of |A_s - A_t| over space and over channels. Global:
  sum of squares of the difference after a learned global context block on each side.

  Args:
    student: maps [B, H, W, C].
    teacher: maps of the same shape.
    foreground: weights from `box_weights`, [B, H, W]; 0 is background.
    context: blocks of student and teacher, from `fgd_init`, learned with the student.
    temperature: T > 0, may be traced.
    alpha: weight >= 0 of the foreground, may be traced, like the next three.
    beta: weight >= 0 of the background.
    gamma: weight >= 0 of the attention term.
    relation: weight >= 0 of the global term.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ, temperature <= 0, or a negative weight.

  Compares: detectors' maps, inside and outside of boxes, and their global context
  Shapes: [B, H, W, C], foreground [B, H, W] -> [B]
  Use: detectors, summed over the levels of the neck
  Weight: 1; the defaults are RetinaNet's (two-stage: 5e-5, 2.5e-5, 5e-5, 5e-7)
  Source: FGD, Yang et al. 2022, arXiv:2111.11837

  >>> x, m = jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 2, 2))
  >>> fgd(x, x, m, fgd_init(jax.random.key(0), 4))
  Array([0.], dtype=float32)
  """
  student, teacher = _checks.pair(_checks.images("student", student), teacher)
  foreground = _checks.array("foreground", foreground).astype(student.dtype)
  if foreground.shape != student.shape[:3]:
    raise ValueError(f"foreground: expected shape {student.shape[:3]}, got {foreground.shape}")
  t = _checks.positive("temperature", temperature, student.dtype)
  alpha = _checks.number("alpha", alpha, student.dtype, low=0)
  beta = _checks.number("beta", beta, student.dtype, low=0)
  gamma = _checks.number("gamma", gamma, student.dtype, low=0)
  relation = _checks.number("relation", relation, student.dtype, low=0)
  context = jax.tree.map(lambda x: jnp.asarray(x).astype(student.dtype), context)
  outside = (foreground == 0).astype(student.dtype)
  background = outside / jnp.maximum(outside.sum((1, 2), keepdims=True), 1)
  (space_s, channel_s), (space_t, channel_t) = (_attention(x, t) for x in (student, teacher))
  error = ((student - teacher) ** 2 * channel_t[:, None, None]).sum(-1) * space_t
  attention = jnp.abs(space_s - space_t).sum((1, 2)) + jnp.abs(channel_s - channel_t).sum(-1)
  difference = _global(student, context[0]) - _global(teacher, context[1])
  value = alpha * (foreground * error).sum((1, 2)) + beta * (background * error).sum((1, 2))
  return value + gamma * attention + relation * _checks.per_example(difference**2, total=True)


def _attention(x: jax.Array, temperature: Scalar) -> tuple[jax.Array, jax.Array]:
  """Returns attention over space [B, H, W], with sum H W, and over channels [B, C], with sum C."""
  size = jnp.abs(x)
  positions = size.mean(-1).reshape(x.shape[0], -1)
  space, channels = (
    jnp.exp(_softmax.log_softmax(z, temperature=temperature)) * z.shape[-1]
    for z in (positions, size.mean((1, 2)))
  )
  return space.reshape(x.shape[:3]), channels


def _global(x: jax.Array, block: Context) -> jax.Array:
  """Returns x plus the bottleneck of its attention-pooled mean."""

  def dense(y, layer):
    product = jnp.matmul(y, layer[0], precision=_checks.HIGHEST)
    return product + jnp.broadcast_to(layer[1], product.shape)

  where = jax.nn.softmax(dense(x, block.attention), axis=(1, 2))
  pooled = jnp.einsum("bhw,bhwc->bc", where, x, precision=_checks.HIGHEST)
  hidden = dense(pooled, block.reduce)
  centered = hidden - hidden.mean(-1, keepdims=True)
  hidden = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
  hidden = jax.nn.relu(hidden * block.norm[0][None] + block.norm[1][None])
  return x + dense(hidden, block.expand)[:, None, None]
