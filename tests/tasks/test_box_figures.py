"""The parts of a report that show a detection: classes, curves, kinds of errors, and examples."""

import json

import numpy as np
import pytest
from box_cases import decode, make_batch
from matplotlib.image import imread

from distill_jax import report, tasks
from distill_jax.report import style
from distill_jax.report.document import Numbers, Table
from distill_jax.tasks._boxes import Found, Truth, found_of, truth_of
from distill_jax.tasks._class_figures import box_errors, examples
from distill_jax.tasks._class_figures.box_matches import match_boxes

NAMES = ("cat", "dog", "car", "bus")
SKILL = {"teacher": 0.95, "baseline": 0.5, "student": 0.8}


def make_entries(task, seeds=(0, 1), roles=tuple(SKILL)):
  """Returns entries of detectors of different skill, and the references of one test set."""
  first = make_batch(np.random.default_rng(0), crowds=True)
  images = np.random.default_rng(0).random((12, 8, 8, 3)).astype(np.float32)
  references = {name: first[name] for name in ("boxes", "label")}
  references |= {"id": np.arange(12) + 50, "image": images}
  entries = []
  for role in roles:
    for seed in seeds[:1] if role == "teacher" else seeds:
      # The first draws are those of the true boxes, whatever the skill.
      batch = make_batch(np.random.default_rng(0), skill=SKILL[role])
      noise = np.random.default_rng(seed).normal(0, 2, batch["found_boxes"].shape)
      predictions = {
        "boxes": (batch["found_boxes"] + noise).astype(np.float32),
        "score": batch["found_scores"],
        "class": batch["found_classes"],
        "crowd": first["crowd"],
      }
      scores = task.evaluate_predictions(predictions, references)
      entries.append(report.Entry(role, seed, scores, {}, [], "", {}, predictions))
  return entries, references


def matches_of(batch):
  truth = truth_of({name: batch[name] for name in ("boxes", "label", "crowd")}, None, 4)
  predictions = {name.removeprefix("found_"): x for name, x in batch.items() if "found" in name}
  predictions |= {"score": predictions["scores"], "class": predictions["classes"]}
  return match_boxes(found_of(predictions, 4), truth)


def one_image(true, found):
  """Returns the matches of one image: rows of (class, left, right) of boxes of equal height;
  detections in order of falling scores.
  """
  arrays = []
  for rows in (true, found):
    classes, left, right = np.array(rows, float).T
    boxes = np.stack([left, 0 * left, right, 0 * left + 10], -1)
    arrays.append((boxes[None], classes[None].astype(int)))
  (boxes, label), (found_boxes, classes) = arrays
  crowd = np.zeros(label.shape, bool)
  scores = np.linspace(0.9, 0.1, len(found))[None]
  truth = Truth(boxes, label, crowd, ~crowd)
  return match_boxes(Found(found_boxes, scores, classes), truth)


def test_report_of_detectors_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(examples, "_EACH", 1)  # Panels take most of the time.
  task = tasks.detection(decode, class_names=NAMES)
  entries, references = make_entries(task, (0,))
  references["image"] = references["image"][..., :1]
  page = report.write(tmp_path, entries, task=task, references=references, run={"name": "boxes"})
  files = {path.name for path in page.parent.iterdir()}
  assert files >= {"classes.png", "precision.png", "errors.png", "examples.png"}
  assert all(np.ptp(imread(path)) > 0 for path in tmp_path.glob("*.png"))
  text = (tmp_path / "report.md").read_text()
  cells = [f"{100 * entry.scores['ap/dog']:.2f}" for entry in entries]
  assert f"| AP of dog, % ↑ | {' | '.join(cells)} |" in text
  stored = json.loads((tmp_path / "results.json").read_text())
  label = references["label"][~entries[0].predictions["crowd"]]
  assert [row["boxes"] for row in stored["classes"]] == [(label == c).sum() for c in range(4)]
  assert set(stored["detection_errors"]) == set(SKILL)


def drawn(monkeypatch, task, entries, references, page=style.PAGE):
  """Returns the blocks, and by the name of each picture its figure and what it was drawn from."""
  drawings = {}

  def record(name, title, caption, draw):
    drawings[name] = draw(page), draw.args[0], caption
    return []

  monkeypatch.setattr(style, "pictures", record)
  with style.context():
    return task.figures(entries, references, NAMES), drawings


