"""The parts of a report that show a segmentation: scores of classes, and examples."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from sklearn import metrics as sk

from distill_jax import report, tasks
from distill_jax.report import style
from distill_jax.report.document import Heading, Numbers, Picture, Table, Text
from distill_jax.tasks._class_figures import map_gallery
from distill_jax.tasks._class_figures.map_examples import choose

NAMES = ("land", "water", "lake")
SKILL = {"teacher": 0.95, "baseline": 0.6, "student": 0.8}


def make_maps(seed=0, shape=(9, 6, 8), classes=3):
  rng = np.random.default_rng(seed)
  label = rng.integers(0, classes, shape)
  label[..., 0] = 255
  images = rng.random((*shape, 1)).astype(np.float32)
  return label, images


def make_entry(role, seed, label, task, classes=3):
  """Returns an entry whose predictions are right on a part of the pixels."""
  rng = np.random.default_rng(10 * seed + len(role))
  true = np.where(label == 255, 0, label)
  other = rng.integers(0, classes, label.shape)
  predicted = np.where(rng.random(label.shape) < SKILL[role], true, other)
  counted = label != 255
  matrix = sk.confusion_matrix(label[counted], predicted[counted], labels=range(classes))
  sums = {"confusion": np.stack([matrix >> 12, matrix & 4095]), "nan": 0}
  iou = [
    sk.jaccard_score(a[b], c[b], average="macro") for a, b, c in zip(label, counted, predicted)
  ]
  predictions = {"class": predicted.astype(np.uint8), "iou": np.array(iou)}
  return report.Entry(role, seed, task.compute(sums), {}, [], "", sums, predictions)


def make_entries(label, task, seeds=(0, 1, 2), classes=3, roles=tuple(SKILL)):
  return [
    make_entry(role, seed, label, task, classes)
    for role in roles
    for seed in (seeds[:1] if role == "teacher" else seeds)
  ]


def blocks_of(task, entries, label, names=NAMES, **references):
  with style.context():
    return task.figures(entries, {"label": label, **references}, names)


def of_type(blocks, kind):
  return [block for block in blocks if isinstance(block, kind)]


@pytest.mark.parametrize("class_names", [NAMES, ()])
def test_report_has_scores_of_classes_and_examples(class_names):
  label, images = make_maps(shape=(2, 6, 8))
  task = tasks.segmentation(ignore_label=255, class_names=class_names)
  entries = make_entries(label, task)
  blocks = blocks_of(task, entries, label, image=images, id=np.arange(2) + 50)
  assert [b.text for b in of_type(blocks, Heading)] == ["Scores by class", "Examples"]
  assert [b.file for b in of_type(blocks, Picture)] == ["classes.png", "examples.png"]
  assert all(name in of_type(blocks, Text)[0].text for name in NAMES)
  (table,) = of_type(blocks, Table)
  rows = {row[0]: dict(zip(table.header, row)) for row in table.rows}
  scores = [e.scores[f"iou/{class_names[1] if class_names else 1}"] for e in entries]
  cell = rows["IoU of water, % ↑"]["Student distilled"]
  assert cell.startswith(f"{100 * np.mean(scores[4:]):.2f}")
  assert len(rows) == 1 + 2 * 3
  (numbers,) = of_type(blocks, Numbers)
  assert [n["pixels"] for n in numbers.values] == [(label == c).sum() for c in range(3)]


def test_examples_are_chosen_by_a_rule():
  gain = np.array([0.1, np.nan, -0.3, 0.5, 0.0, 0.2, -0.1, 0.01, -0.2, 0.0])
  rows = choose(gain)
  reasons = {reason: {r for r in rows if rows[r] == reason} for reason in rows.values()}
  assert reasons["largest gain"] == {3, 5} and reasons["largest loss"] == {2, 8}
  assert len(reasons["random"]) == 2 and 1 not in rows
  assert set(choose(np.zeros(8)).values()) == {"random"} and len(choose(np.zeros(8))) == 6
  assert choose(np.full(3, np.nan)) == {}


def drawn(monkeypatch, task, entries, label, names=NAMES, page=style.PAGE, **references):
  """Returns the rows that the picture of examples shows, and its figure."""
  drawings = {}

  def record(name, title, caption, draw):
    drawings[name] = draw(page) if name == "examples" else None
    drawings["rows"] = draw.args[0]
    return []

  monkeypatch.setattr(style, "pictures", record)
  blocks_of(task, entries, label, names, **references)
  return drawings["rows"], drawings["examples"]


def panels_of(figure, row=0):
  return {a.get_title(): a.images[0].get_array() for a in figure.subfigs[row].axes if a.images}


@pytest.mark.parametrize("page", [style.PAGE, style.PHONE])
def test_panels_show_label_predictions_and_wrong_pixels(monkeypatch, page):
  label, images = make_maps(shape=(2, 6, 8))
  task = tasks.segmentation(ignore_label=255)
  entries = make_entries(label, task)
  rows, figure = drawn(monkeypatch, task, entries, label, page=page, image=images)
  gain = entries[4].predictions["iou"] - entries[1].predictions["iou"]
  first = int(np.argmax(gain))
  assert rows[0].title.startswith(f"id {first}: largest gain")
  panels = panels_of(figure)
  assert [title.split(":")[0] for title in panels] == [
    "Image", "Label", "Teacher", "Baseline", "Distilled", "Wrong pixels"
  ]  # fmt: skip
  colors = np.array([to_rgb(c) for c in map_gallery._COLORS[:3]])
  counted = label[first] != 255
  gray = to_rgb(map_gallery._IGNORED)
  expected = np.where(counted[..., None], colors[np.where(counted, label[first], 0)], gray)
  np.testing.assert_allclose(panels["Label"], expected)
  np.testing.assert_allclose(panels["Image"], images[first, ..., 0], atol=1e-6)
  baseline, student = (e.predictions["class"][first] != label[first] for e in entries[1:5:3])
  wrong = np.ones((*counted.shape, 3))
  wrong[baseline] = to_rgb(style.LOOKS["baseline"].color)
  wrong[student] = to_rgb(style.LOOKS["student"].color)
  wrong[baseline & student] = to_rgb(map_gallery._BOTH_WRONG)
  wrong[~counted] = gray
  np.testing.assert_allclose(panels["Wrong pixels"], wrong)
  figure.draw_without_rendering()
  assert figure.get_tightbbox().width <= page


def test_volumes_show_their_middle_slice_and_many_classes_share_a_color(monkeypatch):
  label, images = make_maps(shape=(3, 5, 6, 7), classes=12)
  task = tasks.segmentation(ignore_label=255)
  entries = make_entries(label, task, (0,), 12, roles=("baseline",))
  names = [f"c{i}" for i in range(12)]
  rows, figure = drawn(monkeypatch, task, entries, label, names, image=images)
  assert len(rows) == 3 and rows[0].wrong is None
  row = int(rows[0].title.split(":")[0].removeprefix("id "))
  np.testing.assert_array_equal(rows[0].label, np.where(label == 255, -1, label)[row, 2])
  np.testing.assert_allclose(panels_of(figure)["Image"], images[row, 2, ..., 0], atol=1e-6)
  texts = [t.get_text() for t in figure.subfigs[-1].legends[0].get_texts()]
  assert len(texts) == 9 and texts[-2:] == ["5 other classes", "ignored"]


def test_nothing_is_shown_without_labels():
  label, _ = make_maps()
  task = tasks.segmentation(ignore_label=255)
  entries = [e._replace(statistics=None) for e in make_entries(label, task, (0,))]
  assert task.figures(entries, {}, NAMES) == []


def test_scores_of_cases_are_in_the_table(monkeypatch):
  label, _ = make_maps(shape=(2, 6, 8))
  task = tasks.segmentation(ignore_label=255, cases=tasks.Cases())
  scores = {"case_dice/1": 0.5, "hd95/1": 2.25}
  entries = [e._replace(scores=e.scores | scores) for e in make_entries(label, task, (0,))]
  monkeypatch.setattr(style, "pictures", lambda *_: [])
  blocks = blocks_of(task, entries, label)
  (table,) = of_type(blocks, Table)
  rows = {row[0]: row[2] for row in table.rows}
  assert rows["Dice per case of water, % ↑"] == "50.00"
  assert rows["HD95 of water, voxels ↓"] == "2.25"
  assert "seeds" in of_type(blocks, Text)[-1].text
