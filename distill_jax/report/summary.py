"""Builds tables and curves over several finished runs."""

import functools
import math
import re
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report import style, variants
from distill_jax.report.document import Block, Heading, Picture, Table, Text
from distill_jax.report.entries import Entry, Group, gain, groups, over_seeds, students
from distill_jax.report.numbers import (
  MISSING,
  axis_label,
  difference,
  formatter,
  integer,
  mean,
  scale,
  unit,
)
from distill_jax.report.runs import Run, Series, series

_TEACHER, _BASELINE = Group("teacher"), Group("baseline")


def page(runs: Sequence[Run]) -> list[Block]:
  """Returns tables of the runs of each data set, and a table and curve of each field they vary."""
  blocks: list[Block] = []
  for title, members in _comparable(runs):
    blocks += [Heading(title), *_tables(members)]
    for varied in series(members):
      blocks += [Heading(_title(varied)), _series_table(varied), *_pictures(varied, blocks)]
  return blocks


def section(runs: Sequence[Run]) -> list[Block]:
  """Returns the tables for a page that has its own headings; a run of a series is not repeated."""
  blocks: list[Block] = []
  parts = _comparable(runs)
  for title, members in parts:
    varied = series(members)
    in_series = [id(run) for one in varied for run in one.runs]
    others = [run for run in members if id(run) not in in_series]
    if len(parts) > 1:
      blocks.append(Text(f"Data: {title}."))
    for one in varied:
      note = Text(f"{_note(one.runs)} {_origin(one.runs)}")
      blocks += [Text(f"{_title(one)}."), _series_table(one), note]
    blocks += _tables(others)
  return blocks


def curve(varied: Series, page: float = style.PAGE) -> Figure:
  """Draws the first metric against the field: teacher, baseline and each distilled student."""
  columns = _groups(varied.runs)
  metric = varied.runs[0].metric
  drawing = style.figure(min(page, 6.5), 4)
  axes = drawing.subplots()
  highest = -math.inf
  for group in columns:
    highest = max([highest, *_draw_group(axes, varied, group, columns)])
  axes.set_xscale("log" if _is_log(varied.values) else "linear")
  unique = sorted(set(varied.values))
  if len(unique) <= 8:
    axes.set_xticks(unique, [f"{value:g}" for value in unique])
    axes.set_xticks([], minor=True)
  axes.margins(0.08)
  style.limit_percent(axes, metric, highest)
  axes.set(ylabel=f"test {axis_label(metric)}")
  axes.set_xlabel(varied.field, parse_math=False)
  axes.set_title(_title(varied), parse_math=False)
  lines, titles = axes.get_legend_handles_labels()
  style.legend(drawing, dict(zip(titles, lines)), 3 if len(columns) <= 3 else 2)
  return drawing


def _draw_group(axes: Axes, varied: Series, group: Group, columns: Sequence[Group]) -> list[float]:
  """Draws one group's curve with error bars; returns its means."""
  metric, factor = varied.runs[0].metric, scale(varied.runs[0].metric)
  look = style.looks(columns)[group]
  all_points = [
    (value, over_seeds(run.entries, group, metric.name))
    for value, run in zip(varied.values, varied.runs)
  ]
  points = [(value, spread) for value, spread in all_points if spread is not None]
  shift = _shift(columns, group)
  axes.errorbar(
    [_shifted(value, varied.values, shift) for value, _ in points],
    [factor * spread.mean for _, spread in points],
    [math.nan if spread.deviation is None else factor * spread.deviation for _, spread in points],
    label=group.title,
    color=look.color,
    linestyle=look.line,
    marker=look.marker,
    markersize=6,
    capsize=3,
  )
  return [spread.mean for _, spread in points]


def _is_log(values: Sequence[float]) -> bool:
  return min(values) > 0 and max(values) >= 10 * min(values)


