"""Computes the loss some tokens at a time, with their gradients on the way forward.

Their logits are computed once.

What follows the logits is computed some classes at a time, so that no other array is as large. The
scale of the loss is multiplied in last, so loss scaling does not save gradients that underflow in
float16 hidden states.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses._fused import heads
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.passes import gradients, statistics
from distill_jax.losses._fused.token_values import Statistics, nan_at_invalid, totals


def by_tokens(plan: Plan, rows: Rows, shared: Shared) -> tuple[jax.Array, tuple]:
  """Returns `token_values.totals`, differentiable in the student's arrays."""
  return _sum(plan, *heads.vary((rows, shared), heads.axes((rows, shared))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(plan: Plan, rows: Rows, shared: Shared) -> tuple[jax.Array, tuple]:
  def add(losses, chunk):
    read = functools.partial(_slice, heads.products(chunk, shared))
    chunk_statistics, _ = statistics(plan, chunk, shared, read)
    loss = _totals(plan, chunk, shared, chunk_statistics)
    return jax.tree.map(jnp.add, losses, loss), None

  return _scan_tokens(plan, rows, add, _zero_totals(rows, shared))[0]


def _forward(plan: Plan, rows: Rows, shared: Shared) -> tuple[tuple, tuple]:
  head = shared.student
  parts = [x for x in (head.kernel, head.bias) if x is not None]

  def add(carry, chunk):
    losses, d_head = carry
    read = functools.partial(_slice, heads.products(chunk, shared))
    results = statistics(plan, chunk, shared, read)
    chunk_totals = functools.partial(_totals, plan, chunk, shared)
    loss, cotangent = jax.value_and_grad(chunk_totals, has_aux=True)(results[0])
    d_hidden, d_head = gradients(plan, chunk, shared, read, results, cotangent, d_head, _add)
    return (jax.tree.map(jnp.add, losses, loss), d_head), d_hidden.astype(chunk.student.dtype)

  d_head = tuple(jnp.zeros(x.shape, rows.weights.dtype) for x in parts)
  carry = _zero_totals(rows, shared), heads.vary(d_head, heads.axes((rows, shared)))
  (loss, d_head), d_hidden = _scan_tokens(plan, rows, add, carry)
  num_tokens, width = rows.student.shape
  d_hidden = d_hidden.swapaxes(0, 1).reshape(-1, width)[:num_tokens]
  like = [jnp.zeros((), x.dtype) for x in (rows.student, *parts)]
  return loss, ((d_hidden, *d_head), like)


def _backward(plan: Plan, residuals: tuple, cotangent: tuple) -> tuple[Rows, Shared]:
  del plan
  student_gradients, like = residuals
  scale = cotangent[0]  # The other entries, the parts of the sum, are constants to log.
  pairs = zip(student_gradients, like, strict=True)
  return heads.cotangents(
    *((scale * x.astype(scale.dtype)).astype(final.dtype) for x, final in pairs)
  )


_sum.defvjp(_forward, _backward)


def _totals(plan: Plan, rows: Rows, shared: Shared, chunk_statistics: Statistics):
  classes = shared.student.kernel.shape[-1]
  return totals(plan, nan_at_invalid(chunk_statistics, rows, classes), rows, shared)


def _zero_totals(rows: Rows, shared: Shared) -> tuple[jax.Array, tuple]:
  """Returns `totals` of no tokens."""
  zero = jnp.zeros((), rows.weights.dtype)
  return heads.vary((zero, (zero, zero)), heads.axes((rows, shared)))


def _slice(products: Products, part: Shared, start: Any, size: int) -> Products:
  del part
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, -1), products)


def _add(full: jax.Array, part: jax.Array, start: Any) -> jax.Array:
  old = jax.lax.dynamic_slice_in_dim(full, start, part.shape[-1], -1)
  return jax.lax.dynamic_update_slice_in_dim(full, old + part, start, -1)


def _scan_tokens(plan: Plan, rows: Rows, add: Callable, carry: Any) -> tuple[Any, Any]:
  """Scans over chunks of rows; the last chunk is padded with rows of weight 0.

  A chunk takes every n-th token, so that tokens sharded over devices stay there and every device
  has work.
  """
  assert plan.tokens is not None
  chunk_size = plan.tokens
  num_tokens = rows.student.shape[0]
  num_chunks = -(-num_tokens // chunk_size)
  padding = num_chunks * chunk_size - num_tokens

  def split(x):
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(chunk_size, num_chunks, *x.shape[1:])

  chunks = jax.tree.map(split, rows)

  def step(carry, i):
    def chunk(x):
      return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    return add(carry, jax.tree.map(chunk, chunks))

  return jax.lax.scan(step, carry, jnp.arange(num_chunks))
