"""Tables and curves over several finished runs."""

import math
import re
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from distill_jax.report import style, variants
from distill_jax.report.document import Block, Heading, Picture, Table, Text
from distill_jax.report.headline import ACCURACY, Headline, headline
from distill_jax.report.numbers import MISSING, difference, mean, whole
from distill_jax.report.results import Group, Spread, gain, groups, over_seeds, students
from distill_jax.report.runs import Run, Series, series

_TEACHER, _ALONE = Group("teacher"), Group("baseline")


def page(runs: Sequence[Run]) -> list[Block]:
  """Per data set a table of its runs, and a table and a curve of each field that some of them vary."""
  blocks: list[Block] = []
  for (data, _), own in _by_data(runs).items():
    blocks += [Heading(data), *_tables(own)]
    for varied in series(own):
      blocks += [Heading(_title(varied)), _series(varied), _picture(varied, blocks)]
  return blocks


def section(runs: Sequence[Run]) -> list[Block]:
  """The tables alone, for a page that has headings of its own; a run that a series shows is not repeated."""
  blocks: list[Block] = []
  by_data = _by_data(runs)
  for (data, _), own in by_data.items():
    varied = series(own)
    shown = [id(run) for one in varied for run in one.runs]
    rest = [run for run in own if id(run) not in shown]
    if len(by_data) > 1:
      blocks.append(Text(f"Data: {data}."))
    for one in varied:
      blocks += [
        Text(f"{_title(one)}."),
        _series(one),
        Text(f"{_note(one.runs)} {_origin(one.runs)}"),
      ]
    blocks += _tables(rest)
  return blocks


def curve(varied: Series) -> Figure:
  """The headline score against the field: the teacher, the student alone, each distilled student."""
  shown = _groups(varied.runs)
  low, high = min(varied.values), max(varied.values)
  log = low > 0 and high >= 10 * low
  picture = style.figure(6.5, 4)
  axes = picture.subplots()
  main = _headline(varied.runs)
  label, factor = main.axis
  beside = [group for group in shown if group != _TEACHER]
  for group, look in style.looks(shown).items():
    points = zip(
      varied.values, (over_seeds(run.measured, group, main.score) for run in varied.runs)
    )
    known = [(value, spread) for value, spread in points if spread is not None]
    # Error bars stand side by side, 1 % of the width apart.
    aside = 0.01 * (beside.index(group) - (len(beside) - 1) / 2) if group in beside else 0
    axes.errorbar(
      [
        value * (high / low) ** aside if log else value + (high - low) * aside for value, _ in known
      ],
      [factor * spread.mean for _, spread in known],
      [math.nan if spread.deviation is None else factor * spread.deviation for _, spread in known],
      label=group.title,
      color=look.color,
      linestyle=look.line,
      marker=look.marker,
      markersize=6,
      capsize=3,
    )
  axes.set_xscale("log" if log else "linear")
  different = sorted(set(varied.values))
  if len(different) <= 8:
    axes.set_xticks(different, [f"{value:g}" for value in different])
    axes.set_xticks([], minor=True)
  axes.margins(0.08)
  if main == ACCURACY:
    axes.set_ylim(top=min(101, axes.get_ylim()[1]))
  axes.set(ylabel=f"test {label}")
  axes.set_xlabel(varied.field, parse_math=False)
  axes.set_title(_title(varied), parse_math=False)
  picture.legend(loc="outside lower center", ncols=3 if len(shown) <= 3 else 2)
  return picture


def _by_data(runs: Iterable[Run]) -> dict[tuple[str, int | None], list[Run]]:
  found: dict[tuple[str, int | None], list[Run]] = {}
  for run in runs:
    found.setdefault(run.data, []).append(run)
  return found


def _tables(runs: Sequence[Run]) -> list[Block]:
  """One table of the runs that distill few students; those that distill many have a row for each."""
  many = [run for run in runs if variants.in_rows(run.measured) or len(students(run.measured)) > 2]
  if many and all(group.variant for run in runs for group in students(run.measured)):
    many = list(runs)
  few = [run for run in runs if not any(run is other for other in many)]
  blocks: list[Block] = [_table(few), Text(_note(few))] if few else []
  return [*blocks, *_rows(many)]


def _rows(runs: Sequence[Run]) -> list[Block]:
  """A table of all students of the runs, whose common rows (the teacher, the student alone) stand there once."""
  costs = any(variants.differ_in_size(run.measured) for run in runs)
  tables: dict[tuple[str, ...], tuple[dict[tuple[str, ...], Sequence[str]], list[Run]]] = {}
  for run in runs:
    own = variants.table(run.measured, run.facts, brief=True, costs=costs)
    rows, of = tables.setdefault(tuple(own.header), ({}, []))
    of.append(run)
    for row in own.rows:
      rows.setdefault(tuple(row[:3]), row)  # measured costs differ from run to run
  blocks: list[Block] = []
  for header, (rows, of) in tables.items():
    words = [
      _note(of),
      *dict.fromkeys(variants.about_time(run.measured) for run in of),
      _origin(of),
    ]
    blocks += [Table(header, list(rows.values())), Text(" ".join(filter(None, words)))]
  return blocks