def _shift(columns: Sequence[Group], group: Group) -> float:
  """Returns the fraction of the width by which a curve is moved, so that error bars differ."""
  row = [other for other in columns if other != _TEACHER]
  return 0.01 * (row.index(group) - (len(row) - 1) / 2) if group in row else 0


def _shifted(value: float, values: Sequence[float], shift: float) -> float:
  low, high = min(values), max(values)
  return value * (high / low) ** shift if _is_log(values) else value + (high - low) * shift


def _comparable(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
  """Returns (title, comparable runs); titles name the metric where a data set has several."""
  parts: dict[tuple, list[Run]] = {}
  for run in runs:
    parts.setdefault(run.comparable, []).append(run)
  result = []
  for (data, metric), members in parts.items():
    is_only = all(other == metric for name, other in parts if name == data)
    result.append((data[0] if is_only else f"{data[0]}: {metric.title}", members))
  return result


def _tables(runs: Sequence[Run]) -> list[Block]:
  """Returns a table of the runs with few distilled students, and tables with a row per student."""
  many = [run for run in runs if variants.in_rows(run.entries) or len(students(run.entries)) > 2]
  if many and all(group.variant for run in runs for group in students(run.entries)):
    many = list(runs)
  few = [run for run in runs if not any(run is other for other in many)]
  blocks: list[Block] = [_table(few), Text(_note(few))] if few else []
  return [*blocks, *_variant_tables(many)]


def _variant_tables(runs: Sequence[Run]) -> list[Block]:
  """Returns a table of all students; equal rows of several runs (teacher, baseline) occur once."""
  costs = any(variants.differ_in_size(run.entries) for run in runs)
  tables: dict[tuple[str, ...], tuple[dict[tuple[str, ...], Sequence[str]], list[Run]]] = {}
  for run in runs:
    table = variants.table(run.entries, run.metrics, run.facts, brief=True, costs=costs)
    rows, members = tables.setdefault(tuple(table.header), ({}, []))
    members.append(run)
    for row in table.rows:
      rows.setdefault(tuple(row[:3]), row)  # measured costs differ from run to run
  blocks: list[Block] = []
  for header, (rows, members) in tables.items():
    times = dict.fromkeys(variants.about_time(run.entries) for run in members)
    words = [_note(members), *times, _origin(members)]
    blocks += [Table(header, list(rows.values())), Text(" ".join(filter(None, words)))]
  return blocks


def _table(runs: Sequence[Run]) -> Table:
  header = ["Run", "Overrides", "Teacher", "Baseline", "Distilled", "Distilled − baseline"]
  header += ["Seeds", "Time", "Device", "Git"]
  rows = [_row(run, group) for run in runs for group in students(run.entries) or [Group("student")]]
  columns = [index for index in range(len(header)) if any(row[index] for row in rows)]
  return Table([header[index] for index in columns], [[row[i] for i in columns] for row in rows])


def _row(run: Run, group: Group) -> list[str]:
  facts = run.facts
  name = f"{run.name}: {group.variant}" if group.variant else run.name
  overrides = ", ".join(facts.get("overrides") or [])
  scores = [_score(run, g) for g in (_TEACHER, _BASELINE, group)]
  origin = [_seeds([run]) or MISSING, _time([run]), facts.get("device") or "", _revision(run)]
  return [name, overrides, *scores, _change(run, group), *origin]


def _series_table(varied: Series) -> Table:
  distilled = [group for group in _groups(varied.runs) if group.role == "student"]
  columns = [_TEACHER, _BASELINE, *distilled]
  gains = [f"{group.variant or 'Distilled'} − baseline" for group in distilled]
  rows = [
    [
      f"{value:g}",
      *(_score(run, group) for group in columns),
      *(_change(run, group) for group in distilled),
    ]
    for value, run in zip(varied.values, varied.runs)
  ]
  return Table([varied.field, *(group.title for group in columns), *gains], rows)


def _pictures(varied: Series, blocks: Sequence[Block]) -> list[Picture]:
  """Returns the curve in a file that none of the `blocks` has."""
  stem = re.sub(r"[^\w.]+", "-", f"{varied.runs[0].name}-{varied.field}")
  files = {block.file for block in blocks if isinstance(block, Picture)}
  names = [stem, *(f"{stem}-{number}" for number in range(2, len(files) + 3))]
  name = next(name for name in names if f"{name}.png" not in files)
  with style.context():
    caption = "Means over seeds, with one sample standard deviation."
    return style.pictures(name, _title(varied), caption, functools.partial(curve, varied))


def _title(varied: Series) -> str:
  first, *others = [run.facts.get("overrides") or [] for run in varied.runs]
  common = [text for text in first if all(text in overrides for overrides in others)]
  name = f"{varied.runs[0].name}{''.join(f', {text}' for text in common)}"
  return f"{name}: test {varied.runs[0].metric.title} against {varied.field}"


def _note(runs: Sequence[Run]) -> str:
  """Returns sentences on a table's numbers: metric, examples, seeds and parameters."""
  metric = runs[0].metric
  rows, seeds = runs[0].data[1], _seeds(runs)
  title = f"Test {metric.title}" + (f" in {unit(metric)}" if unit(metric) else "")
  examples = f" ({integer(rows)} examples)" if rows else ""
  over = f"{seeds} seeds" if seeds else "seeds"
  spread = (
    f"mean ± sample standard deviation over {over}, the difference paired by seed, with its 95 % "
    "confidence interval"
  )
  if seeds == "1":
    spread = "one seed, so there is no spread"
  words = f"{title}{examples}: {spread}."
  sizes = [(role, _sizes(runs, role)) for role in ("teacher", "student")]
  same = [f"{role} {integer(size.pop())}" for role, size in sizes if len(size) == 1]
  return f"{words} Parameters: {', '.join(same)}." if same else words


def _origin(runs: Sequence[Run]) -> str:
  """Returns a sentence on the runs' devices, time and revisions."""
  devices = {run.facts.get("device"): None for run in runs}
  revisions = {_revision(run): None for run in runs}
  parts = [*devices, _time(runs), *(f"git {revision}" for revision in revisions if revision)]
  return f"{', '.join(filter(None, parts))}." if any(parts) else ""


def _groups(runs: Sequence[Run]) -> list[Group]:
  return groups(entry for run in runs for entry in run.entries)


def _score(run: Run, group: Group) -> str:
  return mean(formatter(run.metric), over_seeds(run.entries, group, run.metric.name))


def _change(run: Run, group: Group) -> str:
  return difference(formatter(run.metric), gain(run.entries, group, run.metric.name))


def _seeds(runs: Sequence[Run]) -> str | None:
  """Returns how many seeds each student has; None where that differs or no student was trained."""
  numbers = {_num_seeds(run, group) for run in runs for group in run.groups if group != _TEACHER}
  return str(numbers.pop()) if len(numbers) == 1 else None


def _num_seeds(run: Run, group: Group) -> int:
  spread = over_seeds(run.entries, group, run.metric.name)
  return 0 if spread is None else spread.number


def _sizes(runs: Sequence[Run], role: str) -> set[float]:
  entries: Iterable[Entry] = (e for run in runs for e in run.entries if e.role == role)
  return {entry.values["parameters"] for entry in entries if "parameters" in entry.values}


def _time(runs: Sequence[Run]) -> str:
  seconds = sum(sum((run.facts.get("seconds") or {}).values()) for run in runs)
  if not seconds:
    return ""
  if seconds < 120:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _revision(run: Run) -> str:
  """Returns nine digits of the run's git revision, and whether the tree had uncommitted changes."""
  revision, _, state = (run.facts.get("git") or "").partition(" ")
  return revision[:9] + (" (changed)" if "changes" in state else "")
