"""Checks the arguments of the `linear_*` losses and prepares their arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from distill_jax import reduce
from distill_jax.losses import _checks
from distill_jax.losses._fused import heads
from distill_jax.losses._fused.heads import Head, Rows, Shared

HeadLike = ArrayLike | tuple[Any, ...]
"""A kernel [H, V], or (kernel [H, V], bias [V] or None, softcap > 0 or None)."""


def prepare(
  divergence: str | None, rows: Rows, shared: Shared, axis_name: str | None
) -> tuple[Rows, Shared, bool]:
  """Returns checked rows and shared arrays, and whether the temperature is the number 1.

  All but the student's arrays become constants, and rows that do not count become 0.
  """
  num_tokens = rows.student.shape[0]
  classes = num_classes(shared.student.kernel, axis_name)
  inputs = (rows.student, rows.teacher, rows.log_probs, rows.log_tail)
  dtype = _sum_dtype((inputs, shared.student, shared.teacher))
  log_probs, log_tail = (
    None if x is None else x.astype(dtype) for x in (rows.log_probs, rows.log_tail)
  )
  weights = _token_weights("weights", rows.weights, num_tokens, dtype)
  rows = rows._replace(log_probs=log_probs, log_tail=log_tail, weights=weights)
  if rows.labels is not None:
    name = "label_weights" if divergence else "weights"
    labels = _checks.integers("labels", rows.labels, (num_tokens,))
    weights = _token_weights(name, rows.label_weights, num_tokens, dtype)
    rows = rows._replace(labels=labels, label_weights=weights)
    _check_classes("labels", labels, weights, classes)
  if rows.indices is not None:
    _check_classes("indices", rows.indices, rows.weights, classes)
  temperature = _checks.positive("temperature", shared.temperature, dtype)
  shared = shared._replace(
    class_mask=_class_mask(shared.class_mask, shared.student.kernel.shape[1:]),
    temperature=jnp.asarray(temperature, dtype),
    mix=jnp.asarray(shared.mix, dtype),
  )
  rows, shared = _stop_gradients(rows, shared)
  return _blank(rows), shared, isinstance(temperature, float) and temperature == 1


def side(prefix: str, hidden: ArrayLike, head: HeadLike) -> tuple[jax.Array, Head]:
  """Returns hidden states and head, checked, in their dtypes; `prefix` begins names in messages."""
  hidden = _floats(f"{prefix}hidden", hidden, 2)
  kernel, bias, softcap = _parts(f"{prefix}head", head)
  kernel = _floats(f"{prefix}head: kernel", kernel, 2)
  if hidden.shape[1] != kernel.shape[0]:
    raise ValueError(
      f"{prefix}head: expected a kernel [H, V] for {prefix}hidden [T, H] {hidden.shape}, got "
      f"{kernel.shape}"
    )
  if bias is not None:
    bias = _floats(f"{prefix}head: bias", bias, 1)
    if bias.shape != kernel.shape[1:]:
      raise ValueError(
        f"{prefix}head: expected a bias [V] for the kernel [H, V] {kernel.shape}, got {bias.shape}"
      )
  if softcap is not None:
    softcap = _checks.positive(f"{prefix}head: softcap", softcap, jnp.result_type(float))
  return hidden, Head(kernel, bias, softcap)


def num_classes(kernel: jax.Array, axis_name: str | None) -> int:
  """Returns the size of the full vocabulary, over all devices of `axis_name`."""
  if axis_name is None:
    return kernel.shape[1]
  if axis_name not in heads.axes(kernel):
    raise ValueError(
      f"axis_name: expected a mesh axis that the kernel is sharded over, got {axis_name!r}: "
      f"call under shard_map with check_vma=True and a kernel of P(None, {axis_name!r})"
    )
  return kernel.shape[1] * jax.lax.axis_size(axis_name)


def _parts(name: str, head: HeadLike) -> tuple[Any, Any, Any]:
  """Returns (kernel, bias, softcap) of a kernel or of such a tuple."""
  if not isinstance(head, tuple | list):
    return head, None, None
  if len(head) != 3:
    raise ValueError(f"{name}: expected a kernel or (kernel, bias, softcap), got {len(head)} parts")
  return head[0], head[1], head[2]


def _floats(name: str, value: ArrayLike, ndim: int) -> jax.Array:
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise ValueError(f"{name}: expected floating-point values, got {value.dtype}")
  if value.ndim != ndim or 0 in value.shape:
    raise ValueError(f"{name}: expected {ndim} axes, none of them empty, got {value.shape}")
  return value


def _token_weights(
  name: str, weights: ArrayLike | None, num_tokens: int, dtype: DTypeLike
) -> jax.Array:
  if weights is None:
    return jnp.full(num_tokens, 1 / num_tokens, dtype)
  if jnp.shape(weights) != (num_tokens,):
    raise ValueError(
      f"{name}: expected one value a token, ({num_tokens},), got {jnp.shape(weights)}"
    )
  return jnp.asarray(weights, dtype)


def _class_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
  if mask is not None and jnp.shape(mask) != shape:
    raise ValueError(f"class_mask: expected one value a class, {shape}, got {jnp.shape(mask)}")
  return _checks.mask("class_mask", mask, shape)


def _check_classes(name: str, indices: jax.Array, weights: jax.Array, classes: int) -> None:
  """Raises where a token that counts has an index outside the vocabulary, unless under jit."""
  if isinstance(indices, jax.core.Tracer) or isinstance(weights, jax.core.Tracer):
    return
  values = np.asarray(indices)
  counts = np.asarray(weights).reshape(-1, *[1] * (values.ndim - 1)) != 0
  outside = ((values < 0) | (values >= classes)) & counts
  if outside.any():
    row = np.argwhere(outside)[0][0]
    raise ValueError(
      f"{name}: expected classes in [0, {classes - 1}], got {values[outside][0]} in row {row}"
    )


def _sum_dtype(arrays: Any) -> jnp.dtype:
  """Returns float32, or the widest dtype of the arrays."""
  dtypes = (x.dtype for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array))
  return reduce.common_dtype(jnp.float32, *dtypes)


def _stop_gradients(rows: Rows, shared: Shared) -> tuple[Rows, Shared]:
  """Makes all but the student's hidden states, kernel and bias constants."""
  still_rows, still = jax.lax.stop_gradient((rows, shared))
  student = shared.student._replace(softcap=still.student.softcap)
  return still_rows._replace(student=rows.student), still._replace(student=student)


def _blank(rows: Rows) -> Rows:
  """Sets rows of weight 0 to zeros: 0 times NaN would be NaN in the gradient of the kernel."""
  has_teacher = rows.teacher is not None or rows.indices is not None
  labeled = None if rows.labels is None else rows.label_weights != 0
  diverges = rows.weights != 0 if has_teacher else labeled
  counts = diverges if labeled is None else diverges | labeled

  def blank(where, x):
    if x is None:
      return None
    return jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))

  return rows._replace(
    student=blank(counts, rows.student),
    teacher=blank(diverges, rows.teacher),
    indices=blank(diverges, rows.indices),
    log_probs=blank(diverges, rows.log_probs),
    log_tail=blank(diverges, rows.log_tail),
    labels=blank(labeled, rows.labels),
  )
