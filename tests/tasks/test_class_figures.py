"""The parts of a report that show classes."""

import json

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy.special import softmax

from distill_jax import report, tasks
from distill_jax.report import style
from distill_jax.report.document import Heading, Numbers, Picture, Text
from distill_jax.report.entries import Group, Spread, one_per_group
from distill_jax.tasks._class_figures import (
  calibration,
  calibration_figures,
  class_figures,
  confusion,
  gains,
  gallery,
  reliability,
)
from distill_jax.tasks._class_figures.labels import class_labels

BASELINE, STUDENT = Group("baseline"), Group("student")
SKILL = {"teacher": 3.0, "baseline": 0.8, "student": 1.6}
ROWS, CLASSES, BINS = 80, 4, 15


def make_labels(rows=ROWS, classes=CLASSES):
  return np.random.default_rng(3).integers(0, classes, rows)


def statistics_of(logits, labels):
  """Returns the sums of a task, written from their definitions in float64."""
  classes, labeled = logits.shape[1], labels >= 0
  p = softmax(logits[labeled].astype(np.float64), -1)
  predicted, truth = p.argmax(-1), labels[labeled]
  matrix = reference.confusion_matrix(truth, predicted, labels=range(classes))
  index = np.ceil(p.max(-1) * BINS).astype(int) - 1
  columns = np.stack([np.ones(len(truth)), p.max(-1), predicted == truth], -1)
  sums = np.stack([columns[index == b].sum(0) for b in range(BINS)])
  counts = np.stack([matrix.diagonal(), matrix.sum(0), matrix.sum(1)], -1)
  return {"calibration": sums, "confusion": matrix, "per_class": counts}


def make_entry(role, seed, logits, labels, variant=""):
  predictions = {"class": logits.argmax(-1), "confidence": softmax(logits, -1).max(-1)}
  statistics = statistics_of(logits, labels)
  scores = {"accuracy": float((predictions["class"] == labels).mean())}
  return report.Entry(role, seed, scores, {}, [], variant, statistics, predictions)


def make_entries(labels, *, seeds=(0, 1, 2), roles=tuple(SKILL), classes=CLASSES, variants=("",)):
  rng, entries = np.random.default_rng(7), []
  for role in roles:
    for variant in variants if role == "student" else ("",):
      for seed in seeds[:1] if role == "teacher" else seeds:
        logits = rng.normal(size=(len(labels), classes)) + SKILL[role] * np.eye(classes)[labels]
        entries.append(make_entry(role, seed, logits, labels, variant))
  return entries


def references_of(labels, **others):
  return {"label": labels, "id": np.arange(len(labels)) + 100, **others}


def headings(blocks):
  return [block.text for block in blocks if isinstance(block, Heading)]


def pictures(blocks):
  return [block.file for block in blocks if isinstance(block, Picture)]


def texts(blocks):
  return "\n".join(block.text for block in blocks if isinstance(block, Text))


def test_a_report_has_every_block_and_the_classes_numbers(tmp_path):
  labels = make_labels()
  entries = make_entries(labels, seeds=(0,))
  images = np.random.default_rng(0).random((ROWS, 4, 4, 1))
  report.write(
    tmp_path,
    entries,
    task=tasks.classification(),
    references=references_of(labels, image=images),
    class_names=list("abcd"),
    run={},
  )
  names = {path.stem for path in tmp_path.glob("*.png")}
  assert names == {"confusion", "reliability", "classes", "disagreements"}
  markdown = (tmp_path / "report.md").read_text()
  positions = [markdown.index(f"]({name}.png)") for name in ("confusion", "reliability", "classes")]
  assert positions == sorted(positions)
  numbers = json.loads((tmp_path / "results.json").read_text())
  assert [row["name"] for row in numbers["classes"]] == list("abcd")


