"""Teachers kept as K of V classes, and losses of a student [..., V] against them.

Targets hold log-probabilities at one temperature under the full vocabulary's normalizer; they cannot be
re-tempered, so the losses read the temperature from them. An index outside [0, V) gives NaN, never silence.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks, _softmax


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["indices", "log_probs", "log_tail"],
  meta_fields=["temperature", "drawn"],
)
@dataclasses.dataclass(frozen=True)
class SparseTargets:
  """K classes of a teacher's distribution.

  Attributes:
    indices: integers [..., K].
    log_probs: of these classes at `temperature`, under the normalizer of the full vocabulary, [..., K].
    log_tail: log of the mass that was left out, [...]; -inf for none. RandomSampling have none: their K entries of
      -log K (an index may repeat) stand for the whole distribution.
    temperature: a number > 0; static under jit.
    drawn: True of `sample_k`, which `sampled_cross_entropy` alone takes; False of `top_k`, which the others take; None:
      not known, and not checked. Static under jit.
  """

  indices: jax.Array
  log_probs: jax.Array
  log_tail: jax.Array
  temperature: float = 1.0
  drawn: bool | None = None


def top_k(logits, k: int, *, temperature=1.0) -> SparseTargets:
  """The k most probable classes, largest first, and the exact mass of the rest.

  Args:
    logits: [..., V]; -inf is a class that does not exist.
    k: in [1, V].
    temperature: a number > 0.

  Raises:
    ValueError: k outside [1, V], or temperature <= 0 or traced.

  >>> top_k(jnp.array([0., 2., 1.]), 2).indices
  Array([1, 2], dtype=int32)
  """
  log_p, k, temperature = _tempered(logits, k, temperature)
  if k > log_p.shape[-1]:
    raise ValueError(f"k must be in [1, {log_p.shape[-1]}], the number of classes, got {k}")
  # Or XLA merges a slice of the result with top_k's own, and then sorts all V: 100 times slower on CPU.
  log_probs, indices = jax.lax.optimization_barrier(jax.lax.top_k(log_p, k))
  return SparseTargets(
    indices, log_probs, _softmax.log_sum(_without(log_p, indices)), temperature, False
  )


def sample_k(key, logits, k: int, *, temperature=1.0) -> SparseTargets:
  """k draws with replacement from softmax(logits / temperature), each of probability 1 / k.

  Args:
    key: a PRNG key.
    logits: [..., V]; -inf is never drawn.
    k: at least 1.
    temperature: a number > 0.

  Raises:
    ValueError: k < 1, or temperature <= 0 or traced.

  >>> sample_k(jax.random.key(0), jnp.array([0., -jnp.inf]), 3).indices
  Array([0, 0, 0], dtype=int32)
  """
  log_p, k, temperature = _tempered(logits, k, temperature)
  shape = log_p.shape[:-1]
  log_probs = jnp.full((*shape, k), -jnp.log(k), log_p.dtype)
  no_tail = jnp.full(shape, -jnp.inf, log_p.dtype)
  return SparseTargets(_draw(key, log_p, k), log_probs, no_tail, temperature, True)


def sparse_kl(student, targets: SparseTargets, *, class_mask=None) -> jax.Array:
  """T^2 KL over K + 1 classes: the kept ones and "everything else", on both sides.

  Never negative, at most the full `kl_divergence`, and equal to it at K = V.

  Args:
    student: logits [..., V].
    targets: from `top_k`, not from `sample_k` (an index must not repeat).
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are draws, their shapes do not fit the student's, or K > V.

  Compares: class probabilities of the teacher's top classes, the rest as one
  Shapes: [..., V], targets [..., K] -> [...]
  Use: the default for stored teachers of many classes
  Weight: as kl_divergence
  Source: the ghost token in Anshumann et al. 2025, arXiv:2503.16870

  >>> z = jnp.array([1., 2., 3., 4.])
  >>> abs(sparse_kl(z, top_k(z, 2))).round(6)
  Array(0., dtype=float32)
  """
  z, indices, log_probs, log_tail, t = _aligned(student, targets, class_mask)
  rest = _softmax.log_sum(_without(z, indices))
  log_q = _softmax.log_softmax(jnp.concatenate([_gather(z, indices), rest[..., None]], -1))
  return t**2 * _softmax.divergence(jnp.concatenate([log_probs, log_tail[..., None]], -1), log_q)


def sparse_kl_conditional(student, targets: SparseTargets, *, class_mask=None) -> jax.Array:
  """T^2 KL of both sides renormalized on the K classes.

  Silent about the student's mass elsewhere (it is unchanged while the student leaks it), so combine it with a
  label term. Often called plain KL.

  Args:
    student: logits [..., V].
    targets: from `top_k`.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are draws, their shapes do not fit the student's, or K > V.

  Compares: class probabilities among the teacher's top classes alone
  Shapes: [..., V], targets [..., K] -> [...]
  Use: beside a label term, where a teacher's tail was not stored
  Weight: as kl_divergence
  Source: common practice (top-k, renormalized)

  >>> abs(sparse_kl_conditional(jnp.array([1., 2., 9.]), top_k(jnp.array([1., 2., -9.]), 2))).round(6)
  Array(0., dtype=float32)
  """
  z, indices, log_probs, _, t = _aligned(student, targets, class_mask)
  kept = _gather(z, indices)
  return t**2 * _softmax.divergence(_softmax.log_softmax(log_probs), _softmax.log_softmax(kept))


def sparse_kl_smoothed(student, targets: SparseTargets, *, class_mask=None) -> jax.Array:
  """T^2 KL with the left-out mass spread evenly over the V - K other classes that exist.

  Args:
    student: logits [..., V].
    targets: from `top_k`.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are draws, their shapes do not fit the student's, or K > V.

  Compares: class probabilities, the tail as uniform
  Shapes: [..., V], targets [..., K] -> [...]
  Use: ImageNet-sized vocabularies, where the tail is close to even
  Weight: as kl_divergence
  Source: TinyViT, Wu et al. 2022, arXiv:2207.10666; FKD, Shen & Xing 2022

  >>> z = jnp.array([2., 0., 0.])
  >>> abs(sparse_kl_smoothed(z, top_k(z, 1))).round(6)
  Array(0., dtype=float32)
  """
  z, indices, log_probs, log_tail, t = _aligned(student, targets, class_mask)
  log_q = _softmax.log_softmax(z)
  rest = _without(log_q, indices)
  others = rest != -jnp.inf
  number = others.sum(-1, dtype=log_q.dtype)
  mean = jnp.where(others, rest, 0).sum(-1) / jnp.maximum(number, 1)
  # The tail is spread over `number` classes, so that its part is tail (log(tail / number) - mean log q). With no
  # class left to carry it, it is mass that the student cannot match.
  has_tail = log_tail != -jnp.inf
  log_tail = jnp.where(has_tail, log_tail, 0)
  spread = jnp.exp(log_tail) * (log_tail - jnp.log(jnp.maximum(number, 1)) - mean)
  spread = jnp.where(has_tail, jnp.where(number > 0, spread, jnp.inf), 0)
  return t**2 * (_softmax.divergence(log_probs, _gather(log_q, indices)) + spread)


def sampled_cross_entropy(student, targets: SparseTargets, *, class_mask=None) -> jax.Array:
  """-T^2 times the mean over draws of log q: its gradient is, on average, that of `soft_cross_entropy`.

  Args:
    student: logits [..., V].
    targets: from `sample_k`; repeats count as often as they occur.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats, [...].

  Raises:
    ValueError: the targets are no draws, or their shapes do not fit the student's.

  Compares: class probabilities, by draws from the teacher
  Shapes: [..., V], targets [..., K] -> [...]
  Use: stored language-model teachers, where top-k is biased; K about 50
  Weight: as soft_cross_entropy
  Source: Sparse logit sampling, Anshumann et al. 2025, arXiv:2503.16870

  >>> sampled_cross_entropy(jnp.zeros(2), sample_k(jax.random.key(0), jnp.zeros(2), 5)).round(4)
  Array(0.6931, dtype=float32)
  """
  z, indices, log_probs, _, t = _aligned(student, targets, class_mask, repeats=True)
  return t**2 * _softmax.cross_entropy(log_probs, _gather(_softmax.log_softmax(z), indices))


def _draw(key, log_p, k):
  """k classes drawn with replacement from log_p [..., V], int32 [..., k].

  First a block of about sqrt(V) classes, then a class in it: Gumbel noise for 2 k sqrt(V) numbers in place of k V.
  """
  classes, shape = log_p.shape[-1], log_p.shape[:-1]
  width = math.isqrt(classes - 1) + 1
  number = -(-classes // width)
  padding = [(0, 0)] * len(shape) + [(0, number * width - classes)]
  blocks = jnp.pad(log_p, padding, constant_values=-jnp.inf).reshape(*shape, number, width)
  block_key, class_key = jax.random.split(key)
  block = jax.random.categorical(block_key, _softmax.log_sum(blocks), shape=(k, *shape))
  block = jnp.moveaxis(block, 0, -1)
  inside = jax.random.categorical(class_key, jnp.take_along_axis(blocks, block[..., None], -2))
  return (block * width + inside).astype(jnp.int32)


def _tempered(logits, k, temperature):
  logits = _checks.array("logits", logits, ndim=1)
  if isinstance(temperature, jax.core.Tracer):
    raise ValueError("temperature must be a number: targets carry it as a static field")
  temperature = _checks.positive("temperature", temperature, logits.dtype)
  k = operator.index(k)
  if k < 1:
    raise ValueError(f"k must be at least 1, got {k}")
  return _softmax.log_softmax(logits / temperature), k, temperature


def _aligned(student, targets, class_mask, repeats=False):
  """The student's logits over the temperature, -inf where masked, and the checked parts of the targets."""
  if targets.drawn is not None and targets.drawn != repeats:
    raise ValueError(
      "targets are draws (sample_k): their loss is sampled_cross_entropy"
      if targets.drawn
      else "targets are the most probable classes (top_k): their loss is sparse_kl, or sparse_kl_conditional or "
      "sparse_kl_smoothed; sampled_cross_entropy takes draws (sample_k)"
    )
  student = _checks.array("student", student, ndim=1)
  shape = (*student.shape[:-1], jnp.shape(targets.log_probs)[-1])
  if jnp.shape(targets.log_probs) != shape or jnp.shape(targets.log_tail) != shape[:-1]:
    raise ValueError(
      f"student {student.shape} does not fit log_probs {jnp.shape(targets.log_probs)} and log_tail "
      f"{jnp.shape(targets.log_tail)}: expected [..., V], [..., K] and [...]"
    )
  if shape[-1] > student.shape[-1] and not repeats:
    raise ValueError(
      f"targets keep {shape[-1]} classes, more than the student's {student.shape[-1]}"
    )
  dtype = jnp.promote_types(student.dtype, jnp.result_type(targets.log_probs, targets.log_tail))
  indices = _checks.integers("indices", targets.indices, shape)
  indices = jnp.where(indices < 0, student.shape[-1], indices)  # a negative index would wrap
  t = _checks.positive("temperature", targets.temperature, dtype)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  z = student.astype(dtype) / t
  z = z if mask is None else jnp.where(mask, z, -jnp.inf)
  return z, indices, targets.log_probs.astype(dtype), targets.log_tail.astype(dtype), t


def _gather(z, indices):
  return jnp.take_along_axis(z, indices, -1, mode="fill", fill_value=jnp.nan)


def _without(log_a, indices):
  """log_a with -inf at the kept classes."""
  kept = jnp.put_along_axis(
    jnp.zeros(log_a.shape, bool), indices, True, -1, inplace=False, mode="drop"
  )
  return jnp.where(kept, -jnp.inf, log_a)
