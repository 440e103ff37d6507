"""What the losses of linear.py ask of their arguments, and what they make of them."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses import _checks
from distill_jax.losses._fused import heads
from distill_jax.losses._fused.heads import Head, Rows, Shared


def prepare(
  divergence: str | None, rows: Rows, shared: Shared, axis_name: str | None
) -> tuple[Rows, Shared, bool]:
  """Checked; all but the student's arrays constant; rows that do not count blank; whether the temperature is 1."""
  tokens, classes = rows.student.shape[0], vocabulary(shared.student.kernel, axis_name)
  dtype = _dtype(
    (rows.student, rows.teacher, rows.log_probs, rows.log_tail, shared.student, shared.teacher)
  )
  rows = rows._replace(weights=_weights("weights", rows.weights, tokens, dtype))
  if rows.labels is not None:
    labels = _checks.integers("labels", rows.labels, (tokens,))
    weights = _weights(
      "label_weights" if divergence else "weights", rows.label_weights, tokens, dtype
    )
    rows = rows._replace(labels=labels, label_weights=weights)
    _check_classes("labels", labels, weights, classes)
  if rows.kept is not None:
    _check_classes("indices", rows.kept, rows.weights, classes)
  mask, width = shared.class_mask, shared.student.kernel.shape[1:]
  if mask is not None and jnp.shape(mask) != width:
    raise ValueError(f"class_mask {jnp.shape(mask)} must have one value a class, {width}")
  mask, t = (
    _checks.mask("class_mask", mask, width),
    _checks.positive("temperature", shared.temperature, dtype),
  )
  shared = shared._replace(
    class_mask=mask, temperature=jnp.asarray(t, dtype), mix=jnp.asarray(shared.mix, dtype)
  )
  rows, shared = _constant(rows, shared)
  return _blank(rows), shared, isinstance(t, float) and t == 1


def side(name: str, hidden, kernel, bias, softcap) -> tuple[jax.Array, Head]:
  """Hidden states and head, checked, in the dtypes they came in; `name` begins the names in messages."""
  hidden, kernel = _floats(f"{name}hidden", hidden, 2), _floats(f"{name}kernel", kernel, 2)
  if hidden.shape[1] != kernel.shape[0]:
    raise ValueError(
      f"{name}hidden {hidden.shape} does not fit {name}kernel {kernel.shape}: expected [T, H], [H, V]"
    )
  if bias is not None:
    bias = _floats(f"{name}bias", bias, 1)
    if bias.shape != kernel.shape[1:]:
      raise ValueError(
        f"{name}bias {bias.shape} does not fit {name}kernel {kernel.shape}: expected [V], [H, V]"
      )
  if softcap is not None:
    softcap = _checks.positive(f"{name}softcap", softcap, jnp.result_type(float))
  return hidden, Head(kernel, bias, softcap)


def _floats(name: str, value, ndim: int) -> jax.Array:
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise ValueError(f"{name} must be floating-point numbers, got {value.dtype}")
  if value.ndim != ndim or 0 in value.shape:
    raise ValueError(f"{name} {value.shape} must have {ndim} axes, none of them empty")
  return value


def vocabulary(kernel: jax.Array, axis_name: str | None) -> int:
  """Of the whole vocabulary."""
  if axis_name is None:
    return kernel.shape[1]
  if axis_name not in heads.axes(kernel):
    raise ValueError(
      f"axis_name={axis_name!r}, but the kernel does not differ along it: call under shard_map with check_vma=True and "
      f"a kernel of P(None, {axis_name!r})"
    )
  return kernel.shape[1] * jax.lax.axis_size(axis_name)


def _weights(name: str, weights, tokens: int, dtype) -> jax.Array:
  if weights is None:
    return jnp.full(tokens, 1 / tokens, dtype)
  if jnp.shape(weights) != (tokens,):
    raise ValueError(f"{name} {jnp.shape(weights)} must have one value a token, ({tokens},)")
  return jnp.asarray(weights, dtype)


def _check_classes(name: str, indices, weights, classes: int) -> None:
  """Raises where a token that counts has an index outside the vocabulary, unless under jit."""
  if isinstance(indices, jax.core.Tracer) or isinstance(weights, jax.core.Tracer):
    return
  indices, weights = np.asarray(indices), np.asarray(weights)
  wrong = ((indices < 0) | (indices >= classes)) & (weights != 0).reshape(
    -1, *[1] * (indices.ndim - 1)
  )
  if wrong.any():
    row = np.argwhere(wrong)[0][0]
    raise ValueError(f"{name} must be in [0, {classes - 1}], got {indices[wrong][0]} in row {row}")


def _dtype(arrays):
  return jnp.result_type(
    jnp.float32, *(x.dtype for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array))
  )


def _constant(rows: Rows, shared: Shared) -> tuple[Rows, Shared]:
  """All but the student's hidden states, kernel and bias."""
  still_rows, still = jax.lax.stop_gradient((rows, shared))
  own = shared.student._replace(softcap=still.student.softcap)
  return still_rows._replace(student=rows.student), still._replace(student=own)


def _blank(rows: Rows) -> Rows:
  """Rows of weight 0 as zeros: 0 times NaN would be NaN in the gradient of the kernel."""
  diverges = labeled = rows.weights != 0
  if rows.labels is not None:
    labeled = rows.label_weights != 0
  if rows.teacher is None and rows.kept is None:
    diverges = labeled

  def keep(where, x):
    return (
      None if x is None else jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
    )

  teacher = {
    name: keep(diverges, getattr(rows, name))
    for name in ("teacher", "kept", "log_probs", "log_tail")
  }
  labels, either = (
    keep(labeled, rows.labels),
    diverges if rows.labels is None else diverges | labeled,
  )
  return rows._replace(student=keep(either, rows.student), labels=labels, **teacher)
