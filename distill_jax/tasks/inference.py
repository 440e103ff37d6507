"""Chooses a task by shapes, where that is safe."""

import jax.numpy as jnp

from distill_jax.tasks.classification import classification
from distill_jax.tasks.language_modeling import language_modeling
from distill_jax.tasks.segmentation import segmentation
from distill_jax.types import Batch, Outputs, Task


def infer(outputs: Outputs, batch: Batch) -> Task | None:
  """Returns the task that outputs and labels fit, by their shapes alone; None where none is safe.

  Integer labels [B] next to logits [B, C] are classification, [B, L] next to logits [B, L, V] or
  next to hidden states [B, L, D] with a head language modeling, and [B, H, W] next to logits [B, H,
  W, C] segmentation (negative labels are ignored). All others (numbers, several labels per example,
  no label) must be named: `tasks.regression()`, `tasks.multi_label()`.

  Args:
    outputs: a model's outputs, or their shapes.
    batch: arrays, or their shapes.
  """
  label = batch.get("label")
  if label is None or not jnp.issubdtype(label.dtype, jnp.integer):
    return None
  if "logits" in outputs:
    grid = outputs["logits"].shape[:-1]
  elif "head" in outputs and "hidden" in outputs:
    grid = outputs["hidden"].shape[:-1]
  else:
    return None
  if label.shape != grid:
    return None
  if "logits" in outputs and len(grid) == 1:
    return classification()
  if len(grid) == 2:
    return language_modeling()
  return segmentation() if "logits" in outputs and len(grid) == 3 else None
