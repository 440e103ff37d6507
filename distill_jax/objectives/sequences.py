"""Compares feature sequences of different lengths, such as those of networks with other strides."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.objectives.calls import batch_entry, outputs_of, valid_rows
from distill_jax.objectives.feature_comparisons import features
from distill_jax.objectives.layers import each_token
from distill_jax.objectives.loss_checks import check_loss
from distill_jax.objectives.terms import Term
from distill_jax.types import Batch, Outputs


def sequences(
  student: str,
  teacher: str,
  loss: Callable[..., jax.Array],
  *,
  lengths: str | tuple[str, str] | None,
  project: bool = True,
  **hyperparameters: Any,
) -> Term:
  """Compares sequences [B, T, C], position by position, after the student's is interpolated.

      sequences("block2", "block3", losses.hint, lengths=("frames", "teacher_frames"))

  In each row the student's valid positions are interpolated linearly to as many positions as the
  teacher's are (antialiased where they become fewer, as `jax.image.resize` does). Padding is last:
  it is neither read nor compared. The mean is over the teacher's valid positions of the global
  batch.

  Args:
    student, teacher: names of outputs [B, S, C] and [B, T, D].
    loss: `(student [N, D], teacher [N, D], **hyperparameters) -> [N]`, N positions; or a scalar
      that relates them, with an argument `where` for those that count.
    lengths: names of the entries that tell the student's and the teacher's valid positions; one
      name for both: outputs of the network, or else entries of the batch. They are int [B], the
      number of valid positions, or [B, S] and [B, T], bool or negative for padding. None: all
      positions are valid.
    project: where the channels differ, learn a linear map, as `features` does.
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have; in init, outputs that are no
      sequences of as many rows; in apply, lengths that are missing or of another shape.

  >>> from distill_jax import losses, objectives
  >>> term = objectives.sequences("x", "x", losses.hint, lengths="length")
  >>> student = {"x": jnp.array([[[1.0], [3.0], [9.0]]]), "length": jnp.array([2])}
  >>> teacher = {"x": jnp.array([[[1.0], [2.0], [2.0], [3.0]]]), "length": jnp.array([4])}
  >>> (values, _), _ = term.apply({}, {}, student, teacher, {}, step=0, key=None)
  >>> values  # of 1, 1.5, 2.5 and 3
  Array([[0.  , 0.25, 0.25, 0.  ]], dtype=float32)
  """
  check_loss(loss)
  if isinstance(lengths, str):
    lengths = (lengths, lengths)
  if lengths is not None and len(lengths) != 2:
    raise ValueError(
      f"lengths: expected names of the student's and the teacher's, got {lengths!r}: write one or "
      "two"
    )
  s_lengths, t_lengths = lengths or (None, None)
  comparison = features(student, teacher, each_token(loss), project=project, **hyperparameters)

  def init(key, s_outputs, t_outputs):
    s = outputs_of(s_outputs, student, "student")
    t = outputs_of(t_outputs, teacher, "teacher")
    for side, name, x in (("student", student, s), ("teacher", teacher, t)):
      if len(x.shape) != 3 or x.shape[0] != t.shape[0]:
        raise ValueError(
          f"{name}: expected a sequence [{t.shape[0]}, positions, channels] of the {side}, got "
          f"{tuple(x.shape)}: features compares vectors and maps"
        )
    resized = jax.ShapeDtypeStruct((*t.shape[:2], s.shape[2]), s.dtype)
    return comparison.init(key, {student: resized}, {teacher: t})

  def apply(params, state, s_outputs, t_outputs, batch, **context):
    s = outputs_of(s_outputs, student, "student")
    t = outputs_of(t_outputs, teacher, "teacher")
    s_count = _valid_positions(s_lengths, s_outputs, batch, s.shape[:2])
    t_count = _valid_positions(t_lengths, t_outputs, batch, t.shape[:2])
    is_valid = jnp.arange(t.shape[1]) < t_count[:, None]
    where = valid_rows(batch, is_valid & (s_count > 0)[:, None])
    s = resize_sequence(s, s_count, t_count, t.shape[1])
    outputs = {student: jnp.where(where[..., None], s, 0)}, {teacher: t}
    value, _ = comparison.apply(params, {}, *outputs, {**batch, "where": where}, **context)
    return value, state

  return Term(init, apply)


def resize_sequence(x: jax.Array, count: jax.Array, new_count: jax.Array, length: int) -> jax.Array:
  """Returns each row's valid positions, resized linearly to another number of positions.

  Args:
    x: [B, S, C]; what follows the valid positions may be NaN.
    count: number of valid positions of each row, int [B].
    new_count: number of positions that they become, int [B].
    length: number of positions of the result.

  Returns:
    [B, length, C], float32 or wider; what follows the new positions is arbitrary and finite.

  >>> x = jnp.array([[[0.0], [1.0], [9.0]]])
  >>> resize_sequence(x, jnp.array([2]), jnp.array([4]), 4)[0, :, 0]
  Array([0.  , 0.25, 0.75, 1.  ], dtype=float32)
  """
  dtype = reduce.common_dtype(x.dtype, jnp.float32)
  position = jnp.arange(x.shape[1])
  is_valid = position < count[:, None]
  x = jnp.where(is_valid[..., None], x, 0).astype(dtype)
  scale = (count / jnp.maximum(new_count, 1)).astype(dtype)[:, None]
  # Centers of the new positions, as in jax.image.resize.
  center = jnp.clip((jnp.arange(length) + 0.5) * scale - 0.5, 0, count[:, None] - 1)
  distance = jnp.abs(center[:, :, None] - position) / jnp.maximum(scale, 1)[..., None]
  weights = jnp.where(is_valid[:, None], jnp.maximum(1 - distance, 0), 0)
  weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
  return jnp.einsum("bts,bsc->btc", weights, x, precision="highest")


def _valid_positions(
  name: str | None, outputs: Outputs, batch: Batch, shape: tuple[int, int]
) -> jax.Array:
  """Returns the number of valid positions of each row, int [B]."""
  if name is None:
    return jnp.full(shape[0], shape[1])
  x = jnp.asarray(outputs[name]) if name in outputs else batch_entry(batch, name)
  is_flag = x.ndim == 1 and x.dtype == jnp.bool_
  if x.shape not in (shape[:1], shape) or is_flag or jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"lengths: expected {name!r} as int {shape[:1]}, or as a mask or segments {shape}, got "
      f"{x.dtype} {x.shape}: name the entry of this network's positions"
    )
  if x.ndim == 1:
    return x.astype(jnp.int32)
  return (x if x.dtype == jnp.bool_ else x >= 0).sum(1, dtype=jnp.int32)
