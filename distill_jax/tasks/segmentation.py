"""Semantic segmentation: one class per pixel or voxel."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.objectives.class_labels import check_ignore_label
from distill_jax.tasks._case_scores import Cases, case_scores
from distill_jax.tasks._class_maps import compact, thumbnails
from distill_jax.tasks._class_names import checked_names
from distill_jax.tasks._pixels import (
  Pixels,
  example_iou,
  logits_of,
  num_classes,
  on_grid,
  pixels_of,
)
from distill_jax.tasks.logits import (
  AGREEMENT,
  OUTSIDE,
  TEACHER_KL,
  confusion_matrix,
  count_outside,
  means,
)
from distill_jax.types import Batch, Metric, Outputs, Task

_METRICS = (
  Metric("miou", "mean IoU", "%", "max", ".2%", short="mIoU"),
  Metric("dice", "mean Dice", "%", "max", ".2%"),
  Metric("pixel_accuracy", "pixel accuracy", "%", "max", ".2%"),
)
_LOW_BITS = 12


def segmentation(
  *,
  label: str = "label",
  output: str = "logits",
  ignore_label: int | None = None,
  class_names: Sequence[str] = (),
  include_background: bool = True,
  cases: Cases | None = None,
) -> Task:
  """Returns the task of logits [B, ..., C] and integer labels [B, ...]: of images [B, H, W] or
  volumes [B, D, H, W]. Logits on another grid are resized to that of the labels
  (`losses.resize_logits`). One logit per pixel, C = 1, is that of class 1; class 0 has the other
  pixels.

  Its metrics come from one running confusion matrix [C, C] of all pixels: intersection over union
  (IoU; scikit-learn's `jaccard_score`) and Dice coefficient (`f1_score`) of each class, their means
  over the classes, and pixel accuracy; next to a teacher, agreement with it and KL(teacher ||
  student) per pixel. A class that occurs neither as label nor as prediction has no score and is in
  no mean; one that is predicted but never a label has 0. Where a pixel's logits are NaN, IoU, Dice
  and pixel accuracy are NaN.

  The scores of the classes are 'iou/water', 'dice/water', ...: the log of `fit` has them, reports
  have a table of their own for them, and `best="dice/water"` chooses weights by one. Without
  `class_names` they are 'iou/1', ..., and cannot choose.

  With `cases` the examples of each case (slices, patches, or a volume) are put together on the
  host, which keeps a byte per voxel of prediction and label, and scored: Dice and HD95 of each
  class, the 95th percentile of the distances between the borders of prediction and label, of both
  directions together (`medpy.metric.hd95`). They are means over the cases, then over the classes. A
  class in neither is left out of this case; one in label or prediction only has Dice 0, the
  volume's diagonal as HD95, as in BraTS, and is counted as 'unmatched'. Pixels that do not count
  are in no region.

  Args:
    label: the batch's entry with the labels.
    output: the output of both networks with the logits.
    ignore_label: the label of pixels that do not count (255 is common); negative labels never do.
    class_names: a name for each class; empty: numbers.
    include_background: whether class 0 is part of the means; medical scores often leave it out.
    cases: which examples are parts of one volume; None: volumes are not scored.

  Raises:
    ValueError: two classes have one name, or `ignore_label` is no integer.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.segmentation(class_names=["land", "water"])
  >>> outputs = {"logits": jnp.array([[[2.0, 0.0], [1.0, 0.0]]])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([[0, 1]])}, None)
  >>> scores = task.compute(sums)
  >>> scores["miou"], scores["iou/land"], scores["iou/water"]
  (0.25, 0.5, 0.0)
  """
  check_ignore_label(ignore_label)
  names = checked_names(class_names)
  options = _Options(label, output, ignore_label, names, include_background, cases)
  class_metrics = [
    dataclasses.replace(m, name=f"{m.name}/{name}", title=f"{m.title} of {name}", detail=3)
    for m in options.class_metrics
    for name in names
  ]
  case_metrics = () if cases is None else cases.metrics
  score_cases = functools.partial(_evaluate_predictions, options)
  return Task(
    metrics=(*_METRICS, *case_metrics, AGREEMENT, TEACHER_KL, *class_metrics),
    statistics=functools.partial(_statistics, options),
    compute=functools.partial(_compute, options),
    label_classes=lambda outputs: {
      label: num_classes(outputs_of(outputs, output, "student").shape)
    },
    ignore_label=ignore_label,
    predict=functools.partial(_predict, options),
    evaluate_predictions=None if cases is None else score_cases,
    references=() if cases is None else cases.references,
    figures=functools.partial(_figures, options),
    figure_references=(label, "id", "image"),
    groups="" if cases is None else cases.entry,
  )


class _Options(NamedTuple):
  """The arguments of `segmentation`."""

  label: str
  output: str
  ignore_label: int | None
  class_names: tuple[str, ...]
  include_background: bool
  cases: Cases | None

  @property
  def class_metrics(self) -> list[Metric]:
    """Returns the scores that each class has; their names lack the class."""
    of_cases = () if self.cases is None else self.cases.metrics[:2]
    return [
      Metric("iou", "IoU", "%", "max", ".2%"),
      Metric("dice", "Dice", "%", "max", ".2%"),
      *(dataclasses.replace(metric, title=metric.short) for metric in of_cases),
    ]

  def read(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, Pixels]:
    """Returns the student's logits on the labels' grid, and its pixels."""
    labels = batch_entry(batch, self.label)
    logits = logits_of(outputs, self.output, labels, self.class_names)
    where = batch.get("where")
    return logits, pixels_of(logits, labels, where, self.label, self.ignore_label)


def _statistics(
  options: _Options, outputs: Outputs, batch: Batch, teacher: Outputs | None
) -> dict[str, Any]:
  logits, pixels = options.read(outputs, batch)
  statistics = {
    "confusion": _split_counts(confusion_matrix(*pixels[:3], logits.shape[-1])),
    "nan": (pixels.is_nan & pixels.labeled).sum(dtype=jnp.int32),
    OUTSIDE: count_outside(pixels.outside),
  }
  if teacher is None:
    return statistics
  teacher_logits = outputs_of(teacher, options.output, "teacher")
  teacher_logits = on_grid(teacher_logits, batch[options.label], "teacher")
  agree = pixels.predicted == teacher_logits.argmax(-1)
  return statistics | {
    "agreement": reduce.total(agree, batch.get("where")),
    "teacher_kl": reduce.total(kl_divergence(logits, teacher_logits), batch.get("where")),
  }


def _predict(options: _Options, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns small maps for pictures, or whole ones where cases are scored."""
  logits, pixels = options.read(outputs, batch)
  classes = logits.shape[-1]
  maps = compact(pixels.predicted, ~pixels.is_nan, classes)
  iou = example_iou(pixels, classes, options.include_background)
  if options.cases is None:
    return {"class": thumbnails(maps), "iou": iou}
  return {"class": maps, "iou": iou, "label": compact(pixels.label, pixels.labeled, classes)}


