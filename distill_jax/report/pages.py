"""What a report says, in order; writes its files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill_jax.report import classes, comparison, plots, series, sparsity, style, variants
from distill_jax.report.document import Block, Code, Heading, Picture, Text, to_html, to_markdown
from distill_jax.report.gallery import SHOWN, compare, gallery
from distill_jax.report.headline import headline
from distill_jax.report.provenance import provenance
from distill_jax.report.results import (
  Entry,
  Measured,
  check,
  examples,
  groups,
  measure,
  pairs,
  students,
)
from distill_jax.report.stored import as_json
from distill_jax.storage import files


def write(
  folder,
  entries: Sequence[Entry],
  *,
  labels,
  images,
  ids,
  class_names: Sequence[str],
  run: Mapping[str, Any],
) -> Path:
  """Write report.md, report.html (self-contained), results.json and the pictures into `folder`.

  Args:
    folder: made where it is missing; files of an earlier report are replaced.
    entries: the networks of the run, one per role, variant and seed; any role may be missing.
    labels: int [N], of the test split; negative: unlabeled, left out of all but the comparison with the
      teacher. Of a language model's rows, [N, L].
    images: [N, H, W, C], or None for examples that are no images.
    ids: [N], of the test split, shown with the images.
    class_names: one per class, any text.
    run: plain values, all optional: 'name', 'command', 'config', 'settings' (nested), 'overrides',
      'versions', 'git', 'device', 'seconds' (per stage), 'data', 'date'.

  Returns:
    The path of report.html, which is written last.

  Raises:
    ValueError: an unknown or repeated role, a variant that names no student, or shapes that do
      not fit one another.
  """
  labels, ids = np.asarray(labels), np.asarray(ids)
  check(entries, labels, images, ids, class_names)
  measured = measure(entries, labels)
  few = variants.few(measured)
  language = any("confusion" not in m.counts for m in measured)
  scores = [] if language else classes.by_class(few, class_names)
  with style.context():
    blocks = [
      *_comparison(measured, scores, int((labels >= 0).sum()), len(class_names), run),
      *_pictures([m.entry for m in few], few, class_names),
      *_series(measured),
      *_small(measured),
      *_by_class(scores, class_names),
      *([] if language else _disagreements(few, images, ids, labels, class_names)),
      *_written(few),
      *provenance(run),
    ]
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  title = f"Distillation report: {run['name']}" if run.get("name") else "Distillation report"
  for block in blocks:
    if isinstance(block, Picture):
      files.write(folder / block.file, block.png)
  by_class = [] if language else classes.by_class(measured, class_names)
  numbers = json.dumps(
    as_json(measured, by_class, run), indent=2, ensure_ascii=False, allow_nan=False
  )
  files.write(folder / "results.json", numbers)
  files.write(folder / "report.md", to_markdown(title, blocks))
  files.write(folder / "report.html", to_html(title, blocks))
  return folder / "report.html"


def _comparison(
  measured: Sequence[Measured],
  scores: Sequence[classes.ClassScores],
  rows: int,
  number: int,
  run: Mapping[str, Any],
) -> list[Block]:
  several = len(groups(m.entry for m in measured)) < len(measured)
  spread = (
    "mean ± sample standard deviation over seeds" if several else "one seed, so there is no spread"
  )
  many = len(students(measured)) > style.STUDENTS
  in_rows = variants.in_rows(measured)
  return [
    *map(Text, [variants.verdict(measured)] if many else comparison.verdicts(measured, rows)),
    *([Text(variants.left_out(measured))] if many else []),
    *(Text(classes.words(scores, group)) for group in classes.compared(scores)),
    *([variants.table(measured, run)] if in_rows else comparison.tables(measured, number)),
    Text(
      f"Each number: {spread}. Differences to the student alone are paired by seed, in the row's unit. "
      "↑ higher is better, ↓ lower is better. All scores are of the test split. "
      f"{variants.about_time(measured)}".rstrip()
    ),
  ]


def _pictures(
  entries: Sequence[Entry], measured: Sequence[Measured], class_names: Sequence[str]
) -> list[Block]:
  chosen = examples(measured)
  blocks: list[Block] = []
  main = headline(measured)
  curves = plots.learning_curves(entries, main)
  if curves:
    blocks += [
      Heading("Learning curves"),
      _picture(
        "curves",
        "Learning curves",
        "Left: the training loss; what it sums differs with the objective, so its level compares runs of one "
        f"role only. Right: {main.name} on the validation split. Line: mean over seeds; band: ± one sample "
        "standard deviation.",
        curves,
      ),
    ]
  if all("confusion" in m.counts for m in measured):
    confusion = _picture(
      "confusion",
      "Confusion matrices",
      "Rows are true classes, columns predictions; the color is the share of the row's examples"
      + (", the number their count." if len(class_names) <= plots.ANNOTATED else ".")
      + _unseen(next(iter(chosen.values())), class_names),
      plots.confusion(chosen, class_names),
    )
    blocks += [Heading("Confusion matrices"), confusion]
  blocks += [
    Heading("Calibration"),
    _picture(
      "reliability",
      "Reliability diagrams",
      "Bars: accuracy of the predictions of each confidence; markers stand at their mean confidence. On the "
      "diagonal confidence equals accuracy; markers below it are overconfident. ECE, the expected calibration "
      "error, is their mean distance from it, weighted with the share of predictions shown below.",
      plots.reliability(chosen),
    ),
  ]
  size = plots.score_against_parameters(measured)
  if size:
    caption = (
      "Large markers: means over seeds, with one sample standard deviation; small ones: seeds. Student alone "
      "and distilled are the same size and drawn side by side."
    )
    blocks += [
      Heading(f"{main.name.capitalize()} against size"),
      _picture("parameters", f"Test {main.name} against parameters", caption, size),
    ]
  return blocks


def _series(measured: Sequence[Measured]) -> list[Block]:
  """Where students differ in a number alone."""
  picture = series.score_against_number(measured)
  if picture is None:
    return []
  main = headline(measured).name
  caption = (
    "Students whose names end in a number, against it: means over seeds with one sample standard deviation. Level "
    "lines: the teacher, the student alone and the first distilled one whose name does not."
  )
  title = f"Test {main} and calibration against the number"
  return [
    Heading(f"{main.capitalize()} against the number"),
    _picture("series", title, caption, picture),
  ]


def _small(measured: Sequence[Measured]) -> list[Block]:
  """Where some students are smaller or sparser than others."""
  if not variants.differ_in_size(measured):
    return []
  layers, costs = sparsity.table(measured), sparsity.score_against_costs(measured)
  main = headline(measured).name
  blocks: list[Block] = []
  if costs is not None:
    caption = "Means over seeds, with one sample standard deviation of the score; costs on a logarithmic axis."
    blocks += [
      Heading(f"{main.capitalize()} against cost"),
      _picture("costs", f"Test {main} against what each network costs", caption, costs),
    ]
  if layers is not None:
    text = "Of each array, of one seed: numbers that are not zero, and the share that is."
    blocks += [Heading("Sparsity by layer"), Text(text), layers]
  return blocks


def _by_class(scores: Sequence[classes.ClassScores], class_names: Sequence[str]) -> list[Block]:
  compared = classes.compared(scores)
  if not compared:
    return []
  last = compared[-1].variant or "the student distilled"
  caption = (
    f"Means over seeds, and the gain of {last} over the student alone, paired by seed. "
    f"One test example of a class is {classes.one_example(scores)} points."
  )
  if len(scores) > classes.NAMED:
    half = classes.NAMED // 2
    caption += f" Left: the gain of each class. Right: the {half} that gain most and the {half} that gain least."
  picture = classes.class_gains(scores, class_names)
  return [Heading("Gains by class"), _picture("classes", "Accuracy by class", caption, picture)]


def _disagreements(measured, images, ids, labels, class_names) -> list[Block]:
  compared = [group for group in students(measured) if pairs(measured, group)]
  blocks: list[Block] = []
  for group in compared:
    student, baseline = (m.entry for m in pairs(measured, group)[0])
    won, lost = compare(student, baseline, labels)
    name = f" ({group.variant})" if group.variant else ""
    text = (
      f"Of {len(labels)} test examples (seed {student.seed}), the student distilled{name} is right and the "
      f"student alone wrong on {len(won)}; the opposite is the case on {len(lost)}."
    )
    blocks.append(Text(text))
  if blocks and images is not None and len(won):
    picture = gallery(won, images, ids, labels, baseline, class_names)
    caption = (
      f"{'All' if len(won) <= SHOWN else f'The first {SHOWN} of the'} {len(won)}, in test order: the true "
      f"class, which the distilled student{name} gives, and what the student alone says."
    )
    blocks.append(_picture("disagreements", "Right when distilled, wrong alone", caption, picture))
  return (
    [Heading("Where the distilled student is right and the plain one wrong"), *blocks]
    if blocks
    else []
  )


def _written(measured: Sequence[Measured]) -> list[Block]:
  """What the networks have to show, of one seed each."""
  shown = [(group, m.entry) for group, m in examples(measured).items() if m.entry.text]
  blocks: list[Block] = [Heading("In the networks' own words")] if shown else []
  for group, entry in shown:
    blocks += [Text(f"{group.title}, seed {entry.seed}:"), Code(entry.text)]
  return blocks


def _picture(name: str, title: str, caption: str, picture: Figure) -> Picture:
  return Picture(f"{name}.png", title, caption, style.to_png(picture), picture.get_figwidth())


def _unseen(measured: Measured, class_names: Sequence[str]) -> str:
  absent = np.flatnonzero(np.asarray(measured.counts["confusion"]).sum(1) == 0)
  if not len(absent):
    return ""
  names = ", ".join(str(class_names[c]) for c in absent[:10]) + (", …" if len(absent) > 10 else "")
  return f" Without a test example: {names} ({len(absent)} of {len(class_names)} classes)."
