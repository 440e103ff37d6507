"""Writes a report: the page of one run, its pictures and results.json."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill_jax.report import comparison, plots, series, sparsity, style, variants
from distill_jax.report.document import (
  Block,
  Code,
  Heading,
  Numbers,
  Picture,
  Sound,
  Text,
  to_html,
  to_markdown,
)
from distill_jax.report.entries import Entry, check, groups, one_per_group, students
from distill_jax.report.numbers import capitalized
from distill_jax.report.provenance import provenance
from distill_jax.report.stored import as_json
from distill_jax.storage import files, folders, sealed_json
from distill_jax.types import Metric, Task


def write(
  folder: str | Path,
  entries: Sequence[Entry],
  *,
  task: Task,
  references: Mapping[str, Any],
  class_names: Sequence[str] = (),
  run: Mapping[str, Any],
) -> Path:
  """Writes report.md, report.html (self-contained), results.json and the pictures into `folder`.

  Args:
    folder: created where it is missing; files of an earlier report are replaced.
    entries: the networks of the run, one per role, variant and seed; any role may be missing.
    task: its `metrics` are the rows of the tables, without those that no entry has; the first one
      heads the report. Its `figures` adds blocks.
    references: {name: array over all test examples} for `task.figures`: 'label', 'id', and 'image'
      if images are to be shown.
    class_names: names of the classes; empty: they have none.
    run: plain values, all optional: 'name', 'command', 'config', 'settings' (nested), 'overrides',
      'versions', 'git', 'device', 'seconds' (per stage), 'stopped' (why, per network whose training
      ended early), 'data' ('test': number of test examples), 'date'.

  Returns:
    The path of report.html, which is written last.

  Raises:
    ValueError: a role is unknown or repeated, a variant names no student, no entry has the first
      metric, or arrays differ in length. No file is written then.

  >>> import tempfile
  >>> from distill_jax import report, tasks
  >>> entries = [report.Entry("student", 0, {"accuracy": 0.92}, {}, history=[])]
  >>> task = tasks.classification()._replace(figures=None)
  >>> page = report.write(tempfile.mkdtemp(), entries, task=task, references={}, run={})
  >>> sorted(path.name for path in page.parent.iterdir())
  ['report.html', 'report.md', 'results.json']
  """
  check(entries, task.metrics, references)
  metrics = [m for m in task.metrics if any(m.name in entry.scores for entry in entries)]
  examples = _num_examples(run, references)
  with style.context():
    figures = task.figures(entries, references, class_names) if task.figures else []
    blocks = [
      *_comparison(entries, metrics, examples, run),
      *_learning_curves(entries, _metric_of_training(entries, metrics)),
      *_term_curves(entries, metrics),
      *(block for block in figures if not isinstance(block, Numbers)),
      *_sizes(entries, metrics[0]),
      *_series(entries, metrics),
      *_sparsity(entries, metrics[0]),
      *_texts(variants.few(entries)),
      *provenance(run),
    ]
  numbers = [block for block in figures if isinstance(block, Numbers)]
  title = f"Distillation report: {run['name']}" if run.get("name") else "Distillation report"
  return _write_files(
    folders.resolve(folder, "folder"), title, blocks, as_json(entries, metrics, run, numbers)
  )


def _write_files(
  folder: Path, title: str, blocks: Sequence[Block], content: Mapping[str, Any]
) -> Path:
  text = sealed_json.dumps(content, indent=2)
  folder.mkdir(parents=True, exist_ok=True)
  for block in blocks:
    if isinstance(block, Picture):
      files.write(folder / block.file, block.png)
    elif isinstance(block, Sound):
      files.write(folder / block.file, block.wav)
  files.write(folder / "results.json", text)
  files.write(folder / "report.md", to_markdown(title, blocks))
  files.write(folder / "report.html", to_html(title, blocks))
  return folder / "report.html"


def _num_examples(run: Mapping[str, Any], references: Mapping[str, Any]) -> int | None:
  """Returns the number of test examples; None where neither argument has it."""
  number = (run.get("data") or {}).get("test")
  ids = references.get("id")
  return len(ids) if number is None and ids is not None else number


def _comparison(
  entries: Sequence[Entry],
  metrics: Sequence[Metric],
  examples: int | None,
  run: Mapping[str, Any],
) -> list[Block]:
  if len(students(entries)) > style.STUDENTS:
    words = [variants.verdict(entries, metrics[0]), variants.left_out(entries)]
  else:
    words = comparison.verdicts(entries, metrics[0], examples)
  if variants.in_rows(entries):
    tables = [variants.table(entries, metrics, run)]
  else:
    shown = [metrics[0], *(metric for metric in metrics[1:] if metric.detail < 3)]
    tables = comparison.tables(entries, shown)
  has_spread = len(groups(entries)) < len(entries)
  spread = "one seed, so there is no spread"
  if has_spread:
    spread = "mean ± sample standard deviation over seeds"
  note = (
    f"Each number: {spread}. Differences to the baseline are paired by seed, in the row's unit, "
    "with their 95 % confidence interval where there are several seeds. "
    "↑ higher is better, ↓ lower is better. All scores are of the test split. "
    f"{variants.about_time(entries)}"
  )
  speed = variants.about_speed(entries)
  return [*map(Text, words), *tables, Text(note.rstrip()), *([Text(speed)] if speed else [])]


def _metric_of_training(entries: Sequence[Entry], metrics: Sequence[Metric]) -> Metric:
  """Returns the first metric that training evaluated; the first one where it evaluated none."""
  lines = (line for entry in entries for line in entry.history)
  names = {name for line in lines if line.get("phase") == "validation" for name in line}
  return next((metric for metric in metrics if metric.name in names), metrics[0])


def _learning_curves(entries: Sequence[Entry], metric: Metric) -> list[Block]:
  draw = functools.partial(plots.learning_curves, variants.few(entries), metric)
  caption = (
    "The training loss, whose terms differ with the objective, so its level compares runs of one "
    f"role only, and {metric.title} on the validation split. Line: mean over seeds; band: ± one "
    "sample standard deviation."
  )
  title = "Learning curves"
  return _drawn(title, "curves", title, caption, draw)


def _term_curves(entries: Sequence[Entry], metrics: Sequence[Metric]) -> list[Block]:
  draw = functools.partial(plots.term_curves, variants.few(entries), metrics)
  caption = (
    "The objective on the validation split, each of its terms in training (unweighted), and the "
    "learning rate. Networks with other objectives have other terms."
  )
  title = "Losses and learning rate"
  return _drawn(title, "terms", title, caption, draw)


def _sizes(entries: Sequence[Entry], metric: Metric) -> list[Block]:
  draw = functools.partial(plots.score_against_parameters, variants.few(entries), metric)
  caption = (
    "Large markers: means over seeds, with one sample standard deviation; small ones: seeds. "
    "Baseline and distilled students of one size are drawn next to one another."
  )
  title = f"Test {metric.title} against parameters"
  heading = f"{capitalized(metric.title)} against size"
  return _drawn(heading, "parameters", title, caption, draw)


def _series(entries: Sequence[Entry], metrics: Sequence[Metric]) -> list[Block]:
  """Returns a picture where students differ in one number."""
  draw = functools.partial(series.score_against_number, entries, metrics)
  caption = (
    "K is the number that ends a student's name. Means over seeds with one sample standard "
    "deviation. Level lines: the teacher, the baseline and the first distilled student whose name "
    "has no number."
  )
  titles = " and ".join(metric.title for metric in series.panels(metrics))
  heading = f"{capitalized(metrics[0].title)} against K"
  return _drawn(heading, "series", f"Test {titles} against K", caption, draw)


def _sparsity(entries: Sequence[Entry], metric: Metric) -> list[Block]:
  """Returns costs and layers where some students are smaller or sparser than others."""
  if not variants.differ_in_size(entries):
    return []
  draw = functools.partial(sparsity.score_against_costs, entries, metric)
  caption = (
    "Means over seeds, with one sample standard deviation of the score; costs on a logarithmic "
    "axis."
  )
  title = f"Test {metric.title} against what each network costs"
  blocks = _drawn(f"{capitalized(metric.title)} against cost", "costs", title, caption, draw)
  layers = sparsity.table(entries)
  if layers is not None:
    text = "Of each array, for one seed: nonzero values, and the fraction that is zero."
    blocks += [Heading("Sparsity by layer"), Text(text), layers]
  return blocks


def _drawn(
  heading: str, name: str, title: str, caption: str, draw: Callable[[float], Figure | None]
) -> list[Block]:
  """Returns a heading and a picture; nothing where there is nothing to draw."""
  pictures = style.pictures(name, title, caption, draw)
  return [Heading(heading), *pictures] if pictures else []


def _texts(entries: Sequence[Entry]) -> list[Block]:
  """Returns the texts of one network per group."""
  texts = [(group, e) for group, e in one_per_group(entries).items() if e.text]
  blocks: list[Block] = [Heading("In the networks' own words")] if texts else []
  for group, entry in texts:
    blocks += [Text(f"{group.title}, seed {entry.seed}:"), Code(entry.text)]
  return blocks
