"""Gradients of a batch: at once, or accumulated over microbatches with the full batch's
denominators.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.train.loss_fn import check_metrics, count_terms
from distill_jax.train.options import StepOptions
from distill_jax.types import Batch, Outputs


class Sums(NamedTuple):
  """What adds up over microbatches.

  Attributes:
    loss: float32 scalar.
    terms: (sum, count) of each term, unweighted.
    metrics: (sum, count) of `StepOptions.metrics`.
    grads: of the parameters.
  """

  loss: jax.Array
  terms: dict[str, reduce.Pair]
  metrics: dict[str, reduce.Pair]
  grads: Any


def full_gradients(
  loss_of_outputs: Callable, teach: Callable[[Batch], Outputs], options: StepOptions
) -> Callable[..., tuple[Sums, Any]]:
  """Returns `(params, model_state, batch, *, step, keys) -> (Sums, model_state)` for a batch as it
  is.
  """
  differentiate = _make_differentiate(loss_of_outputs, options)

  def gradients(params, model_state, batch: Batch, *, step, keys):
    return differentiate(params, model_state, teach(batch), batch, step=step, keys=keys)

  return gradients


def accumulated_gradients(
  loss_of_outputs: Callable, teach: Callable[[Batch], Outputs], options: StepOptions
) -> Callable[..., tuple[Sums, Any]]:
  """Returns the same function, which computes `options.microbatches` parts of the batch one after
  the other.
  """
  differentiate = _make_differentiate(loss_of_outputs, options)
  count = options.microbatches

  def gradients(params, model_state, batch: Batch, *, step, keys):
    rows = jax.tree.map(lambda x: interleave(x, count), dict(batch))
    parts = rows, tuple(jax.random.split(key, count) for key in keys)

    def count_part(carry, part):
      # Only the masks' sums are used: the compiler removes what they do not need of this forward
      # pass.
      batch, keys = part
      _, aux = loss_of_outputs(params, model_state, teach(batch), batch, step=step, keys=keys)
      return count_terms(aux.terms), carry

    denominators, _ = _sum_over(count_part, (), parts)

    def differentiate_part(model_state, part):
      batch, keys = part
      return differentiate(
        params, model_state, teach(batch), batch, step=step, keys=keys, denominators=denominators
      )

    return _sum_over(differentiate_part, model_state, parts)

  return gradients


def _make_differentiate(loss_of_outputs: Callable, options: StepOptions) -> Callable:
  value_and_grad = jax.value_and_grad(loss_of_outputs, has_aux=True)

  def differentiate(params, model_state, teacher_outputs, batch, **context):
    (loss, aux), grads = value_and_grad(params, model_state, teacher_outputs, batch, **context)
    metrics = {} if options.metrics is None else options.metrics(aux.outputs, batch)
    check_metrics(metrics, aux.terms)
    return Sums(loss, aux.terms, dict(metrics), grads), aux.model_state

  return differentiate


def interleave(x: jax.Array, parts: int) -> jax.Array:
  """Returns [parts, B / parts, ...] of [B, ...]: every parts-th row, so that rows stay on their
  devices.
  """
  return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _sum_over(body: Callable, carry: Any, parts: Any) -> tuple[Any, Any]:
  """Sums `body(carry, part) -> (values, carry)` over the leading axis of `parts`."""
  total, carry = body(carry, jax.tree.map(lambda x: x[0], parts))

  def add(state, part):
    total, carry = state
    values, carry = body(carry, part)
    return (jax.tree.map(jnp.add, total, values), carry), None

  # Convolutions inside a loop are several times slower on CPU (their weight gradient above all).
  unroll = True if jax.default_backend() == "cpu" else 1
  rest = jax.tree.map(lambda x: x[1:], parts)
  return jax.lax.scan(add, (total, carry), rest, unroll=unroll)[0]
