"""Computes the loss of all tokens, some classes at a time: the logits are never in memory together.

Forward, one pass over the vocabulary collects log sum exps and single logits. Divergences to a
mixture, which need both normalizers first, take a second pass. Backward, a last pass computes the
same logits again and from them the gradients, which are written in place: the only array of the
kernel's size is its gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses._fused import heads
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.passes import gradients, statistics
from distill_jax.losses._fused.token_values import Statistics, nan_at_invalid, totals


def by_classes(plan: Plan, rows: Rows, shared: Shared) -> tuple[jax.Array, tuple]:
  """Returns `token_values.totals`, differentiable in the student's hidden states, kernel and bias.

  Under `shard_map` all inputs are made to differ along the mapped axes, so that their gradients are
  summed over the axes along which they do not differ.
  """
  all_statistics = _read(plan, *heads.vary((rows, shared), heads.axes((rows, shared))))
  classes = shared.student.kernel.shape[-1]
  if plan.axis_name is not None:
    classes *= jax.lax.axis_size(plan.axis_name)
  return totals(plan, nan_at_invalid(all_statistics, rows, classes), rows, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(plan: Plan, rows: Rows, shared: Shared) -> Statistics:
  return _forward(plan, rows, shared)[0]


def _forward(plan: Plan, rows: Rows, shared: Shared) -> tuple[Statistics, tuple]:
  results = statistics(plan, rows, shared, functools.partial(_compute, rows))
  return results[0], (rows, shared, results)


def _backward(plan: Plan, residuals: tuple, cotangent: Statistics) -> tuple[Rows, Shared]:
  rows, shared, results = residuals
  head = shared.student
  zeros = tuple(jnp.zeros_like(x) for x in (head.kernel, head.bias) if x is not None)
  read = functools.partial(_compute, rows)
  d_hidden, d_head = gradients(plan, rows, shared, read, results, cotangent, zeros, _write)
  return heads.cotangents(d_hidden.astype(rows.student.dtype), *d_head)


_read.defvjp(_forward, _backward)


def _compute(rows: Rows, part: Shared, start: Any, size: int) -> Products:
  del start, size
  return heads.products(rows, part)


def _write(full: jax.Array, part: jax.Array, start: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(full, part.astype(full.dtype), start, -1)
