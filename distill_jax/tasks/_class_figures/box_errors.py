"""Shows what each kind of a detector's errors costs."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distill_jax.report import style
from distill_jax.report.document import Block, Heading, Numbers
from distill_jax.report.entries import Group
from distill_jax.report.numbers import signed
from distill_jax.tasks._class_figures.box_matches import IOU, Matches

_BACKGROUND_IOU = 0.1
KINDS = ("wrong class", "badly placed", "both of these", "doubled", "background", "missed")
WRONG_CLASS, BADLY_PLACED, BOTH, DOUBLED, BACKGROUND, _ = range(len(KINDS))
_CAPTION = (
  "Points of AP50 that a network gains where all errors of one kind are corrected, means over "
  "seeds (the kinds and corrections of TIDE, Bolya et al. 2020). A detection that finds no box is "
  "badly placed with an IoU of 0.1 to 0.5 with a box of its class, of a wrong class with at least "
  "0.5 with a box of another class, both of these with 0.1 to 0.5 with such a box, doubled with at "
  "least 0.5 with a box that a detection of a higher score finds, and background with less than "
  "0.1 with all boxes. A box is missed where no detection finds it or would without an error of "
  "the first two kinds."
)


def error_figures(matches: Mapping[Group, Sequence[Matches]]) -> list[Block]:
  """Returns a picture of the gains of AP50 without each kind of error.

  Args:
    matches: of the seeds of each group.
  """
  costs = {group: [error_costs(one) for one in seeds] for group, seeds in matches.items()}
  means = {
    group: {kind: float(np.mean([one[kind] for one in seeds])) for kind in KINDS}
    for group, seeds in costs.items()
  }
  numbers = Numbers("detection_errors", {group.name: values for group, values in means.items()})
  draw = functools.partial(_draw, means)
  title = "What each kind of error costs"
  return [numbers, Heading("Kinds of errors"), *style.pictures("errors", title, _CAPTION, draw)]


def error_costs(matches: Matches) -> dict[str, float]:
  """Returns how much AP50 rises where all errors of a kind are corrected.

  A detection of a wrong class or place becomes correct if no detection finds its box, and none of
  these two kinds with a higher score would; other errors are removed, and so are missed boxes.
  """
  kind = _kinds(matches)
  # The box that a detection of a wrong class or place would find.
  targets = np.where(kind == WRONG_CLASS, matches.other_box, matches.same_box)
  is_fixable = (kind == WRONG_CLASS) | (kind == BADLY_PLACED)
  fixed = _best_of_each_box(matches, is_fixable, targets)
  truth, classes = matches.truth, matches.found.classes
  fixed_classes = np.where(fixed, np.take_along_axis(truth.label, targets, 1), classes)
  number = 1 + int(max(classes.max(initial=0), truth.label.max(initial=0)))
  ap = functools.partial(_ap50, matches.found.scores, boxes=truth.per_class(number))
  before = ap(classes, matches.is_correct, matches.counted)
  costs = {}
  for index, name in enumerate(KINDS[:-1]):
    corrected = fixed & (kind == index)
    after = ap(
      np.where(corrected, fixed_classes, classes),
      matches.is_correct | corrected,
      matches.counted & ((kind != index) | corrected),
    )
    costs[name] = after - before
  missed = _missed(matches, is_fixable, targets)
  fewer = truth._replace(exists=truth.exists & ~missed).per_class(number)
  costs[KINDS[-1]] = ap(classes, matches.is_correct, matches.counted, boxes=fewer) - before
  return costs


def _kinds(matches: Matches) -> np.ndarray:
  """Returns the kind of each detection as a row of `KINDS`; -1 where it is no error."""
  same, other = matches.same, matches.other
  return np.select(
    [
      ~matches.counted | matches.is_correct,
      (same >= _BACKGROUND_IOU) & (same < IOU),
      other >= IOU,
      same >= IOU,
      np.maximum(same, other) < _BACKGROUND_IOU,
    ],
    [-1, BADLY_PLACED, WRONG_CLASS, DOUBLED, BACKGROUND],
    BOTH,
  )


def _best_of_each_box(matches: Matches, errors: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """Returns the errors with the highest score of each true box that is not found, bool [N, K]."""
  best = np.zeros_like(errors)
  for row in np.flatnonzero(errors.any(1)):
    taken = set(matches.match[row].tolist())
    columns = np.flatnonzero(errors[row])
    for column in columns[np.argsort(-matches.found.scores[row, columns], kind="stable")].tolist():
      box = int(boxes[row, column])
      best[row, column] = box not in taken
      taken.add(box)
  return best


def _missed(matches: Matches, is_fixable: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """Returns the true boxes that nothing finds, nor would without an error, bool [N, M]."""
  missed = matches.truth.counted.copy()
  for found, boxes in ((matches.is_correct, matches.match), (is_fixable, targets)):
    rows, columns = np.nonzero(found)
    missed[rows, boxes[rows, columns]] = False
  return missed


def _ap50(
  scores: np.ndarray,
  classes: np.ndarray,
  correct: np.ndarray,
  counted: np.ndarray,
  *,
  boxes: np.ndarray,
) -> float:
  """Returns COCO's AP at one IoU threshold, the mean over the classes with boxes; 0 without any.

  Args:
    scores, classes, correct, counted: of all detections [N, K].
    boxes: int [C], true boxes of each class.
  """
  recalls = np.linspace(0, 1, 101)
  values = []
  for number in np.flatnonzero(boxes):
    of_class = counted & (classes == number)
    hits = correct[of_class][np.argsort(-scores[of_class], kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    values.append(envelope[np.searchsorted(hits / boxes[number], recalls)].mean())
  return float(np.mean(values)) if values else 0.0


def _draw(costs: Mapping[Group, Mapping[str, float]], page: float = style.PAGE) -> Figure:
  """Draws a bar per kind of error and network."""
  looks = style.looks(list(costs))
  height = 0.8 / len(costs)
  drawing = style.figure(min(page, 7), 1.3 + len(KINDS) * (0.22 + 0.2 * len(costs)))
  axes = drawing.subplots()
  handles = {}
  for index, (group, values) in enumerate(costs.items()):
    places = [row + (index - (len(costs) - 1) / 2) * height for row in range(len(KINDS))]
    widths = [100 * values[kind] for kind in KINDS]
    bars = axes.barh(places, widths, height * 0.9, color=looks[group].color)
    handles[group.title] = bars
    texts = [signed(lambda value: f"{value:.1f}", width).removeprefix("+") for width in widths]
    axes.bar_label(bars, texts, padding=2, fontsize=7.5)
  axes.set_yticks(range(len(KINDS)), KINDS)
  axes.invert_yaxis()
  axes.grid(axis="y", visible=False)
  axes.margins(x=0.1)
  axes.set(xlabel="gain of test AP50 without these errors, points")
  style.legend(drawing, handles)
  return drawing