@pytest.mark.parametrize("page", [style.PAGE, style.PHONE])
def test_pictures_show_curves_errors_and_boxes(monkeypatch, page):
  task = tasks.detection(decode)
  entries, references = make_entries(task)
  blocks, drawings = drawn(monkeypatch, task, entries, references, page)
  (table,) = [block for block in blocks if isinstance(block, Table)]
  assert [row[0] for row in table.rows[-4:]][1] == "AP of dog, % ↑"
  assert all(figure.get_figwidth() <= page for figure, _, _ in drawings.values())
  curves = drawings["precision"][0].axes
  for axes, name in zip(curves, ("ap50", "ap75")):
    means = [np.mean(line.get_ydata()) / 100 for line in axes.lines]
    of_role = {role: [e.scores[name] for e in entries if e.role == role] for role in SKILL}
    assert means == pytest.approx([np.mean(scores) for scores in of_role.values()])
  (bars,) = drawings["errors"][0].axes
  assert len(bars.patches) == 3 * len(box_errors.KINDS)
  (numbers,) = [b for b in blocks if isinstance(b, Numbers) and b.name == "detection_errors"]
  widths = {bar.get_width() for bar in bars.patches}
  assert widths == {100 * x for costs in numbers.values.values() for x in costs.values()}
  figure, rows, caption = drawings["examples"]
  shown = [[axes.get_title() for axes in part.axes] for part in figure.subfigs[:-1]]
  assert len(rows) == len(shown) == 6
  assert [title.split(":")[0] for title in shown[0]] == [
    "Truth",
    "Teacher",
    "Baseline",
    "Distilled",
  ]
  row = int(rows[0].title.split(":")[0].removeprefix("id ")) - 50
  truth, teacher, *_ = rows[0].panels
  assert len(truth.boxes) == (references["label"][row] >= 0).sum()
  batch = make_batch(np.random.default_rng(0), skill=SKILL["teacher"])
  threshold = float(caption.split("teacher ")[-1].split(",")[0])
  assert len(teacher.boxes) <= (batch["found_scores"][row] >= threshold - 0.005).sum()
  figure.draw_without_rendering()


def test_nothing_is_shown_without_boxes_or_predictions():
  task = tasks.detection(decode)
  entries, references = make_entries(task, (0,))
  assert task.figures(entries, {"id": references["id"]}, NAMES) == []
  without = [entry._replace(predictions=None) for entry in entries]
  assert task.figures(without, references, NAMES) == []


@pytest.mark.parametrize(("name", "value"), [("class", -1), ("score", np.nan)])
def test_detector_that_finds_nothing_is_shown(monkeypatch, name, value):
  task = tasks.detection(decode)
  (entry,), references = make_entries(task, (0,), roles=("baseline",))
  empty = np.full_like(entry.predictions[name], value)
  entry = entry._replace(predictions={**entry.predictions, name: empty})
  _, drawings = drawn(monkeypatch, task, [entry], references)
  _, rows, caption = drawings["examples"]
  assert not any(row.panels[1].boxes for row in rows) and "inf" not in caption


def test_matches_have_the_ap_and_f1_of_their_definition(rng):
  batch = make_batch(rng, images=30)
  matches = matches_of(batch)
  found, truth = matches.found, matches.truth
  ap = box_errors._ap50(
    found.scores, found.classes, matches.is_correct, matches.counted, boxes=truth.per_class(4)
  )
  task = tasks.detection(decode)
  predictions = {"boxes": batch["found_boxes"], "score": batch["found_scores"]}
  predictions |= {"class": batch["found_classes"], "crowd": batch["crowd"]}
  assert ap == pytest.approx(task.evaluate_predictions(predictions, batch)["ap50"])

  def f1(threshold, rows):
    is_shown = matches.counted[rows] & (found.scores[rows] >= threshold)
    correct = (is_shown & matches.is_correct[rows]).sum()
    total = is_shown.sum() + truth.counted[rows].sum()
    return 2 * correct / total if total else 1

  thresholds = np.unique(found.scores[matches.counted])
  best = max(thresholds, key=lambda x: f1(x, slice(None)))
  assert matches.best_threshold() == best
  images = matches.image_f1(best)
  assert images.tolist() == pytest.approx([f1(best, row) for row in range(30)])
  assert images[2] == 1


def test_kinds_of_errors_follow_their_definitions():
  true = [(0, 0, 10), (0, 20, 30), (1, 40, 50), (2, 60, 70)]
  found = [(0, 0, 10), (0, 0, 9), (2, 40, 50), (0, 26, 36), (1, 26, 36), (0, 90, 95)]
  matches = one_image(true, found)
  kinds = box_errors._kinds(matches)[0]
  names = ["doubled", "wrong class", "badly placed", "both of these", "background"]
  assert kinds[0] == -1 and [box_errors.KINDS[kind] for kind in kinds[1:]] == names


def test_costs_of_errors_are_gains_of_ap50():
  costs = box_errors.error_costs(one_image([(0, 0, 10), (0, 20, 30)], [
    (0, 0, 10), (0, 0, 9), (0, 20, 30)
  ]))  # fmt: skip
  expected = dict.fromkeys(box_errors.KINDS, 0) | {"doubled": 50 * (1 - 2 / 3) / 101}
  assert costs == pytest.approx(expected)
  # Of two detections of a wrong class one is corrected, and the other one removed.
  wrong = one_image([(0, 0, 10), (0, 20, 30), (1, 40, 50)], [(1, 0, 10), (2, 0, 10)])
  assert box_errors.error_costs(wrong)["wrong class"] == pytest.approx(51 / 101 / 2)
  assert box_errors.error_costs(wrong)["missed"] == 0
  # The missed box halves the highest recall.
  missed = box_errors.error_costs(one_image([(0, 0, 10), (0, 20, 30)], [(0, 0, 10)]))
  assert missed["missed"] == pytest.approx(50 / 101)
