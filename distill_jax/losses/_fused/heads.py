"""Hidden states and heads of student and teacher, cut by tokens and by classes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import compat, reduce
from distill_jax.losses import _checks


class Head(NamedTuple):
  """A head: logits = cap(hidden @ kernel + bias), cap(z) = softcap tanh(z / softcap).

  Attributes:
    kernel: [H, V].
    bias: [V]; None: no bias.
    softcap: a scalar > 0; None: no cap.
  """

  kernel: Any
  bias: Any = None
  softcap: Any = None


class Rows(NamedTuple):
  """Arrays with one row a token; None where the loss does not use one.

  Attributes:
    student: hidden states [T, H].
    teacher: hidden states [T, G].
    indices: classes of a sparse teacher [T, K].
    log_probs: log-probabilities of these classes [T, K].
    log_tail: log of the probability of all other classes [T].
    labels: classes [T].
    weights: weights of the divergence [T].
    label_weights: weights of the cross entropy [T].
  """

  student: Any
  teacher: Any = None
  indices: Any = None
  log_probs: Any = None
  log_tail: Any = None
  labels: Any = None
  weights: Any = None
  label_weights: Any = None


class Shared(NamedTuple):
  """Arrays and hyper-parameters that all tokens share.

  Attributes:
    student: the student's `Head`.
    teacher: the teacher's `Head`; None for a sparse teacher or none.
    class_mask: classes that exist [V]; None: all.
    temperature: a scalar > 0.
    mix: teacher_weight of jensen_shannon, or alpha of the skewed divergences.
  """

  student: Head
  teacher: Any = None
  class_mask: Any = None
  temperature: Any = 1.0
  mix: Any = 0.0


class Plan(NamedTuple):
  """Decisions made before tracing.

  Attributes:
    divergence: from a dense teacher, a key of `token_values.DIVERGENCES`; or the treatment of a
      sparse teacher's tail, 'bucket', 'conditional' or 'sampled'; None: labels only.
    classes: number of classes computed at a time.
    tokens: number of tokens computed at a time, with their logits of all classes in memory; None:
      all tokens, whose logits are never in memory together.
    axis_name: the mesh axis that the vocabulary is sharded over.
    unit_temperature: the temperature is the number 1, so that one normalizer serves both terms.
  """

  divergence: str | None
  classes: int
  tokens: int | None
  axis_name: str | None
  unit_temperature: bool


class Products(NamedTuple):
  """hidden @ kernel of both sides, [T, V]; None without a teacher."""

  student: Any
  teacher: Any


def multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Returns the matrix product over one axis of each, summed in float32 or wider.

  The factors are multiplied in their common dtype.
  """
  dtype = reduce.common_dtype(a.dtype, b.dtype)
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((contract[0],), (contract[1],)), ((), ())),
    precision=_checks.HIGHEST,
    preferred_element_type=reduce.common_dtype(dtype, jnp.float32),
  )


def products(rows: Rows, shared: Shared) -> Products:
  """Returns hidden @ kernel of both sides, in the dtype of the loss's sums."""
  dtype = rows.weights.dtype
  student = multiply(rows.student, shared.student.kernel, (1, 0)).astype(dtype)
  if rows.teacher is None:
    return Products(student, None)
  return Products(student, multiply(rows.teacher, shared.teacher.kernel, (1, 0)).astype(dtype))


def hidden_gradient(dz: jax.Array, hidden: jax.Array, head: Head) -> jax.Array:
  """Returns the gradient of the hidden states from that of the products, in float32 or wider."""
  dtype = reduce.common_dtype(hidden.dtype, head.kernel.dtype)
  return multiply(dz.astype(dtype), head.kernel, (1, 1))


def head_gradient(dz: jax.Array, hidden: jax.Array, head: Head) -> tuple[jax.Array, ...]:
  """Returns the gradient of the kernel, and of the bias if there is one, in float32 or wider."""
  dtype = reduce.common_dtype(hidden.dtype, head.kernel.dtype)
  kernel = multiply(hidden, dz.astype(dtype), (0, 0))
  return (kernel,) if head.bias is None else (kernel, dz.sum(0))


def cotangents(hidden: jax.Array, kernel: jax.Array, *bias: jax.Array) -> tuple[Rows, Shared]:
  """Returns the cotangents for `custom_vjp`: these gradients, and None for all other arguments."""
  no_rows = [None] * (len(Rows._fields) - 1)
  no_shared = [None] * (len(Shared._fields) - 1)
  return Rows(hidden, *no_rows), Shared(Head(kernel, *bias), *no_shared)


def logits(raw: jax.Array, head: Head, class_mask: jax.Array | None) -> jax.Array:
  """Adds the bias to the products and caps them; -inf at classes that do not exist."""
  z = raw if head.bias is None else raw + head.bias.astype(raw.dtype)[None]
  z = z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)
  return z if class_mask is None else jnp.where(class_mask[None], z, -jnp.inf)


def columns(shared: Shared, start: Any, size: int) -> Shared:
  """Returns `shared` with `size` classes from `start` on."""

  def cut(x):
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, -1)

  def cut_head(head):
    return None if head is None else head._replace(kernel=cut(head.kernel), bias=cut(head.bias))

  return shared._replace(
    student=cut_head(shared.student),
    teacher=cut_head(shared.teacher),
    class_mask=cut(shared.class_mask),
  )


def scan_parts(total: int, size: int, body: Callable, carry: Any) -> Any:
  """Repeats `carry = body(carry, start, size)` for parts of `total`, the remainder last."""
  parts, rest = divmod(total, size)
  if parts == 1:
    carry = body(carry, 0, size)
  elif parts:
    starts = size * jnp.arange(parts)
    carry, _ = jax.lax.scan(lambda carry, start: (body(carry, start, size), None), carry, starts)
  return body(carry, parts * size, rest) if rest else carry


def axes(tree: Any) -> tuple[str, ...]:
  """Returns the mapped axes along which a tree differs, under `shard_map` with `check_vma`."""
  return tuple(sorted(set().union(*map(compat.varying_axes, jax.tree.leaves(tree)))))


def vary(tree: Any, names: tuple[str, ...]) -> Any:
  """Marks the tree as different along `names`, so that its gradient is not summed over them."""

  def leaf(x):
    missing = tuple(name for name in names if name not in compat.varying_axes(x))
    return compat.pcast_varying(x, missing) if missing else x

  return jax.tree.map(leaf, tree)
