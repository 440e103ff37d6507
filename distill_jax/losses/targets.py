"""Sparse targets: K of a teacher's V classes, the most probable ones or random samples.

Targets are log-probabilities at one temperature, under the normalizer of the full vocabulary. Their
temperature cannot be changed afterwards, so the losses read it from them.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks, _softmax


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["indices", "log_probs", "log_tail"],
  meta_fields=["temperature", "sampled"],
)
@dataclasses.dataclass(frozen=True)
class SparseTargets:
  """K classes of a teacher's distribution.

  Attributes:
    indices: classes, integers [..., K].
    log_probs: log-probabilities of these classes at `temperature`, under the normalizer of the full
      vocabulary, [..., K].
    log_tail: log of the probability of all other classes, [...]; -inf for none. Random samples have
      none: their K entries of -log K (an index may repeat) represent the full distribution.
    temperature: a number > 0; static under jit.
    sampled: True for `sample_k`, whose only loss is `sampled_cross_entropy`; False for `top_k`,
      whose losses are the others; None: unknown, and not checked. Static under jit.

  >>> log_probs = jnp.log(jnp.array([0.5, 0.25]))  # of classes 2 and 0, stored by you
  >>> targets = SparseTargets(jnp.array([2, 0]), log_probs, log_tail=jnp.log(0.25))
  >>> student = jnp.log(jnp.array([0.25, 0.125, 0.5, 0.125]))
  >>> abs(sparse_kl(student, targets)).round(6)
  Array(0., dtype=float32)
  """

  indices: jax.Array
  log_probs: jax.Array
  log_tail: jax.Array
  temperature: float = 1.0
  sampled: bool | None = None


def top_k(logits: ArrayLike, k: int, *, temperature: float = 1.0) -> SparseTargets:
  """Returns the k most probable classes, largest first, and the exact probability of all others.

  Args:
    logits: logits [..., V]; -inf is a class that does not exist.
    k: number of classes, in [1, V].
    temperature: a number > 0.

  Raises:
    ValueError: k outside [1, V], or temperature <= 0 or traced.

  >>> top_k(jnp.array([0., 2., 1.]), 2).indices
  Array([1, 2], dtype=int32)
  """
  log_p, k, temperature = _tempered(logits, k, temperature)
  if k > log_p.shape[-1]:
    raise ValueError(f"k: expected at most the number of classes, {log_p.shape[-1]}, got {k}")
  # Without the barrier XLA merges a slice of the result into top_k and sorts all V: 100 times
  # slower on CPUs.
  log_probs, indices = jax.lax.optimization_barrier(jax.lax.top_k(log_p, k))
  log_tail = _softmax.log_sum(_softmax.without(log_p, indices))
  return SparseTargets(indices, log_probs, log_tail, temperature, sampled=False)


def sample_k(
  key: jax.Array, logits: ArrayLike, k: int, *, temperature: float = 1.0
) -> SparseTargets:
  """Returns k random samples, with replacement, of softmax(logits / temperature).

  Args:
    key: a PRNG key.
    logits: logits [..., V]; a class of -inf is never sampled.
    k: number of samples, at least 1.
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
  return SparseTargets(_sample(key, log_p, k), log_probs, no_tail, temperature, sampled=True)


def _sample(key: jax.Array, log_p: jax.Array, k: int) -> jax.Array:
  """Samples k classes with replacement from log_p [..., V], int32 [..., k].

  First a block of about sqrt(V) classes, then a class in it: 2 k sqrt(V) values of Gumbel noise
  instead of k V.
  """
  classes = log_p.shape[-1]
  shape = log_p.shape[:-1]
  width = math.isqrt(classes - 1) + 1
  num_blocks = -(-classes // width)
  padding = [(0, 0)] * len(shape) + [(0, num_blocks * width - classes)]
  blocks = jnp.pad(log_p, padding, constant_values=-jnp.inf).reshape(*shape, num_blocks, width)
  block_key, class_key = jax.random.split(key)
  block = jax.random.categorical(block_key, _softmax.log_sum(blocks), shape=(k, *shape))
  block = jnp.moveaxis(block, 0, -1)
  inside = jax.random.categorical(class_key, jnp.take_along_axis(blocks, block[..., None], -2))
  return (block * width + inside).astype(jnp.int32)


def _tempered(logits: ArrayLike, k: int, temperature: float) -> tuple[jax.Array, int, float]:
  """Returns log-probabilities at the temperature, k and the temperature, checked."""
  logits = _checks.array("logits", logits, ndim=1)
  if isinstance(temperature, jax.core.Tracer):
    raise ValueError(
      "temperature: expected a number, got a traced one: it is a static field of targets"
    )
  temperature = float(_checks.positive("temperature", temperature, logits.dtype))
  k = operator.index(k)
  if k < 1:
    raise ValueError(f"k: expected at least 1, got {k}")
  return _softmax.log_softmax(logits, temperature=temperature), k, temperature