def test_blocks_without_inputs_are_left_out():
  labels = make_labels(20)
  references = references_of(labels, image=np.zeros((20, 2, 2, 1)))
  bare = [e._replace(statistics=None, predictions=None) for e in make_entries(labels, seeds=(0,))]
  assert class_figures(bare, references) == [] and calibration_figures(bare) == []
  entries = make_entries(labels, seeds=(0,))

  def only(*names, predictions=False):
    return [
      e._replace(
        statistics={name: e.statistics[name] for name in names},
        predictions=e.predictions if predictions else None,
      )
      for e in entries
    ]

  assert headings(class_figures(only("calibration"), references)) == ["Calibration"]
  assert pictures(class_figures(only("per_class"), references)) == ["classes.png"]
  lone = [e for e in only("per_class") if e.role == "student"]
  assert [type(block) for block in class_figures(lone, references)] == [Numbers]
  predicted = only(predictions=True)
  assert pictures(class_figures(predicted, references)) == ["disagreements.png"]
  without_images = class_figures(predicted, references_of(labels))
  assert len(without_images) == 2 and pictures(without_images) == []
  assert class_figures(predicted, {}) == []


def test_names_must_fit_the_classes():
  entries = make_entries(make_labels(), seeds=(0,))
  with pytest.raises(ValueError, match="class_names: .* 4 .* 3"):
    class_figures(entries, {}, ["a", "b", "c"])


def test_gains_by_class_are_recalls_paired_by_seed():
  labels = make_labels()
  labels[labels == 2] = 0  # class 2 has no example
  entries = [e for e in make_entries(labels) if (e.role, e.seed) != ("baseline", 2)]
  recall = {
    (e.role, e.seed): reference.recall_score(
      labels, e.predictions["class"], labels=range(4), average=None, zero_division=0
    )
    for e in entries
  }
  scores = gains.by_class(entries, ["a", "b", "c", "d"])
  assert [row.name for row in scores] == ["a", "b", "d"]
  for row in scores:
    assert row.examples == (labels == row.number).sum()
    baseline = [recall["baseline", seed][row.number] for seed in (0, 1)]
    distilled = [recall["student", seed][row.number] for seed in (0, 1, 2)]
    gain = [a - b for a, b in zip(distilled, baseline)]
    assert row.score[BASELINE].mean == pytest.approx(np.mean(baseline))
    assert row.score[STUDENT].mean == pytest.approx(np.mean(distilled))
    assert row.gain[STUDENT][:3] == pytest.approx((np.mean(gain), np.std(gain, ddof=1), 2))
  best = max(scores, key=lambda row: row.gain[STUDENT].mean)
  start = f"in points: {best.name} (+{100 * best.gain[STUDENT].mean:.2f})"
  assert start in gains.words(scores, STUDENT)


def class_scores(values, rows=50):
  return [
    gains.ClassScores(
      number,
      f"c{number}",
      rows,
      {BASELINE: Spread(0.5, None, 1), STUDENT: Spread(0.5 + value, None, 1)},
      {STUDENT: Spread(value, None, 1)},
    )
    for number, value in enumerate(values)
  ]


@pytest.mark.parametrize(
  "values, words",
  [
    ([0.1, -0.02, 0.0], "c0 (+10.00) gains; c1 (−2.00) loses; 1 of 3 classes does not change."),
    (
      [0.1, 0.2, 0.4, 0.3],
      "c2 (+40.00), c3 (+30.00), c1 (+20.00) gain most (4 gain); no class loses.",
    ),
    ([-0.1, -0.2], "no class gains; c1 (−20.00), c0 (−10.00) lose."),
    ([-1e-12, 1e-12], "no class gains; no class loses; 2 of 2 classes do not change."),
  ],
)
def test_words_name_the_classes_that_change_most(values, words):
  assert gains.words(class_scores(values), STUDENT).endswith(f"in points: {words}")


