"""Chooses a task by shapes, where that is safe."""

import jax.numpy as jnp

from distill_jax.tasks.classification import classification
from distill_jax.tasks.heads import heads
from distill_jax.tasks.language_modeling import language_modeling
from distill_jax.tasks.segmentation import segmentation
from distill_jax.types import Batch, Outputs, Task


def infer(outputs: Outputs, batch: Batch, ignore_label: int | None = None) -> Task | None:
  """Returns the task that outputs and labels fit, by their shapes alone; None where none is safe.

  Integer or bool labels [B] next to logits [B, C] are classification, [B, L] next to logits [B, L,
  V] or next to hidden states [B, L, D] with a head language modeling, and [B, H, W] or [B, D, H, W]
  next to logits [B, H, W, C] or [B, D, H, W, C], also on another grid, segmentation (negative
  labels are ignored).
  Another output and an entry of the batch of the same name, [B, C] and integers [B], are a further
  head (`tasks.heads`). All others (numbers, one logit, several labels per example, no label) must
  be named: `tasks.regression()`, `tasks.binary()`, `tasks.multi_label()`; so must tags of tokens,
  which look like next tokens: `tasks.tagging()`.

  Args:
    outputs: a model's outputs, or their shapes.
    batch: arrays, or their shapes.
    ignore_label: the label of what has none, in addition to negative ones.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.infer({"logits": jnp.zeros((4, 10))}, {"label": jnp.zeros(4, int)})
  >>> task.metrics[0].name
  'accuracy'
  """
  main = _main(outputs, batch, ignore_label)
  others = {
    name: classification(label=name, output=name, ignore_label=ignore_label)
    for name in sorted(set(outputs) & set(batch))
    if _is_classification(outputs[name], batch[name])
  }
  if main is None or not others:
    return main
  return heads(main, **others)


def _main(outputs: Outputs, batch: Batch, ignore_label: int | None) -> Task | None:
  """Returns the task of 'logits', or of 'hidden' and 'head', and 'label'."""
  label = batch.get("label")
  if label is None or not _holds_classes(label):
    return None
  if "logits" in outputs:
    shape = outputs["logits"].shape
  elif "head" in outputs and "hidden" in outputs:
    shape = (*outputs["hidden"].shape[:-1], outputs["head"][0].shape[-1])
  else:
    return None
  if "logits" in outputs and _is_map(label.shape, shape):
    return segmentation(ignore_label=ignore_label)
  if label.shape != shape[:-1] or shape[-1] < 2:
    return None
  if "logits" in outputs and label.ndim == 1:
    return classification(ignore_label=ignore_label)
  if label.ndim == 2:
    return language_modeling(ignore_label=ignore_label)
  return None


def _is_map(label: tuple[int, ...], logits: tuple[int, ...]) -> bool:
  """Returns whether these are shapes of class numbers and logits on grids of two axes or more."""
  return (
    len(label) >= 3 and len(logits) == len(label) + 1 and label[0] == logits[0] and logits[-1] > 1
  )


def _holds_classes(label) -> bool:
  return jnp.issubdtype(label.dtype, jnp.integer) or label.dtype == jnp.bool_


def _is_classification(output, label) -> bool:
  shape: tuple[int, ...] = getattr(output, "shape", ())
  return _holds_classes(label) and len(shape) == 2 and label.shape == shape[:1] and shape[1] > 1
