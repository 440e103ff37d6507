"""What distillation changes class by class: numbers, words and a picture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from distill_jax.report.numbers import difference, percent, signed
from distill_jax.report.results import Group, Measured, Spread, groups, pairs, spread, students
from distill_jax.report.style import class_labels, figure, looks

NAMED = 24  # classes that the picture names at most
_FIRST = 3  # classes that the words name at most, of those that gain and of those that lose
_BETWEEN: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "color": "#5b636d"}
_NONE = 1e-9  # a mean gain below this is one of no example


class ClassScores(NamedTuple):
  """One class of the test split: its number of examples, and the share of them that is recognized.

  `gain` is distilled minus alone, paired by seed; only of distilled students that share a seed with one alone.
  """

  number: int
  name: str
  examples: int
  accuracy: dict[Group, Spread]
  gain: dict[Group, Spread]


def by_class(measured: Sequence[Measured], class_names: Sequence[str]) -> list[ClassScores]:
  """The scores of every class that has a test example, in the order of the classes."""
  confusion = np.asarray(measured[0].counts["confusion"])
  scores = []
  for number in np.flatnonzero(confusion.sum(1)).tolist():
    accuracy = {
      group: spread([_share(m, number) for m in measured if m.entry.group == group])
      for group in groups(m.entry for m in measured)
    }
    change = {
      group: spread([_share(a, number) - _share(b, number) for a, b in pairs(measured, group)])
      for group in students(measured)
    }
    examples = int(confusion[number].sum())
    known = (
      {g: value for g, value in values.items() if value is not None}
      for values in (accuracy, change)
    )
    scores.append(ClassScores(number, str(class_names[number]), examples, *known))
  return scores


def compared(scores: Sequence[ClassScores]) -> list[Group]:
  """The distilled students that have gains; the last one orders the classes of the picture."""
  return list(scores[0].gain) if scores else []


def words(scores: Sequence[ClassScores], group: Group) -> str:
  """Which classes gain and lose most by distillation."""
  ordered = sorted(scores, key=lambda s: -s.gain[group].mean)
  gaining = [s for s in ordered if s.gain[group].mean > _NONE]
  losing = [s for s in reversed(ordered) if s.gain[group].mean < -_NONE]
  still = len(scores) - len(gaining) - len(losing)
  parts = [_most(gaining, group, "gain"), _most(losing, group, "lose")]
  if still:
    parts.append(f"{still} of {len(scores)} classes {'does' if still == 1 else 'do'} not change")
  name = f" ({group.variant})" if group.variant else ""
  return f"Accuracy by class{name}, in points: {'; '.join(parts)}."


def one_example(scores: Sequence[ClassScores]) -> str:
  """What one test example of a class amounts to in points."""
  few, many = min(s.examples for s in scores), max(s.examples for s in scores)
  return f"{100 / many:.2f}" + (f" to {100 / few:.2f}" if few < many else "")


def class_gains(scores: Sequence[ClassScores], class_names: Sequence[str]) -> Figure:
  """Accuracy of each class alone and distilled, by gain; of many classes the ends, beside the gains of all."""
  group = compared(scores)[-1]
  ordered = sorted(scores, key=lambda s: s.gain[group].mean)
  many = len(ordered) > NAMED
  shown = [*ordered[: NAMED // 2], None, *ordered[-NAMED // 2 :]] if many else ordered
  picture = figure(10 if many else 7, 1.5 + 0.235 * len(shown))
  if many:
    panels = picture.subplots(1, 2, width_ratios=[2, 3])
    _all_gains(panels[0], ordered, group)
    axes = panels[1]
  else:
    axes = picture.subplots()
  _named(axes, shown, class_labels(class_names, 20), group)
  if many:
    between = (
      f"{len(ordered) - NAMED} classes between" if len(ordered) > NAMED + 1 else "1 class between"
    )
    axes.text(0.5, NAMED // 2, between, transform=axes.get_yaxis_transform(), **_BETWEEN)
  handles, titles = axes.get_legend_handles_labels()
  unique = dict(zip(titles, handles))
  picture.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=3)
  return picture


def _share(measured: Measured, number: int) -> float:
  row = np.asarray(measured.counts["confusion"])[number]
  return float(row[number] / row.sum())


def _most(scores: Sequence[ClassScores], group: Group, verb: str) -> str:
  if not scores:
    return f"no class {verb}s"
  named = [f"{s.name} ({signed(percent, s.gain[group].mean)})" for s in scores[:_FIRST]]
  if len(scores) <= _FIRST:
    return f"{', '.join(named)} {verb}{'s' if len(named) == 1 else ''}"
  return f"{', '.join(named)} {verb} most ({len(scores)} {verb})"


def _all_gains(axes, ordered: Sequence[ClassScores], group: Group) -> None:
  values = [100 * s.gain[group].mean for s in ordered]
  style = looks([Group("baseline"), group])
  colors = [style[group if value > 0 else Group("baseline")].color for value in values]
  axes.barh(range(len(values)), values, height=1, color=colors)
  axes.axvline(0, color="#7a828c", linewidth=0.8)
  axes.set(
    title=f"All {len(values)} classes, by gain", xlabel="gain by distillation, points", yticks=[]
  )
  axes.set_ylim(-0.5, len(values) - 0.5)
  axes.spines["left"].set_visible(False)


def _named(axes, shown: Sequence[ClassScores | None], labels: Sequence[str], group: Group) -> None:
  known = next(s for s in shown if s is not None)
  style = looks(list(known.accuracy))
  drawn = [g for g in known.accuracy if g.role == "baseline" or g in known.gain]
  for row, scores in enumerate(shown):
    if scores is None:
      continue
    points = [100 * scores.accuracy[g].mean for g in drawn]
    axes.plot([min(points), max(points)], [row, row], color="#b9c0c8", linewidth=2.5, zorder=1)
    for g, point in zip(drawn, points):
      axes.plot(point, row, **style[g].points, markersize=6, label=g.title, clip_on=False)
    text = difference(percent, scores.gain[group])
    axes.annotate(
      text, (1, row), (8, 0), axes.get_yaxis_transform(), "offset points", va="center", fontsize=8.5
    )
  rows = [(row, scores) for row, scores in enumerate(shown) if scores is not None]
  axes.set_yticks(
    [row for row, _ in rows], [labels[scores.number] for _, scores in rows], parse_math=False
  )
  axes.set(ylim=(-0.6, len(shown) - 0.4), xlabel="test accuracy within the class, %")
  axes.set_title("Accuracy by class, alone and distilled")
  axes.set_title(
    f"gain{f' of {group.variant}' if group.variant else ''}, points", loc="right", fontsize=8.5
  )
  axes.grid(axis="y", visible=False)