@pytest.mark.parametrize("number", [1, 24, 25])
def test_picture_names_all_of_few_classes_and_the_ends_of_many(number):
  values = np.random.default_rng(0).permutation(np.linspace(-0.4, 0.4, number + 1)[:number])
  drawing = gains.class_gains(class_scores(values))
  order = [f"c{n}" for n in np.argsort(values)]
  named = drawing.axes[-1]
  labels = [label.get_text() for label in named.get_yticklabels()]
  assert labels == (order if number <= 24 else order[:12] + order[-12:])

  def points(title):
    return [line.get_xdata()[0] for line in named.lines if line.get_label() == title]

  np.testing.assert_allclose(points("Baseline"), 50)
  expected = np.sort(values) if number <= 24 else np.sort(values)[[*range(12), *range(-12, 0)]]
  np.testing.assert_allclose(points("Student distilled"), 50 + 100 * expected)
  if number > 24:
    bars = [bar.get_width() for bar in drawing.axes[0].patches]
    np.testing.assert_allclose(bars, 100 * np.sort(values))
    assert "1 class between" in named.texts[-1].get_text()


def test_pictures_show_the_first_of_many_variants():
  labels = make_labels()
  names = [f"v{i}" for i in range(7)]
  entries = make_entries(labels, seeds=(0,), roles=("baseline", "student"), variants=names)
  for number, entry in enumerate(entries):
    per_class = {"per_class": entry.statistics["per_class"]}
    entries[number] = entry._replace(statistics=per_class)
  blocks = class_figures(entries, references_of(labels), list("abcd"))
  (numbers,) = [block for block in blocks if isinstance(block, Numbers)]
  assert "student: v6" in numbers.values[0]["gain"]
  assert "student (v4) is correct" in texts(blocks) and "(v5)" not in texts(blocks)
  (caption,) = [b.caption for b in blocks if isinstance(b, Picture) and b.file == "classes.png"]
  assert "the gain of v4" in caption and "80 test examples is 1.25 points" in caption


@pytest.mark.parametrize("classes", [2, 20, 21])
def test_confusion_matrices_have_counts_of_few_classes(classes):
  labels = np.arange(200) % classes
  chosen = one_per_group(make_entries(labels, seeds=(1,), classes=classes))
  matrices = {group: (1, entry.statistics["confusion"]) for group, entry in chosen.items()}
  drawing = confusion.draw(matrices, [f"class number {c}" for c in range(classes)])
  titles = ["Teacher", "Baseline", "Student distilled"]
  for axes, title, (_, truth) in zip(drawing.axes, titles, matrices.values()):
    (image,) = axes.images
    fractions = truth / np.maximum(truth.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(image.get_array(), fractions)
    counts = {
      (int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text()) for t in axes.texts
    }
    nonzero = {position: int(n) for position, n in np.ndenumerate(truth) if n}
    assert counts == (nonzero if classes <= 20 else {})
    assert len(axes.get_xticks()) == (classes if classes <= 20 else 7)
    assert axes.get_title(loc="center") + axes.get_title(loc="left") == f"{title}, seed 1"


def test_classes_without_example_and_names_hard_to_draw():
  labels = np.arange(300) % 100
  labels[labels == 3] = 4
  names = [f"a long class name $number_{number}$ <b>" for number in range(98)] + ["日本語", ""]
  names[0], names[3] = r"$\frac$", "abs|ent"  # as mathematics, the first cannot be drawn
  entries = make_entries(labels, seeds=(0,), classes=100, roles=("baseline", "student"))
  references = references_of(labels, image=np.zeros((300, 9, 5, 1), np.uint8))
  blocks = class_figures(entries, references, names)
  captions = {block.file: block.caption for block in blocks if isinstance(block, Picture)}
  assert captions["confusion.png"].endswith("example: abs|ent (1 of 100 classes).")
  assert len(captions) == 4


def test_reliability_is_the_accuracy_at_the_mean_confidence():
  labels = make_labels()
  chosen = one_per_group(make_entries(labels, seeds=(0,)))
  drawing = calibration.draw(chosen)
  for axes, entry in zip(drawing.axes[:3], chosen.values()):
    confidence = entry.predictions["confidence"]
    correct = entry.predictions["class"] == labels
    index = np.ceil(confidence * BINS)
    bins = [index == b for b in np.unique(index)]
    expected = [[100 * confidence[b].mean(), 100 * correct[b].mean()] for b in bins]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), expected, rtol=1e-6)
    ece = sum(abs(correct[b].mean() - confidence[b].mean()) * b.mean() for b in bins)
    assert f"ECE {100 * ece:.2f} %" in axes.get_title() + axes.get_title(loc="left")
    counts = [text.get_text() for text in drawing.axes[drawing.axes.index(axes) + 3].texts]
    assert counts == [str(b.sum()) for b in bins]


