"""COCO's AP against pycocotools: crowds, empty images, sizes, classes, and bad input."""

import contextlib
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from box_cases import FOUND, decode, detector, make_batch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from distill_jax import boxes, data, tasks, train
from distill_jax.models import from_apply
from distill_jax.types import Objective, Variables

NAMES = ("cat", "dog", "car", "bus")
KEYS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
AREAS = (900.0, 8000.0)


def annotations(boxes, classes, **more):
  """Returns boxes that count as annotations of COCO."""
  sides = boxes[..., 2:].astype(float) - boxes[..., :2]
  exists = (classes >= 0) & (sides > 0).all(-1)
  return [
    {
      "id": number,
      "image_id": int(row),
      "category_id": int(classes[row, column]),
      "bbox": [*boxes[row, column, :2].tolist(), *sides[row, column].tolist()],
      "area": float(sides[row, column].prod()),
      **{name: values[row, column].item() for name, values in more.items()},
    }
    for number, (row, column) in enumerate(np.argwhere(exists), 1)
  ]


def by_pycocotools(batch, classes, areas=AREAS, most=100):
  """Returns the scores that exist, in COCO's own words."""
  crowd = batch.get("crowd", np.zeros(batch["label"].shape, bool)).astype(int)
  coco = COCO()
  coco.dataset = {
    "images": [{"id": row} for row in range(len(crowd))],
    "categories": [{"id": number} for number in range(classes)],
    "annotations": annotations(batch["boxes"], batch["label"], iscrowd=crowd),
    "info": {},
  }
  with contextlib.redirect_stdout(io.StringIO()):
    coco.createIndex()
    found = annotations(batch["found_boxes"], batch["found_classes"], score=batch["found_scores"])
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    small, medium = areas
    evaluation.params.areaRng = [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]
    evaluation.params.maxDets = [1, 2, most]
    evaluation.evaluate()
    evaluation.accumulate()
  precision = evaluation.eval["precision"][..., -1]
  parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
  parts += [precision[..., i] for i in (1, 2, 3)]
  parts += [precision[:, :, number, 0] for number in range(classes)]
  names = [*KEYS, *(f"ap/{NAMES[number]}" for number in range(classes))]
  return {name: x[x > -1].mean() for name, x in zip(names, parts) if (x > -1).any()}


def evaluated(batch, task=None, rows=5, names=NAMES, **options):
  """Returns the scores through the whole path, in batches, the last one padded by wrong rows."""
  task = task or tasks.detection(decode, class_names=names, areas=AREAS, **options)
  number = len(batch["label"])
  batches = []
  for start in range(0, number, rows):
    part = {name: x[start : start + rows] for name, x in batch.items()}
    where = np.arange(rows) < len(part["label"])
    part = {name: np.concatenate([x, batch[name][: (~where).sum()]]) for name, x in part.items()}
    batches.append({**part, "where": where})
  return train.evaluate(detector(), None, batches, task)


def scored(found, batch, task):
  """Returns the scores of arrays that nothing else checked."""
  predictions = jax.device_get(task.predict(found, batch))
  return task.evaluate_predictions(predictions, batch)


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_pycocotools(seed):
  options = {"classes": 1} if seed == 1 else {"skill": 0.95, "images": 30} if seed == 2 else {}
  batch = make_batch(np.random.default_rng(seed), crowds=seed % 2 == 0, **options)
  if seed == 3:  # a class without a box, which is found nonetheless
    batch["label"][batch["label"] == 2] = 3
  classes = options.get("classes", 4)
  expected = by_pycocotools(batch, classes)
  scores = evaluated(batch, names=NAMES[:classes])
  assert scores == pytest.approx(expected, abs=1e-9)
  assert ("ap/car" in scores) == (seed not in (1, 3))


def test_only_the_best_detections_of_a_class_count():
  batch = make_batch(np.random.default_rng(7), found=40, classes=2)
  expected = by_pycocotools(batch, 2, most=3)
  assert evaluated(batch, names=NAMES[:2], max_detections=3) == pytest.approx(expected, abs=1e-9)
  assert expected["ap"] != pytest.approx(by_pycocotools(batch, 2)["ap"], abs=1e-3)


