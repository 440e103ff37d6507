"""Object detection: boxes with a class each."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import data
from distill_jax.boxes import Detections
from distill_jax.errors import check_integer, naming_missing
from distill_jax.objectives.calls import batch_entry
from distill_jax.tasks._boxes import Found, Truth, check_detections, check_truth, found_of, truth_of
from distill_jax.tasks._class_names import checked_names
from distill_jax.tasks._coco import IOU_50, IOU_75, coco_precision
from distill_jax.types import Batch, Metric, Outputs, Task

_METRICS = (
  Metric("ap", "AP", "%", "max", ".2%"),
  Metric("ap50", "AP50", "%", "max", ".2%"),
  Metric("ap75", "AP75", "%", "max", ".2%"),
  Metric("ap_small", "AP of small boxes", "%", "max", ".2%", short="AP small", detail=2),
  Metric("ap_medium", "AP of medium boxes", "%", "max", ".2%", short="AP medium", detail=2),
  Metric("ap_large", "AP of large boxes", "%", "max", ".2%", short="AP large", detail=2),
)


def detection(
  decode: Callable[[Outputs], Detections],
  *,
  class_names: Sequence[str] = (),
  boxes: str = "boxes",
  label: str = "label",
  crowd: str = "crowd",
  areas: Sequence[float] = (32**2, 96**2),
  max_detections: int = 100,
) -> Task:
  """Returns the task of images with boxes [B, N, 4], (left, top, right, bottom) in pixels, and
  their classes [B, N].

  Its metrics are COCO's average precision (AP), computed by faster-coco-eval (the extra
  'detection'): the mean over IoU thresholds from 0.5 to 0.95 and over the classes; AP50 and AP75 at
  one threshold; AP of boxes by size; and AP of each class, 'ap/car', 'ap/dog', ... A class or a
  size without a true box has no score and is in no mean. Without `class_names` the classes are
  'ap/0', 'ap/1', ..., and cannot choose weights.

  A box counts if its label is not negative and it has an area; all others are padding. Where a
  network returns NaN, all scores are NaN.

  Args:
    decode: maps the network's outputs to `boxes.Detections`, under `jit`.
    class_names: a name for each class; empty: numbers.
    boxes: the batch's entry with the boxes; zeros are padding.
    label: its entry with class numbers; negative numbers are padding.
    crowd: its entry with COCO's 'iscrowd', bool [B, N], if it has one: detections in such a box
      count neither as correct nor as wrong.
    areas: square pixels up to which a box is small, and up to which it is medium.
    max_detections: detections per image and class that count, those with the highest scores.

  Raises:
    ValueError: two classes have one name, or `areas` are not two rising numbers. When it is
      measured: an example whose boxes hold NaN, have left > right, or have no class of
      `class_names`; or another result of `decode`, such as logits in place of scores from 0 to 1.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> from distill_jax.boxes import Detections
  >>> task = tasks.detection(lambda outputs: Detections(*outputs["found"]), class_names=["cat"])
  >>> batch = {"boxes": jnp.array([[[0.0, 0.0, 10.0, 10.0]]]), "label": jnp.array([[0]])}
  >>> found = jnp.array([[[0.0, 0.0, 10.0, 8.0]]]), jnp.array([[0.9]]), jnp.array([[0]])
  >>> predictions = task.predict({"found": found}, batch)
  >>> scores = task.evaluate_predictions(predictions, batch)
  >>> round(scores["ap50"], 4), round(scores["ap/cat"], 4)
  (1.0, 0.7)
  """
  check_integer("max_detections", max_detections, 1)
  options = _Options(
    decode, checked_names(class_names), boxes, label, crowd, _checked_areas(areas), max_detections
  )
  metric = _METRICS[0]
  class_metrics = [
    Metric(f"ap/{name}", f"AP of {name}", metric.unit, metric.better, metric.format, detail=3)
    for name in options.class_names
  ]
  return Task(
    metrics=(*_METRICS, *class_metrics),
    statistics=lambda outputs, batch, teacher: {},
    compute=lambda statistics: {},
    label_classes=lambda outputs: {label: len(options.class_names) or None},
    ignore_label=data.UNLABELED,
    predict=functools.partial(_predict, options),
    evaluate_predictions=functools.partial(_evaluate_predictions, options),
    references=(boxes, label),
    figures=functools.partial(_figures, options),
    figure_references=("id", "image"),
    scores_parts=True,
  )


class _Options(NamedTuple):
  """The arguments of `detection`."""

  decode: Callable[[Outputs], Detections]
  class_names: tuple[str, ...]
  boxes: str
  label: str
  crowd: str
  areas: tuple[float, float]
  max_detections: int

  def read(
    self, predictions: Mapping[str, Any], references: Mapping[str, Any]
  ) -> tuple[Found, Truth, int]:
    """Returns detections and boxes of all examples, checked, and the number of classes."""
    names = self.boxes, self.label
    arrays = {name: references[name] for name in names}
    if "crowd" in predictions:
      arrays[self.crowd] = predictions["crowd"]
    classes = len(self.class_names) or None
    truth = truth_of(arrays, predictions.get("id"), classes)
    found = found_of(predictions, classes)
    largest = max(x.max(initial=0) for x in (found.classes, truth.label))
    return found, truth, classes or 1 + int(largest)

  def precision(self, found: Found, truth: Truth, classes: int) -> np.ndarray:
    """Returns COCO's precision."""
    return coco_precision(found, truth, classes, self.areas, self.max_detections)