def _evaluate_predictions(
  options: _Options, predictions: Mapping[str, Any], references: Mapping[str, Any]
) -> dict[str, float]:
  assert options.cases is not None
  names, include_background = options.class_names, options.include_background
  return case_scores(predictions, references, options.cases, names, include_background)


def _figures(
  options: _Options,
  entries: Sequence[Any],
  references: Mapping[str, Any],
  class_names: Sequence[str],
) -> Sequence[Any]:
  from distill_jax.tasks._class_figures import map_figures  # matplotlib: reports alone need it

  counted = [entry.statistics for entry in entries if "confusion" in (entry.statistics or {})]
  if not counted:
    return []
  pixels = counts_of(counted[0]).sum(1)
  keys = options.class_names or range(len(pixels))
  return map_figures(
    entries,
    references,
    options.class_names or class_names,
    pixels=pixels,
    metrics={
      number: [dataclasses.replace(m, name=f"{m.name}/{key}") for m in options.class_metrics]
      for number, key in enumerate(keys)
    },
    label=options.label,
    ignore_label=options.ignore_label,
  )


def counts_of(statistics: Mapping[str, Any]) -> np.ndarray:
  """Returns int64 [C, C], label by prediction: the pixels that a segmentation's sums counted."""
  high, low = np.asarray(statistics["confusion"], np.int64)
  return (high << _LOW_BITS) + low


def _split_counts(counts: jax.Array) -> jax.Array:
  """Returns counts as int32 [2, ...], high and low bits: a running sum of 32 bits overflows at 2^31
  pixels of one class, which 16 volumes of 512^3 have.
  """
  return jnp.stack([counts >> _LOW_BITS, counts & ((1 << _LOW_BITS) - 1)])


def _compute(options: _Options, statistics: Mapping[str, Any]) -> dict[str, float]:
  confusion = counts_of(statistics)
  correct = confusion.diagonal()
  sizes = confusion.sum(0) + confusion.sum(1)
  scores = means(statistics)
  if not confusion.any():
    return scores
  unit = np.nan if statistics["nan"] else 1.0
  occurs = np.flatnonzero(sizes)
  iou = dict(zip(occurs.tolist(), unit * correct[occurs] / (sizes - correct)[occurs]))
  dice = dict(zip(occurs.tolist(), unit * 2 * correct[occurs] / sizes[occurs]))
  counted = [number for number in iou if number or options.include_background]
  if counted:
    scores["miou"] = float(np.mean([iou[number] for number in counted]))
    scores["dice"] = float(np.mean([dice[number] for number in counted]))
  scores["pixel_accuracy"] = float(unit * correct.sum() / confusion.sum())
  names = options.class_names or [str(number) for number in range(len(confusion))]
  scores |= {f"iou/{names[number]}": float(value) for number, value in iou.items()}
  return scores | {f"dice/{names[number]}": float(value) for number, value in dice.items()}
