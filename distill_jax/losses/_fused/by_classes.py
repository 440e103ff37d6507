"""The loss of all tokens, some classes at a time, whose logits are never held together.

Forward, one pass over the vocabulary collects logarithms of sums of exponentials and single logits; divergences to a
mixture, which need both normalizers first, take a second. Backward, a last pass computes the same logits again, and
from them the gradients, which go straight to their place: no array of the kernel's size is made but the gradient.
"""

import functools

import jax
import jax.numpy as jnp

from distill_jax.losses._fused import heads
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.passes import gradients, statistics
from distill_jax.losses._fused.token_values import Statistics, classified, totals


def by_classes(plan: Plan, rows: Rows, shared: Shared):
  """What `_token_values.totals` gives, differentiable in the student's hidden states, kernel and bias.

  Under `shard_map` all inputs are made to differ along the mapped axes, so that their gradients are summed over the
  axes along which they do not.
  """
  found = _read(plan, *heads.vary((rows, shared), heads.axes((rows, shared))))
  classes = shared.student.kernel.shape[-1]
  classes *= 1 if plan.axis_name is None else jax.lax.axis_size(plan.axis_name)
  return totals(plan, classified(found, rows, classes), rows, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(plan: Plan, rows: Rows, shared: Shared) -> Statistics:
  return _forward(plan, rows, shared)[0]


def _forward(plan: Plan, rows: Rows, shared: Shared) -> tuple[Statistics, tuple]:
  known = statistics(plan, rows, shared, functools.partial(_computed, rows))
  return known[0], (rows, shared, known)


def _backward(plan: Plan, held: tuple, cotangent: Statistics):
  rows, shared, known = held
  head = shared.student
  zeros = tuple(jnp.zeros_like(x) for x in (head.kernel, head.bias) if x is not None)
  read = functools.partial(_computed, rows)
  d_hidden, d_head = gradients(plan, rows, shared, read, known, cotangent, zeros, _replaced)
  return heads.cotangents(d_hidden.astype(rows.student.dtype), *d_head)


_read.defvjp(_forward, _backward)


def _computed(rows: Rows, part: Shared, start, size: int) -> Products:
  del start, size
  return heads.products(rows, part)


def _replaced(whole: jax.Array, part: jax.Array, start) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, -1)