def test_classes_without_names_are_numbers(rng):
  batch = make_batch(rng)
  scores = evaluated(batch, names=())
  named = evaluated(batch)
  assert scores["ap/3"] == named["ap/bus"] and scores["ap"] == named["ap"]
  names = [metric.name for metric in tasks.detection(decode).metrics]
  assert names == list(KEYS)


def test_nothing_found_and_nothing_to_find(rng):
  batch = make_batch(rng)
  nothing = batch | {"found_classes": np.full_like(batch["found_classes"], -1)}
  scores = evaluated(nothing)
  assert scores["ap"] == scores["ap/cat"] == 0 and set(scores) == set(evaluated(batch))
  with pytest.raises(ValueError, match="label"):
    evaluated(batch | {"label": np.full_like(batch["label"], -1)})


def test_boxes_without_area_are_padding(rng):
  batch = make_batch(rng, crowds=False)
  more = {name: np.concatenate([x, x[:, :2]], 1) for name, x in batch.items()}
  more["label"][:, -2:] = 1
  more["boxes"][:, -2] = 30
  more["boxes"][:, -1] = (30, 40, 50, 40)
  more["found_classes"][:, -2:] = 1
  more["found_boxes"][:, -2:] = 30
  more["found_scores"][:, -2:] = 1
  assert evaluated(more) == evaluated(batch)


@pytest.mark.parametrize("entry", ["found_boxes", "found_scores", "feature"])
def test_nan_of_a_network_is_no_score(rng, entry):
  batch = make_batch(rng)
  found = {name: jnp.asarray(batch[name]) for name in FOUND} | {"feature": jnp.zeros((12, 2))}
  found[entry] = found[entry].at[4, 0].set(jnp.nan)
  task = tasks.detection(decode, class_names=NAMES)
  scores = scored(found, batch, task)
  assert set(scores) == set(evaluated(batch)) and np.isnan(list(scores.values())).all()


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"boxes": (4, (10, 10, 5, 20))}, r"boxes: .*example id 34, box 0.*xywh"),
    ({"boxes": (4, (10, np.nan, 15, 20))}, "boxes: .*example id 34"),
    ({"label": (5, 4)}, "label: .*class 0 to 3.*example id 35"),
    ({"found_classes": (3, 4)}, "decode: .*class 0 to 3.*example id 33"),
    ({"found_scores": (3, 1.5)}, "decode: .*score 0 to 1, got 1.5 in example id 33, box 0: .*sigm"),
    ({"found_scores": (3, -2.0)}, "decode: .*score 0 to 1, got -2.0 in example id 33"),
  ],
)
def test_examples_that_do_not_fit_are_named(rng, change, error):
  ((name, (row, value)),) = change.items()
  batch = make_batch(rng) | {"id": np.arange(12) + 30}
  batch["label"][:, 0] = 1
  batch["found_classes"][:, 0] = 1
  batch[name][row, 0] = value
  found = {name: jnp.asarray(batch[name]) for name in FOUND}
  with pytest.raises(ValueError, match=error):
    scored(found, batch, tasks.detection(decode, class_names=NAMES))


@pytest.mark.parametrize(
  ("entry", "values", "error"),
  [
    ("boxes", np.zeros((12, 6, 5), np.float32), "boxes: "),
    ("boxes", np.zeros((12, 5, 4), np.float32), "label: "),
    ("label", np.zeros((12, 6), np.float32), "label: "),
    ("crowd", np.zeros((12, 6), np.float32), "crowd: "),
    ("found_scores", np.zeros((12, 9), np.float32), "decode: "),
    ("found_classes", np.zeros((12, 10), np.float32), "decode: "),
  ],
)
def test_arrays_that_do_not_fit_are_named(rng, entry, values, error):
  with pytest.raises(ValueError, match=error):
    evaluated(make_batch(rng) | {entry: values})


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"areas": (9.0,)}, "areas"),
    ({"areas": (9.0, 4.0)}, "areas"),
    ({"max_detections": 0}, "max_detections"),
    ({"class_names": ["a", "a"]}, "class_names"),
  ],
)
def test_arguments_are_checked(options, field):
  with pytest.raises(ValueError, match=f"^{field}"):
    tasks.detection(decode, **options)


