"""Averages what a network says about several views of an example: clips, crops or windows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.models.adapters.kinds import check_model
from distill_jax.types import Batch, Model, Outputs


def average_views(model: Model, *, ndim: int, entries: Sequence[str] = ("image",)) -> Model:
  """Returns a Model that averages class probabilities over the views of an example.

  It takes batches of single views as they are, and those with views along axis 1, [B, views, ...],
  as `data.clips.uniform_clips` cuts them. So one Model is trained on clips, and evaluated by `fit`,
  `evaluate` and the report of a job on 5 clips x 3 crops of each video. Teacher and student are
  wrapped alike.

  Of several views 'logits' are the logarithm of the mean of their softmax probabilities, which the
  field averages; other floating outputs are means; integers keep their axis of views.

  Args:
    model: a network of single views.
    ndim: number of axes of the first entry with single views: 5 for clips [B, T, H, W, C], 4 for
      images, 3 for series [B, T, C].
    entries: names of the batch's entries that have views, such as ("image", "image_valid"). All
      others are the same for each view of an example.

  Raises:
    ValueError: `model` is no Model; in init and apply, the batch lacks an entry, the first has
      another number of axes, or the numbers of views differ.

  >>> import jax.numpy as jnp
  >>> from distill_jax import models
  >>> linear = models.from_apply(None, lambda w, x: x @ w, variables=jnp.eye(2), inputs="x")
  >>> model = models.average_views(linear, ndim=2, entries=("x",))
  >>> batch = {"x": jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]]))}  # two views of one example
  >>> outputs, _ = model.apply(*model.variables, batch, train=False, key=None)
  >>> jnp.exp(outputs["logits"]).round(3)
  Array([[0.70000005, 0.3       ]], dtype=float32)
  """
  check_model("model", model)

  def init(key, batch):
    return model.init(key, _fold(batch, ndim, entries)[0])

  def apply(params, state, batch, *, train, key) -> tuple[Outputs, Any]:
    rows, views = _fold(batch, ndim, entries)
    outputs, state = model.apply(params, state, rows, train=train, key=key)
    if views is None:
      return outputs, state
    count = rows[entries[0]].shape[0]
    return {name: _average(name, x, count, views) for name, x in outputs.items()}, state

  return model._replace(init=init, apply=apply)


def _fold(batch: Batch, ndim: int, entries: Sequence[str]) -> tuple[Batch, int | None]:
  """Returns the batch with a row for each view, and the number of views; None for single ones."""
  missing = [name for name in entries if name not in batch]
  if missing:
    raise ValueError(f"entries: expected those of the batch, {sorted(batch)}, got {missing[0]!r}")
  shape = jnp.shape(batch[entries[0]])
  if len(shape) not in (ndim, ndim + 1):
    raise ValueError(
      f"{entries[0]}: expected {ndim} axes, or {ndim + 1} with views along axis 1, got "
      f"{list(shape)}: ndim= of average_views is that of single views"
    )
  if len(shape) == ndim:
    return batch, None
  views = shape[1]
  different = [name for name in entries if jnp.shape(batch[name])[:2] != shape[:2]]
  if different:
    raise ValueError(
      f"{different[0]}: expected [{shape[0]}, {views} views, ...], as {entries[0]} has, got "
      f"{list(jnp.shape(batch[different[0]]))}"
    )

  def rows_of(name, x):
    if name in entries:
      return jnp.reshape(x, (shape[0] * views, *jnp.shape(x)[2:]))
    return jnp.repeat(jnp.asarray(x), views, axis=0)

  return {name: rows_of(name, x) for name, x in batch.items()}, views


def _average(name: str, x: Any, rows: int, views: int) -> Any:
  """Returns the average of an output [rows, ...]; what has no rows stays as it is."""
  if jnp.ndim(x) == 0 or jnp.shape(x)[0] != rows:
    return x
  per_view = x.reshape(rows // views, views, *x.shape[1:])
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return per_view
  per_view = per_view.astype(reduce.common_dtype(x.dtype, jnp.float32))
  if name != "logits":
    return per_view.mean(1).astype(x.dtype)
  return jax.nn.logsumexp(jax.nn.log_softmax(per_view), axis=1) - jnp.log(views)