def _table(runs: Sequence[Run]) -> Table:
  header = ["Run", "Overrides", "Teacher", "Student alone", "Distilled", "Distilled − alone"]
  header += ["Seeds", "Time", "Device", "Git"]
  rows = [
    _row(run, group) for run in runs for group in students(run.measured) or [Group("student")]
  ]
  used = [place for place in range(len(header)) if any(row[place] for row in rows)]
  return Table([header[place] for place in used], [[row[place] for place in used] for row in rows])


def _row(run: Run, group: Group) -> list[str]:
  facts = run.facts
  name = f"{run.name}: {group.variant}" if group.variant else run.name
  overrides = ", ".join(facts.get("overrides") or [])
  scores = [_score(run, g) for g in (_TEACHER, _ALONE, group)]
  change = _change(run, group)
  origin = [_seeds([run]) or MISSING, _time([run]), facts.get("device") or "", _revision(run)]
  return [name, overrides, *scores, change, *origin]


def _series(varied: Series) -> Table:
  distilled = [group for group in _groups(varied.runs) if group.role == "student"]
  shown = [_TEACHER, _ALONE, *distilled]
  gains = [f"{group.variant or 'Distilled'} − alone" for group in distilled]
  rows = [
    [
      f"{value:g}",
      *(_score(run, group) for group in shown),
      *(_change(run, group) for group in distilled),
    ]
    for value, run in zip(varied.values, varied.runs)
  ]
  return Table([varied.field, *(group.title for group in shown), *gains], rows)


def _picture(varied: Series, before: Sequence[Block]) -> Picture:
  stem = re.sub(r"[^\w.]+", "-", f"{varied.runs[0].name}-{varied.field}")
  taken = {block.file for block in before if isinstance(block, Picture)}
  names = (f"{stem}{number}.png" for number in ["", *(f"-{n}" for n in range(2, len(taken) + 3))])
  file = next(name for name in names if name not in taken)
  with style.context():
    picture = curve(varied)
    caption = "Means over seeds, with one sample standard deviation."
    return Picture(file, _title(varied), caption, style.to_png(picture), picture.get_figwidth())


def _title(varied: Series) -> str:
  first, *rest = [run.facts.get("overrides") or [] for run in varied.runs]
  same = [text for text in first if all(text in others for others in rest)]
  name = f"{varied.runs[0].name}{''.join(f', {text}' for text in same)}"
  return f"{name}: test {_headline(varied.runs).name} against {varied.field}"


def _note(runs: Sequence[Run]) -> str:
  """What the numbers of a table are."""
  rows, seeds = runs[0].data[1], _seeds(runs)
  examples = f" ({whole(rows)} examples)" if rows else ""
  over = f"{seeds} seeds" if seeds else "seeds"
  spread = f"mean ± sample standard deviation over {over}, the difference paired by seed"
  if seeds == "1":
    spread = "one seed, so there is no spread"
  words = f"{_headline(runs).title.replace(',', ' in')}{examples}: {spread}."
  sizes = [
    (name, _sizes(runs, role)) for name, role in (("teacher", "teacher"), ("student", "student"))
  ]
  known = [f"{name} {whole(size.pop())}" for name, size in sizes if len(size) == 1]
  return f"{words} Parameters: {', '.join(known)}." if known else words


def _origin(runs: Sequence[Run]) -> str:
  """Where and from what code the runs come, and how long they took."""
  devices = {run.facts.get("device"): None for run in runs}
  revisions = {_revision(run): None for run in runs}
  parts = [*devices, _time(runs), *(f"git {revision}" for revision in revisions if revision)]
  return f"{', '.join(filter(None, parts))}." if any(parts) else ""


def _groups(runs: Sequence[Run]) -> list[Group]:
  return groups(m.entry for run in runs for m in run.measured)


def _score(run: Run, group: Group) -> str:
  main = headline(run.measured)
  return mean(main.show, over_seeds(run.measured, group, main.score))


def _change(run: Run, group: Group) -> str:
  main = headline(run.measured)
  return difference(main.show, gain(run.measured, group, main.score))


def _headline(runs: Sequence[Run]) -> Headline:
  return headline([m for run in runs for m in run.measured])


def _seeds(runs: Sequence[Run]) -> str | None:
  """How often each student was trained; None where that differs or none was."""
  counts = {
    _number(over_seeds(run.measured, group, headline(run.measured).score))
    for run in runs
    for group in run.groups
    if group != _TEACHER
  }
  return str(counts.pop()) if len(counts) == 1 else None


def _number(spread: Spread | None) -> int:
  return 0 if spread is None else spread.number


def _sizes(runs: Sequence[Run], role: str) -> set[float]:
  scores = [m.scores for run in runs for m in run.measured if m.entry.role == role]
  return {s["parameters"] for s in scores if "parameters" in s}


def _time(runs: Sequence[Run]) -> str:
  seconds = sum(sum((run.facts.get("seconds") or {}).values()) for run in runs)
  if not seconds:
    return ""
  if seconds < 120:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _revision(run: Run) -> str:
  revision, space, rest = (run.facts.get("git") or "").partition(" ")
  return revision[:9] + (" (changed)" if "changes" in rest else "")
