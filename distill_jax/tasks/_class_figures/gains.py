"""Shows what distillation changes class by class: numbers, words and a picture."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report import style
from distill_jax.report.document import Block, Heading, Numbers, Text
from distill_jax.report.entries import (
  Entry,
  Group,
  Spread,
  groups,
  of_group,
  shared_seeds,
  spread,
  students,
)
from distill_jax.report.numbers import capitalized, difference, signed
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.labels import class_labels, names_or_numbers

MAX_NAMES = 24  # classes that the picture names
_MAX_WORDS = 3  # classes that the words name, of those that gain and of those that lose
_MIN_GAIN = 1e-9  # a smaller mean gain is less than one example
_BASELINE = Group("baseline")
_ANNOTATION: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "color": "#5b636d"}


class ClassScores(NamedTuple):
  """The scores of one class of the test split.

  Attributes:
    number: index of the class.
    name: name of the class.
    examples: number of test examples with this label.
    score: of each group: accuracy within the class, or another one in percent.
    gain: distilled minus baseline, paired by seed; of students that share a seed with a baseline.
  """

  number: int
  name: str
  examples: int
  score: dict[Group, Spread]
  gain: dict[Group, Spread]


def gain_figures(entries: Sequence[Entry], class_names: Sequence[str]) -> list[Block]:
  """Returns words and a picture on the first students, and numbers of all for results.json.

  Nothing where no entry has 'per_class'; only numbers without a baseline and a distilled student.
  """
  scores = by_class(entries, class_names)
  if not scores:
    return []
  numbers = Numbers("classes", [_as_json(one) for one in scores])
  first = by_class(few(entries), class_names)
  groups_compared = compared(first)
  if not groups_compared:
    return [numbers]
  return [
    numbers,
    Heading("Gains by class"),
    *(Text(words(first, group)) for group in groups_compared),
    *style.pictures(
      "classes", "Accuracy by class", _caption(first), functools.partial(class_gains, first)
    ),
  ]


def by_class(entries: Sequence[Entry], class_names: Sequence[str]) -> list[ClassScores]:
  """Returns the scores of every class that has a test example, in the order of the classes."""
  counted = [entry for entry in entries if "per_class" in (entry.statistics or {})]
  if not counted:
    return []
  examples, _ = _examples_and_accuracy(counted[0])
  names = names_or_numbers(class_names, len(examples))
  by_key = {(e.group, e.seed): _examples_and_accuracy(e)[1] for e in counted}
  accuracies = {
    group: np.stack([by_key[group, entry.seed] for entry in of_group(counted, group)])
    for group in groups(counted)
  }
  gains = {
    group: np.stack([by_key[group, seed] - by_key[_BASELINE, seed] for seed in seeds])
    for group in students(counted)
    if (seeds := shared_seeds(counted, group))
  }
  return [
    ClassScores(
      number,
      names[number],
      int(examples[number]),
      _column(accuracies, number),
      _column(gains, number),
    )
    for number in np.flatnonzero(examples).tolist()
  ]


def compared(scores: Sequence[ClassScores]) -> list[Group]:
  """Returns the distilled students that have gains; the picture is ordered by the last one."""
  return list(scores[0].gain) if scores else []


def words(scores: Sequence[ClassScores], group: Group, title: str = "accuracy") -> str:
  """Returns a sentence: which classes gain and lose most by distillation.

  Args:
    scores: of the classes.
    group: a distilled student.
    title: of the score.
  """
  ordered = sorted(scores, key=lambda one: -one.gain[group].mean)
  gaining = [one for one in ordered if one.gain[group].mean > _MIN_GAIN]
  losing = [one for one in reversed(ordered) if one.gain[group].mean < -_MIN_GAIN]
  equal = len(scores) - len(gaining) - len(losing)
  parts = [_most(gaining, group, "gain"), _most(losing, group, "lose")]
  if equal:
    verb = "does" if equal == 1 else "do"
    parts.append(f"{equal} of {len(scores)} classes {verb} not change")
  name = f" ({group.variant})" if group.variant else ""
  return f"{capitalized(title)} by class{name}, in points: {'; '.join(parts)}."


def class_gains(
  scores: Sequence[ClassScores], page: float = style.PAGE, *, title: str = "accuracy"
) -> Figure:
  """Draws a score of each class without and with distillation, ordered by gain.

  With many classes it names those that gain most and least, next to the gains of all. A bar is the
  interval of the gain, from the baseline on, where there is one.
  """
  group = compared(scores)[-1]
  ordered = sorted(scores, key=lambda one: one.gain[group].mean)
  many = len(ordered) > MAX_NAMES
  rows: list[ClassScores | None] = list(ordered)
  if many:
    rows = [*ordered[: MAX_NAMES // 2], None, *ordered[-MAX_NAMES // 2 :]]
  height = 1.5 + 0.235 * len(rows)
  if many and page < style.PAGE:
    drawing = style.figure(page, 3 + height)
    first, axes = drawing.subplots(2, 1, height_ratios=[3, height])
    _all_gains(first, ordered, group)
  elif many:
    drawing = style.figure(page, height)
    first, axes = drawing.subplots(1, 2, width_ratios=[2, 3])
    _all_gains(first, ordered, group)
  else:
    drawing = style.figure(min(page, 7), height)
    axes = drawing.subplots()
  labels = class_labels([one.name for one in scores], 20)
  _named_classes(axes, rows, dict(zip([one.number for one in scores], labels)), group, title)
  if many:
    count = len(ordered) - MAX_NAMES
    text = f"{count} {'class' if count == 1 else 'classes'} between"
    axes.text(0.5, MAX_NAMES // 2, text, transform=axes.get_yaxis_transform(), **_ANNOTATION)
  handles, titles = axes.get_legend_handles_labels()
  style.legend(drawing, dict(zip(titles, handles)))
  return drawing


def _examples_and_accuracy(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
  """Returns test examples [C] and accuracy [C]; the latter is 0 where there is no example."""
  correct, _, labeled = np.asarray((entry.statistics or {})["per_class"]).T
  return labeled, correct / np.maximum(labeled, 1)


def _column(values: dict[Group, np.ndarray], number: int) -> dict[Group, Spread]:
  spreads = {group: spread(rows[:, number].tolist()) for group, rows in values.items()}
  return {group: value for group, value in spreads.items() if value is not None}


def _caption(scores: Sequence[ClassScores]) -> str:
  name = compared(scores)[-1].variant or "the distilled student"
  fewest = min(one.examples for one in scores)
  most = max(one.examples for one in scores)
  points = f"{100 / most:.2f}" + (f" to {100 / fewest:.2f}" if fewest < most else "")
  total = sum(one.examples for one in scores)
  caption = (
    f"Means over seeds, and the gain of {name} over the baseline, paired by seed. One of the "
    f"{total:,} test examples is {100 / total:.2f} points of test accuracy and {points} points of "
    "its class's."
  )
  if len(scores) > MAX_NAMES:
    half = MAX_NAMES // 2
    caption += " First: the gain of each class. Then: "
    caption += f"the {half} that gain most and the {half} that gain least."
  return caption


def _most(scores: Sequence[ClassScores], group: Group, verb: str) -> str:
  if not scores:
    return f"no class {verb}s"
  names = [f"{one.name} ({signed(_percent, one.gain[group].mean)})" for one in scores[:_MAX_WORDS]]
  if len(scores) <= _MAX_WORDS:
    return f"{', '.join(names)} {verb}{'s' if len(names) == 1 else ''}"
  return f"{', '.join(names)} {verb} most ({len(scores)} {verb})"


def _all_gains(axes: Axes, ordered: Sequence[ClassScores], group: Group) -> None:
  values = [100 * one.gain[group].mean for one in ordered]
  looks = style.looks([_BASELINE, group])
  colors = [looks[group if value > 0 else _BASELINE].color for value in values]
  axes.barh(range(len(values)), values, height=1, color=colors)
  axes.axvline(0, color="#7a828c", linewidth=0.8)
  title = f"All {len(values)} classes, by gain"
  axes.set(title=title, xlabel="gain by distillation, points", yticks=[])
  axes.set_ylim(-0.5, len(values) - 0.5)
  axes.spines["left"].set_visible(False)


def _named_classes(
  axes: Axes,
  rows: Sequence[ClassScores | None],
  labels: dict[int, str],
  group: Group,
  title: str,
) -> None:
  """Draws one line per class with a marker per network; a row of None stays empty."""
  named = [(row, scores) for row, scores in enumerate(rows) if scores is not None]
  first = named[0][1]
  looks = style.looks(list(first.score))
  columns = [g for g in first.score if g.role == "baseline" or g in first.gain]
  for row, scores in named:
    points = [100 * scores.score[g].mean for g in columns]
    axes.plot([min(points), max(points)], [row, row], color="#b9c0c8", linewidth=2.5, zorder=1)
    for g, point in zip(columns, points):
      axes.plot(point, row, **looks[g].points, markersize=6, label=g.title, clip_on=False)
    interval = scores.gain[group].interval
    if interval is not None and _BASELINE in columns:
      start = points[columns.index(_BASELINE)]
      ends = [start + 100 * end for end in interval]
      axes.plot(ends, [row, row], color=looks[group].color, linewidth=6, alpha=0.25, zorder=1)
    text = difference(_percent, scores.gain[group])
    frame = axes.get_yaxis_transform()
    axes.annotate(text, (1, row), (8, 0), frame, "offset points", va="center", fontsize=8.5)
  texts = [labels[scores.number] for _, scores in named]
  axes.set_yticks([row for row, _ in named], texts, parse_math=False)
  axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"test {title} of the class, %")
  axes.set_title(f"{capitalized(title)} by class")
  name = f"gain{f' of {group.variant}' if group.variant else ''}, points"
  axes.set_title(name, loc="right", fontsize=8.5)
  axes.grid(axis="y", visible=False)


def _percent(value: float) -> str:
  return f"{100 * value:.2f}"


def _as_json(scores: ClassScores) -> dict[str, Any]:
  return {
    "name": scores.name,
    "examples": scores.examples,
    "accuracy": {group.name: value for group, value in scores.score.items()},
    "gain": {group.name: value for group, value in scores.gain.items()},
  }
