"""Two sides' hidden states and heads, cut by tokens and by classes: what the losses of linear.py compute on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks


class Head(NamedTuple):
  """logits = cap(hidden @ kernel + bias); [H, V], [V] or None, a scalar or None."""

  kernel: Any
  bias: Any
  softcap: Any


class Rows(NamedTuple):
  """Arrays with one row a token, [T, ...]; None where one is not used."""

  student: Any  # [T, H]
  teacher: Any = None  # [T, G]
  kept: Any = None  # the teacher's classes [T, K]
  log_probs: Any = None  # of these [T, K]
  log_tail: Any = None  # [T]
  labels: Any = None  # [T]
  weights: Any = None  # of the divergence [T]
  label_weights: Any = None  # of the cross entropy [T]


class Shared(NamedTuple):
  """What all tokens share."""

  student: Head
  teacher: Any = None  # a Head
  class_mask: Any = None  # [V]
  temperature: Any = 1.0
  mix: Any = 0.0  # the teacher's weight, or alpha


class Plan(NamedTuple):
  """What is decided before tracing.

  Attributes:
    divergence: of a dense teacher, a key of `_token_values.DIVERGENCES`; or what stands for a sparse teacher's tail,
      'bucket', 'conditional' or 'generated'; None: labels alone.
    classes: how many are computed at a time.
    tokens: how many are computed at a time, all classes of them; None: all, and their logits are not held.
    axis_name: the mesh axis that the vocabulary is spread over.
    one_temperature: the temperature is the number 1, so that one normalizer serves both terms.
  """

  divergence: str | None
  classes: int
  tokens: int | None
  axis_name: str | None
  one_temperature: bool


def multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """The matrix product over one axis of each, in their common dtype, added up in float32 or wider."""
  dtype = jnp.promote_types(a.dtype, b.dtype)
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((contract[0],), (contract[1],)), ((), ())),
    precision=_checks.HIGHEST,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


class Products(NamedTuple):
  """hidden @ kernel of both sides, [T, V]; None where there is no teacher."""

  student: Any
  teacher: Any


def products(rows: Rows, shared: Shared) -> Products:
  """In the dtype of all that the loss adds up, the widest of its inputs'."""

  def product(hidden, head):
    return (
      None if hidden is None else multiply(hidden, head.kernel, (1, 0)).astype(rows.weights.dtype)
    )

  return Products(product(rows.student, shared.student), product(rows.teacher, shared.teacher))


def hidden_gradient(dz: jax.Array, hidden: jax.Array, head: Head) -> jax.Array:
  """Of the hidden states, from that of the products [T, V]; float32 or wider, like the next."""
  dtype = jnp.promote_types(hidden.dtype, head.kernel.dtype)
  return multiply(dz.astype(dtype), head.kernel, (1, 1))


def head_gradient(dz: jax.Array, hidden: jax.Array, head: Head) -> tuple[jax.Array, ...]:
  """Of the kernel, and of the bias where there is one."""
  dtype = jnp.promote_types(hidden.dtype, head.kernel.dtype)
  return multiply(hidden, dz.astype(dtype), (0, 0)), *(() if head.bias is None else (dz.sum(0),))


def cotangents(hidden: jax.Array, kernel: jax.Array, *bias: jax.Array) -> tuple[Rows, Shared]:
  """What `custom_vjp` wants: these gradients, and none for anything else."""
  head = Head(kernel, bias[0] if bias else None, None)
  return Rows(hidden, *[None] * (len(Rows._fields) - 1)), Shared(
    head, *[None] * (len(Shared._fields) - 1)
  )


def logits(raw: jax.Array, head: Head, class_mask: jax.Array | None) -> jax.Array:
  """With the bias, the cap, and -inf at classes that do not exist."""
  z = raw if head.bias is None else raw + head.bias.astype(raw.dtype)
  z = z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)
  return z if class_mask is None else jnp.where(class_mask, z, -jnp.inf)


def columns(shared: Shared, start, size: int) -> Shared:
  """Of `size` classes from `start` on."""

  def cut(x):
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, -1)

  def head(side):
    return None if side is None else side._replace(kernel=cut(side.kernel), bias=cut(side.bias))

  return shared._replace(
    student=head(shared.student), teacher=head(shared.teacher), class_mask=cut(shared.class_mask)
  )


def in_parts(total: int, size: int, body: Callable, carry):
  """`carry = body(carry, start, size)` for parts of `total`, the remainder last."""
  parts, rest = divmod(total, size)
  if parts == 1:
    carry = body(carry, 0, size)
  elif parts:
    starts = size * jnp.arange(parts)
    carry, _ = jax.lax.scan(lambda carry, start: (body(carry, start, size), None), carry, starts)
  return body(carry, parts * size, rest) if rest else carry


def axes(tree) -> tuple[str, ...]:
  """The mapped axes that a tree differs along, under `shard_map` with `check_vma`."""
  return tuple(sorted(set().union(*(_varying(x) for x in jax.tree.leaves(tree)))))


def vary(tree, names: tuple[str, ...]):
  """The tree as one that differs along `names`: what is added up over them stays theirs in the gradient."""

  def leaf(x):
    missing = tuple(name for name in names if name not in _varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(leaf, tree)


def _varying(x) -> frozenset[str]:
  return jax.typeof(x).manual_axis_type.varying
