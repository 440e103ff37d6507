"""The loss some tokens at a time, all classes of them together, with gradients computed on the way forward."""

import functools

import jax
import jax.numpy as jnp

from distill_jax.losses import _heads
from distill_jax.losses._heads import Head, Plan, Rows, Shared
from distill_jax.losses._token_values import totals, whole

PART = 8192  # classes of the kernel's gradient that are added up at a time


def by_tokens(plan: Plan, rows: Rows, shared: Shared) -> tuple[jax.Array, tuple]:
  """What `_token_values.totals` gives, differentiable in the student's hidden states, kernel and bias."""
  return _sum(plan, *_heads.vary((rows, shared), _heads.axes((rows, shared))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(plan: Plan, rows: Rows, shared: Shared):
  def add(carry, chunk):
    raw = _heads.raw_logits(chunk.student, shared.student)
    return jax.tree.map(jnp.add, carry, totals(plan, whole(plan, raw, chunk, shared), chunk, shared)), None

  zero = _heads.vary(jnp.zeros((), rows.weights.dtype), _heads.axes((rows, shared)))
  return _over_tokens(plan, rows, add, (zero, (zero, zero)))[0]


def _forward(plan: Plan, rows: Rows, shared: Shared):
  head = shared.student

  def add(carry, chunk):
    raw = _heads.raw_logits(chunk.student, head)
    loss, dz = jax.value_and_grad(
      lambda raw: totals(plan, whole(plan, raw, chunk, shared), chunk, shared), has_aux=True
    )(raw)
    losses, d_head = carry
    d_hidden = _heads.hidden_gradient(dz, chunk.student, head)
    new = jax.tree.map(jnp.add, losses, loss), _added(d_head, dz, chunk.student, head)
    return new, d_hidden.astype(chunk.student.dtype)

  dtype = rows.weights.dtype
  zero = jnp.zeros((), dtype)
  d_head = [jnp.zeros(x.shape, dtype) for x in (head.kernel, head.bias) if x is not None]
  carry = _heads.vary(((zero, (zero, zero)), d_head), _heads.axes((rows, shared)))
  (loss, d_head), d_hidden = _over_tokens(plan, rows, add, carry)
  d_hidden = d_hidden.swapaxes(0, 1).reshape(-1, rows.student.shape[-1])[: rows.student.shape[0]]
  like = [jnp.zeros((), x.dtype) for x in (rows.student, head.kernel, head.bias) if x is not None]
  return loss, ((d_hidden, *d_head), like)


def _added(d_head, dz: jax.Array, hidden: jax.Array, head: Head):
  """The head's gradient and that of one chunk of tokens: no second array of the kernel's size."""

  def body(d_head, start, size):
    parts = _heads.head_gradient(jax.lax.dynamic_slice_in_dim(dz, start, size, 1), hidden, head)
    sums = [
      jax.lax.dynamic_slice_in_dim(old, start, size, -1) + part
      for old, part in zip(d_head, parts, strict=True)
    ]
    return [
      jax.lax.dynamic_update_slice_in_dim(old, new, start, -1) for old, new in zip(d_head, sums, strict=True)
    ]

  classes = dz.shape[1]
  return _heads.in_parts(classes, min(PART, classes), body, d_head)


def _backward(plan: Plan, held: tuple, cotangent):
  del plan
  own, like = held
  scale = cotangent[0]  # the parts beside the sum are there to be read
  return _heads.cotangents(*((scale * x).astype(final.dtype) for x, final in zip(own, like, strict=True)))


_sum.defvjp(_forward, _backward)


def _over_tokens(plan: Plan, rows: Rows, add, carry):
  """A scan over chunks of rows, the last one filled up with rows of weight 0.

  A chunk takes every n-th token, so that tokens spread over devices stay there and every device has work.
  """
  tokens = rows.student.shape[0]
  chunks = -(-tokens // plan.size)

  def split(x):
    x = jnp.pad(x, [(0, chunks * plan.size - tokens)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(plan.size, chunks, *x.shape[1:])

  parts = jax.tree.map(split, rows)

  def step(carry, i):
    return add(carry, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), parts))

  return jax.lax.scan(step, carry, jnp.arange(chunks))