def test_reliability_of_an_empty_bin_is_zero():
  diagram = reliability({"calibration": [[0, 0, 0], [4, 3.0, 2]]})
  expected = {
    "edges": [0, 0.5, 1],
    "number": [0, 4],
    "confidence": [0, 0.75],
    "accuracy": [0, 0.5],
  }
  assert {name: values.tolist() for name, values in diagram.items()} == expected


def test_diagrams_of_several_variants_can_be_drawn():
  labels = make_labels(30)
  entries = one_per_group(make_entries(labels, seeds=(0,), variants=list("ab")))
  with style.context():
    drawing = calibration.draw(entries)
    drawing.draw_without_rendering()
  titles = [axes.get_title(loc="left").split(",")[0] for axes in drawing.axes]
  expected = ["Teacher", "Baseline", *(f"Distilled: {name}" for name in "ab")]
  assert [title for title in titles if title] == expected


@pytest.mark.parametrize(
  "shape, dtype", [((8, 8, 1), np.float32), ((4, 12, 3), np.uint8), ((30, 5, 2), np.float64)]
)
def test_gallery_shows_where_only_distilled_is_correct(shape, dtype):
  labels = make_labels(200)
  labels[0] = -1
  baseline, student = make_entries(labels, seeds=(0,), roles=("baseline", "student"))
  rows = gallery.compare(student, baseline, labels)
  other, distilled = (e.predictions["class"] == labels for e in (baseline, student))
  assert list(rows.won) == [r for r in range(1, 200) if distilled[r] and not other[r]]
  assert list(rows.lost) == [r for r in range(1, 200) if other[r] and not distilled[r]]
  images = (np.random.default_rng(0).random((200, *shape)) * 255).astype(dtype)
  names = ["zero", "one", r"$\frac$", "three"]
  references = references_of(labels, image=images)
  drawing = gallery.gallery(rows.won, references, baseline, names)
  assert len(drawing.axes) == min(24, len(rows.won))
  for axes, row in zip(drawing.axes, rows.won):
    predicted = names[baseline.predictions["class"][row]]
    below = [text.get_text() for text in axes.texts]
    assert below == [f"true: {names[labels[row]]}", f"baseline: {predicted}"]
    assert axes.get_title() == f"id {row + 100}"
    pixels = images[row].astype(np.float64)
    low, high = (0, 255) if dtype == np.uint8 else (images.min(), images.max())
    expected = (pixels - low) / (high - low)
    expected = expected if shape[-1] == 3 else expected.mean(-1)
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-6)
  with pytest.raises(ValueError, match=r"references\['image'\]"):
    gallery.gallery(rows.won, references_of(labels, image=images[0]), baseline, names)
  others = np.zeros_like(images)
  clips = np.stack([others, images, others], 1)
  clips = gallery.gallery(rows.won, references_of(labels, image=clips), baseline, names)
  middle = [axes.images[0].get_array() for axes in clips.axes]
  expected = [axes.images[0].get_array() for axes in drawing.axes]
  np.testing.assert_array_equal(middle, expected)


def test_labels_fit_and_differ():
  names = [
    "cat",
    "a very long name 1",
    "a very long name 2",
    "日本",
    " two\nlines ",
    "naïve",
    "",
    "cat",
  ]
  labels = class_labels(names, 12)
  assert labels == [
    "0 cat…",
    "1 a very lo…",
    "2 a very lo…",
    "class 3",
    "two lines",
    "naïve",
    "class 6",
    "7 cat…",
  ]
  assert max(map(len, labels)) <= 12