def _checked_areas(areas: Sequence[float]) -> tuple[float, float]:
  limits = tuple(float(x) for x in areas)
  if len(limits) != 2 or not 0 < limits[0] < limits[1]:
    raise ValueError(
      f"areas: expected two rising numbers of square pixels, got {list(areas)}: small boxes end at "
      "the first, medium ones at the second, such as (32**2, 96**2)"
    )
  return limits


def _predict(options: _Options, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns the detections, NaN scores where an output is not finite, and entries of the batch
  that not every batch has.
  """
  truth = {name: batch_entry(batch, name) for name in (options.boxes, options.label)}
  more = {"crowd": options.crowd, "id": "id"}
  entries = {key: jnp.asarray(batch[name]) for key, name in more.items() if name in batch}
  if "crowd" in entries:
    truth[options.crowd] = entries["crowd"]
  check_truth(truth)
  rows = len(truth[options.boxes])
  with naming_missing("an output of the network, which decode reads", outputs):
    found = options.decode(outputs)
  found = check_detections(found, rows)
  # `decode` may drop NaN, which exceeds no threshold.
  scores = jnp.where(_has_nan(dict(outputs), rows)[:, None], jnp.nan, found.scores)
  return {"boxes": found.boxes, "score": scores, "class": found.classes, **entries}


def _has_nan(outputs: Mapping[str, Any], rows: int) -> jax.Array:
  """Returns which images have NaN in an output, bool [rows]."""
  result = jnp.zeros(rows, bool)
  for leaf in jax.tree.leaves(outputs):
    if jnp.shape(leaf)[:1] == (rows,) and jnp.issubdtype(leaf.dtype, jnp.inexact):
      result |= jnp.isnan(leaf).reshape(rows, -1).any(-1)
  return result


def _figures(
  options: _Options,
  entries: Sequence[Any],
  references: Mapping[str, Any],
  class_names: Sequence[str],
) -> Sequence[Any]:
  from distill_jax.tasks._class_figures import box_figures  # matplotlib: reports alone need it

  predicted = [entry for entry in entries if entry.predictions]
  if not predicted or not {options.boxes, options.label} <= set(references):
    return []
  named = options._replace(class_names=options.class_names or tuple(class_names))
  found, truths, numbers = zip(*(named.read(e.predictions, references) for e in predicted))
  truth, classes = truths[0], max(numbers)
  if not truth.counted.any():
    return []

  def precision(detections: Found) -> np.ndarray:
    values = options.precision(detections, truth, classes)
    return np.nanmean(values[[IOU_50, IOU_75], ..., 0], -1)

  keys = options.class_names or range(classes)
  return box_figures(
    predicted,
    found,
    truth,
    references,
    named.class_names,
    precision=precision,
    metrics={i: [dataclasses.replace(_METRICS[0], name=f"ap/{key}")] for i, key in enumerate(keys)},
  )


def _evaluate_predictions(
  options: _Options, predictions: Mapping[str, Any], references: Mapping[str, Any]
) -> dict[str, float]:
  found, truth, classes = options.read(predictions, references)
  precision = options.precision(found, truth, classes)
  everything = precision[..., 0]
  parts = {
    "ap": everything,
    "ap50": everything[IOU_50],
    "ap75": everything[IOU_75],
    **{f"ap_{size}": precision[..., i] for i, size in enumerate(("small", "medium", "large"), 1)},
  }
  names = options.class_names or range(classes)
  parts |= {f"ap/{name}": everything[..., number] for number, name in enumerate(names)}
  # A mean of nothing is no score.
  scores = {name: float(np.nanmean(x)) for name, x in parts.items() if not np.isnan(x).all()}
  return dict.fromkeys(scores, np.nan) if np.isnan(found.scores).any() else scores
