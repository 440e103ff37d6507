"""Losses on the attention of transformers, and on weights and features matched across layers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce
from distill_jax.losses import _checks, _softmax


def attention_scores_mse(
  student: ArrayLike, teacher: ArrayLike, *, mask: ArrayLike | None = None
) -> jax.Array:
  """Mean over heads and valid pairs of (s - t)^2, scores before the softmax.

  Args:
    student: scores [B, heads, queries, keys].
    teacher: scores of the same shape.
    mask: pairs that exist (padding, causality), bool, broadcastable to the scores. -inf on both
      sides removes a pair too.

  Returns:
    [B]; 0 where no pair is valid.

  Raises:
    ValueError: shapes differ, or the mask does not fit.

  Compares: attention scores before the softmax
  Shapes: [B, h, q, k] -> [B]
  Use: BERT-like models with as many heads; summed over matched layers
  Weight: 1
  Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351

  >>> mask = jnp.array([True, False])
  >>> attention_scores_mse(jnp.zeros((1, 1, 1, 2)), jnp.array([[[[2., 9.]]]]), mask=mask)
  Array([4.], dtype=float32)
  """
  student, teacher, mask = _scores(student, teacher, mask)
  valid = mask & (jnp.maximum(student, teacher) != -jnp.inf)
  used = valid & (jnp.minimum(student, teacher) != -jnp.inf)
  squares = (jnp.where(used, student, 0) - jnp.where(used, teacher, 0)) ** 2
  squares = jnp.where(valid & ~used, jnp.inf, squares)
  return squares.sum((1, 2, 3)) / jnp.maximum(valid.sum((1, 2, 3), dtype=squares.dtype), 1)


def attention_kl(
  student: ArrayLike, teacher: ArrayLike, *, mask: ArrayLike | None = None
) -> jax.Array:
  """KL(softmax t || softmax s) summed over keys, mean over heads and valid queries.

  Args:
    student: scores before the softmax, [B, heads, queries, keys].
    teacher: scores of the same shape.
    mask: pairs that exist (padding, causality), bool, broadcastable to the scores; a query is valid
      if any of its pairs is. -inf on both sides removes a pair too.

  Returns:
    Nats, [B]; 0 where no query is valid.

  Raises:
    ValueError: shapes differ, or the mask does not fit.

  Compares: attention probabilities
  Shapes: [B, h, q, k] -> [B]
  Use: transformers with as many heads; summed over matched layers
  Weight: 1
  Source: MobileBERT, Sun et al. 2020, arXiv:2004.02984

  >>> attention_kl(jnp.zeros((1, 1, 1, 2)), jnp.array([[[[0., -jnp.inf]]]])).round(4)
  Array([0.6931], dtype=float32)
  """
  return _mean_over_queries(_softmax.divergence, student, teacher, mask)


def attention_cross_entropy(
  student: ArrayLike, teacher: ArrayLike, *, mask: ArrayLike | None = None
) -> jax.Array:
  """-sum softmax(t) log softmax(s) over keys, mean over heads and valid queries.

  `attention_kl` plus the entropy of the teacher's attention. TextBrewer's `attention_ce` normalizes
  over masked keys too, and without a mask drops the teacher's keys whose score is below -1e-3.

  Args:
    student: scores before the softmax, [B, heads, queries, keys].
    teacher: scores of the same shape.
    mask: pairs that exist (padding, causality), bool, broadcastable to the scores; a query is valid
      if any of its pairs is. -inf on both sides removes a pair too.

  Returns:
    Nats, [B]; 0 where no query is valid, not 0 at student = teacher.

  Raises:
    ValueError: shapes differ, or the mask does not fit.

  Compares: attention probabilities
  Shapes: [B, h, q, k] -> [B]
  Use: BERT-like models, where a source reports cross entropy; the gradient is attention_kl's
  Weight: 1
  Source: TextBrewer, Yang et al. 2020, arXiv:2002.12620

  >>> attention_cross_entropy(jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2))).round(4)
  Array([0.6931], dtype=float32)
  """
  return _mean_over_queries(_softmax.cross_entropy, student, teacher, mask)


def minilm_relations(
  student: Sequence[ArrayLike],
  teacher: Sequence[ArrayLike],
  mask: ArrayLike | None = None,
  *,
  relation_heads: int,
) -> jax.Array:
  """Sum over A in (queries, keys, values) of the mean KL of relations over heads and positions.

  A relation is softmax(A A' / sqrt(d_r)) with A split into `relation_heads` heads of width
  d_r, so that width and head count may differ.

  Args:
    student: (queries, keys, values) of one layer, each [B, length, width], all heads next to one
      another.
    teacher: the same of the teacher, any width.
    mask: tokens that exist, bool [B, length]; the others may be NaN.
    relation_heads: r, which divides both widths; 48 or 64 in the paper.

  Returns:
    Nats, [B]; 0 where no token exists.

  Raises:
    ValueError: the number of arrays, the batch or the length differs, or r does not divide a width.

  Compares: self-attention relations between tokens
  Shapes: 3 x [B, L, C], 3 x [B, L, D] -> [B]
  Use: transformers of any width, one layer (the teacher's last or upper middle)
  Weight: 1, as the only loss
  Source: MiniLMv2, Wang et al. 2021, arXiv:2012.15828

  >>> x = jax.random.normal(jax.random.key(0), (1, 3, 4))
  >>> minilm_relations((x, x, x), (x, x, x), relation_heads=2)
  Array([0.], dtype=float32)
  """
  if len(student) != len(teacher) or not len(student):
    raise ValueError(
      f"student: expected as many arrays as teacher has, {len(teacher)}, got {len(student)}"
    )
  values = []
  for s, t in zip(student, teacher):
    s, t = _checks.pair(s, t, exactly=3, leading=2)
    tokens = _checks.mask("mask", mask, s.shape[:2])
    tokens = jnp.ones(s.shape[:2], bool) if tokens is None else tokens
    s, t = reduce.blank(tokens, s, t)  # Products of valid tokens with NaN would have a gradient.
    pairs = tokens[:, None, :, None] & tokens[:, None, None, :]
    relations = (_relation(name, x, relation_heads) for name, x in (("student", s), ("teacher", t)))
    values.append(attention_kl(*relations, mask=pairs))
  return sum(values[1:], values[0])


def weight_alignment(student: Any, teacher: Any) -> jax.Array:
  """Mean over matrices of <(W_s - W_t)^2>: the student's weights against the teacher's.

  For layers of one shape, or with a student projected to it. Each matrix has the same weight.

  Args:
    student: a tree of arrays.
    teacher: a tree of the same structure and shapes.

  Returns:
    A scalar.

  Raises:
    ValueError: structures or shapes differ, or there are no arrays.

  Compares: weights of layers that have one shape
  Shapes: tree, tree -> scalar
  Use: attention weights of a student whose layers are as wide as the teacher's
  Weight: 1
  Source: FitNets' squared error, on weights instead of features

  >>> weight_alignment({"kernel": jnp.ones((2, 2))}, {"kernel": jnp.zeros((2, 2))})
  Array(1., dtype=float32)
  """
  leaves, structure = jax.tree.flatten(student)
  others, other = jax.tree.flatten(teacher)
  if str(structure) != str(other) or not leaves:
    raise ValueError(
      f"student: expected the teacher's tree of arrays, got student {structure} and teacher {other}"
    )
  pairs = [_checks.pair(s, t) for s, t in zip(leaves, others)]
  return jnp.stack([((s - t) ** 2).mean() for s, t in pairs]).mean()


def _scores(
  student: ArrayLike, teacher: ArrayLike, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns checked scores and the mask, all True for None."""
  student, teacher = _checks.pair(student, teacher, exactly=4)
  mask = _checks.mask("mask", mask, student.shape)
  return student, teacher, jnp.ones(student.shape, bool) if mask is None else mask


def _mean_over_queries(
  compare: Callable[[jax.Array, jax.Array], jax.Array],
  student: ArrayLike,
  teacher: ArrayLike,
  mask: ArrayLike | None,
) -> jax.Array:
  """Returns the mean over heads and valid queries of `compare(log p, log q)` over keys."""
  student, teacher, mask = _scores(student, teacher, mask)
  log_q, log_p = (_softmax.log_softmax(x, mask=mask) for x in (student, teacher))
  valid = (mask & ((log_q != -jnp.inf) | (log_p != -jnp.inf))).any(-1)
  values = compare(log_p, log_q).sum((1, 2))
  return values / jnp.maximum(valid.sum((1, 2), dtype=values.dtype), 1)


def _relation(name: str, x: jax.Array, heads: int) -> jax.Array:
  """Returns scores [B, heads, length, length] of x [B, length, width] with itself."""
  if heads < 1 or x.shape[-1] % heads:
    raise ValueError(
      f"relation_heads: expected a divisor of the {name}'s width {x.shape[-1]}, got {heads}"
    )
  x = x.reshape(*x.shape[:2], heads, -1)
  scores = jnp.einsum("bqhd,bkhd->bhqk", x, x, precision=_checks.HIGHEST)
  return scores / math.sqrt(x.shape[-1])