def test_output_that_decode_does_not_find_is_named(rng):
  task = tasks.detection(lambda outputs: decode({"found_boxes": outputs["found_box"]}))
  with pytest.raises(ValueError, match="found_box: expected an output.*found_boxes"):
    evaluated(make_batch(rng), task)


def test_logits_in_place_of_scores_are_named(rng):
  """All are negative, as those of a new detector: none exceeds a threshold."""
  batch = make_batch(rng) | {"logits": np.full((12, 10, 4), -3, np.float32)}
  outputs = {name: jnp.asarray(batch[name]) for name in ("found_boxes", "logits")}
  task = tasks.detection(lambda outputs: boxes.detect(outputs["found_boxes"], outputs["logits"]))
  with pytest.raises(ValueError, match="decode: .*score 0 to 1, got -3.0 in .*sigmoid"):
    scored(outputs, batch, task)


def test_missing_library_is_named_with_its_extra(rng, monkeypatch):
  monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
  with pytest.raises(ModuleNotFoundError, match="faster_coco_eval.*detection"):
    evaluated(make_batch(rng))


def test_rows_over_devices_score_like_one_device(rng, mesh):
  batch = make_batch(rng)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  variables = jax.device_put(Variables(jnp.ones(()), {}), replicated)
  task = tasks.detection(decode, class_names=NAMES, areas=AREAS)
  source = data.Source(batch, classes=4, ignore_label=-1)
  scores = train.evaluate(detector(), variables, source, task, batch_size=5)
  assert scores == pytest.approx(evaluated(batch))


def test_parts_of_the_examples_have_scores_for_intervals(rng):
  batch = make_batch(rng, images=30)
  task = tasks.detection(decode, areas=AREAS)
  variables = Variables(jnp.ones(()), {})
  source = data.Source(batch, classes=4, ignore_label=-1)
  (result,) = train.evaluate_models(
    [(detector(), variables)], source, task, leave_out=True, batch_size=1
  )
  assert {"ap", "ap50", "ap/0"} <= set(result.leave_out)
  rest = np.arange(30) % 20 != 3
  without = evaluated({name: x[rest] for name, x in batch.items()}, task)
  assert result.leave_out["ap"].shape == (20,)
  assert result.leave_out["ap"][3] == pytest.approx(without["ap"])


def test_fit_keeps_the_weights_of_the_best_ap(rng):
  batch = make_batch(rng, images=16)
  source = data.Source(batch, classes=4, ignore_label=-1)

  def apply(w, *found):
    is_found = (w > 0.5) & (w < 1.2)
    return dict(zip(FOUND, (*found[:2], jnp.where(is_found, found[2], -1)))) | {"w": w}

  def loss(params, state, student, teacher, batch, *, step, key):
    return {"distance": (1.0, (student["w"] - 3) ** 2)}, state

  student = from_apply(lambda key, *_: jnp.zeros(()), apply, inputs=FOUND)
  result = train.fit(
    student,
    None,
    Objective(lambda key, student, teacher: Variables({}, {}), loss),
    optax.sgd(0.15),  # The weight is 0, 0.9, 1.53, 1.97.
    source,
    steps=3,
    batch_size=8,
    evaluation=train.Evaluation(source, every=1),
    task=tasks.detection(decode, class_names=NAMES, areas=AREAS),
  )
  assert float(result.variables.params) == pytest.approx(0.9)
  scores = [line["ap"] for line in result.history if line["phase"] == "validation"]
  assert scores[0] > 0 == scores[1] == scores[2]
