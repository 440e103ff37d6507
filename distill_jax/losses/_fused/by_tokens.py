"""The loss some tokens at a time, whose logits are computed once and held, with gradients on the way forward.

What follows the logits goes some classes at a time, so that nothing else is as large. A factor of the loss comes in
last: it does not save gradients that are too small for hidden states in float16.
"""

import functools

import jax
import jax.numpy as jnp

from distill_jax.losses._fused import heads
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.passes import gradients, statistics
from distill_jax.losses._fused.token_values import Statistics, classified, totals


def by_tokens(plan: Plan, rows: Rows, shared: Shared) -> tuple[jax.Array, tuple]:
  """What `_token_values.totals` gives, differentiable in the student's hidden states, kernel and bias."""
  return _sum(plan, *heads.vary((rows, shared), heads.axes((rows, shared))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(plan: Plan, rows: Rows, shared: Shared):
  def add(loss, chunk):
    found, _ = statistics(
      plan, chunk, shared, functools.partial(_cut, heads.products(chunk, shared))
    )
    return jax.tree.map(jnp.add, loss, _totals(plan, chunk, shared, found)), None

  return _over_tokens(plan, rows, add, _nothing(rows, shared))[0]


def _forward(plan: Plan, rows: Rows, shared: Shared):
  head = shared.student

  def add(carry, chunk):
    losses, d_head = carry
    read = functools.partial(_cut, heads.products(chunk, shared))
    known = statistics(plan, chunk, shared, read)
    loss, cotangent = jax.value_and_grad(
      functools.partial(_totals, plan, chunk, shared), has_aux=True
    )(known[0])
    d_hidden, d_head = gradients(plan, chunk, shared, read, known, cotangent, d_head, _added)
    return (jax.tree.map(jnp.add, losses, loss), d_head), d_hidden.astype(chunk.student.dtype)

  d_head = tuple(
    jnp.zeros(x.shape, rows.weights.dtype) for x in (head.kernel, head.bias) if x is not None
  )
  carry = _nothing(rows, shared), heads.vary(d_head, heads.axes((rows, shared)))
  (loss, d_head), d_hidden = _over_tokens(plan, rows, add, carry)
  d_hidden = d_hidden.swapaxes(0, 1).reshape(-1, rows.student.shape[-1])[: rows.student.shape[0]]
  like = [jnp.zeros((), x.dtype) for x in (rows.student, head.kernel, head.bias) if x is not None]
  return loss, ((d_hidden, *d_head), like)


def _backward(plan: Plan, held: tuple, cotangent):
  del plan
  own, like = held
  scale = cotangent[0]  # the parts beside the sum are there to be read
  return heads.cotangents(
    *((scale * x).astype(final.dtype) for x, final in zip(own, like, strict=True))
  )


_sum.defvjp(_forward, _backward)


def _totals(plan: Plan, rows: Rows, shared: Shared, found: Statistics):
  return totals(plan, classified(found, rows, shared.student.kernel.shape[-1]), rows, shared)


def _nothing(rows: Rows, shared: Shared):
  """`totals` of no tokens."""
  zero = jnp.zeros((), rows.weights.dtype)
  return heads.vary((zero, (zero, zero)), heads.axes((rows, shared)))


def _cut(held: Products, part: Shared, start, size: int) -> Products:
  del part
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, -1), held)


def _added(whole: jax.Array, part: jax.Array, start) -> jax.Array:
  old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[-1], -1)
  return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, -1)


def _over_tokens(plan: Plan, rows: Rows, add, carry):
  """A scan over chunks of rows, the last one filled up with rows of weight 0.

  A chunk takes every n-th token, so that tokens spread over devices stay there and every device has work.
  """
  tokens = rows.student.shape[0]
  chunks = -(-tokens // plan.tokens)

  def split(x):
    x = jnp.pad(x, [(0, chunks * plan.tokens - tokens)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(plan.tokens, chunks, *x.shape[1:])

  parts = jax.tree.map(split, rows)

  def step(carry, i):
    return add(
      carry, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), parts)
    )

  return jax.lax.scan(step, carry, jnp.arange(chunks))
