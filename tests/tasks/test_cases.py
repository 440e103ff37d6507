"""Dice and HD95 of volumes, from slices and patches of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from distill_jax import tasks, train
from distill_jax.models import from_apply
from distill_jax.tasks._surface_distance import hausdorff95

NAMES = ("air", "bone", "lung")
SPACING = (3.0, 0.5, 1.0)


def regions(rng, shape=(5, 7, 6)):
  """Returns two maps, each with a ball of class 1 and a smaller one of class 2."""
  grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
  maps = np.zeros((2, *shape), int)
  for ball in maps:
    for number, radius in ((1, 2.7), (2, 1.8)):
      center = rng.uniform(1, np.array(shape) - 1)
      ball[np.linalg.norm(grid - center, axis=-1) < radius] = number
  return maps


def by_brute_force(first, second, spacing):
  """Returns the percentile of all distances between border voxels, from its definition."""

  def border(mask):
    padded = np.pad(mask, 1)
    inner = np.all(
      [np.roll(padded, step, axis) for axis in range(mask.ndim) for step in (1, -1)], 0
    )
    return np.argwhere(padded & ~inner) * spacing

  distances = cdist(border(first), border(second))
  return np.percentile(np.concatenate([distances.min(0), distances.min(1)]), 95)


def rows(predicted, label, **entries):
  """Returns predictions and references of examples."""
  maps = {"class": np.asarray(predicted, np.uint8), "label": np.asarray(label, np.uint8)}
  return maps, {name: np.asarray(x) for name, x in entries.items()}


def score(predictions, references, *, background=False, names=NAMES, **options):
  task = tasks.segmentation(
    class_names=names, include_background=background, cases=tasks.Cases(**options)
  )
  return task.evaluate_predictions(predictions, references)


@pytest.mark.parametrize("shape", [(5, 7, 6), (9, 8)])
def test_hd95_equals_its_definition(rng, shape):
  spacing = SPACING[-len(shape) :]
  for _ in range(5):
    first, second = (x > 0 for x in regions(rng, shape))
    expected = by_brute_force(first, second, spacing)
    assert hausdorff95(first, second, spacing) == pytest.approx(expected)


def test_hd95_equals_medpy(rng):
  binary = pytest.importorskip("medpy.metric.binary")
  for spacing in (SPACING, (1.0, 1.0, 1.0)):
    for _ in range(20):
      first, second = (x > 0 for x in regions(rng))
      assert hausdorff95(first, second, spacing) == binary.hd95(first, second, spacing)


def test_scores_are_means_over_cases_then_classes(rng):
  predicted, label = (np.stack(x) for x in zip(*(regions(rng) for _ in range(3))))
  label[0, :, 0] = 255
  scores = score(*rows(predicted, label, patient=[4, 9, 2]), entry="patient", spacing=SPACING)
  dice, distance = np.zeros((2, 3)), np.zeros((2, 3))
  for case in range(3):
    counted = label[case] != 255
    for number in (1, 2):
      true, found = (counted & (x[case] == number) for x in (label, predicted))
      dice[number - 1, case] = sk.f1_score(true.ravel(), found.ravel())
      distance[number - 1, case] = by_brute_force(true, found, SPACING)
  assert scores["case_dice"] == pytest.approx(dice.mean())
  assert scores["hd95"] == pytest.approx(distance.mean())
  assert scores["hd95/bone"] == pytest.approx(distance[0].mean())
  assert scores["unmatched"] == 0 and "case_dice/air" in scores


def test_empty_regions(rng):
  label = np.zeros((2, 3, 4, 5), int)
  predicted = label.copy()
  label[0, 1, 1, 1] = predicted[0, 1, 1, 1] = 1
  predicted[1, 0, 0, 0] = 1  # `bone` in the prediction only; `lung` is in neither
  scores = score(*rows(predicted, label, case=[0, 1]), spacing=SPACING)
  diagonal = np.hypot(np.hypot(9, 2), 5)
  assert scores["case_dice"] == scores["case_dice/bone"] == 0.5
  assert scores["hd95"] == pytest.approx(diagonal / 2)
  assert scores["unmatched"] == 1 and "hd95/lung" not in scores
  nothing = score(*rows(0 * label, 0 * label, case=[0, 1]))
  assert nothing == {"case_dice/air": 1.0, "hd95/air": 0.0}


@pytest.mark.parametrize("names", [NAMES, ()])
def test_shuffled_slices_and_patches_score_like_the_volume(rng, names):
  predicted, label = regions(rng)
  other = regions(rng)
  options = dict(names=names, spacing=SPACING)
  whole = rows([predicted, other[0]], [label, other[1]], case=[0, 1])
  expected = score(*whole, **options)
  order = rng.permutation(10)
  slices = rows(
    np.concatenate([predicted, other[0]])[order],
    np.concatenate([label, other[1]])[order],
    case=np.repeat([0, 1], 5)[order],
    slice=np.concatenate([np.arange(5), np.arange(5) + 7])[order],
  )
  assert score(*slices, position="slice", **options) == pytest.approx(expected)
  starts = [(z, y, x) for z in (0, 1) for y in (0, 3) for x in (0, 1, 2)]
  boxes = [np.s_[z : z + 4, y : y + 4, x : x + 4] for z, y, x in starts]
  parts = rows(
    [predicted[box] for box in boxes], [label[box] for box in boxes], case=np.zeros(12, int),
    start=starts,
  )  # fmt: skip
  one = score(*rows([predicted], [label], case=[0]), **options)
  assert score(*parts, position="start", **options) == pytest.approx(one)


def test_parts_of_slices_may_overlap_where_one_is_padding(rng):
  predicted, label = regions(rng, (3, 4, 6))
  left, right = label[:, :, :4].copy(), label[:, :, 2:].copy()
  left[:, :, 3], right[:, :, 0] = 255, 255
  parts = rows(
    np.concatenate([predicted[:, :, :4], predicted[:, :, 2:]]), np.concatenate([left, right]),
    case=np.zeros(6, int), start=[(z, 0, x) for x in (0, 2) for z in range(3)],
  )  # fmt: skip
  expected = score(*rows([predicted], [label], case=[0]))
  assert score(*parts, position="start") == pytest.approx(expected)


def test_nan_logits_have_no_score(rng):
  predicted, label = regions(rng)
  predicted[0, 0, 0] = 255
  assert np.isnan(list(score(*rows([predicted], [label], case=[0])).values())).all()


@pytest.mark.parametrize(
  ("entries", "options", "field"),
  [
    ({"case": [0, 0]}, {}, "position: .*case 0"),
    ({"case": [0, 0], "slice": [1, 1]}, {"position": "slice"}, "slice: .*2 times"),
    ({"case": [0, 0], "slice": [1, 3]}, {"position": "slice"}, "slice: .*gaps"),
    ({"case": [0, 0], "slice": [0, 2**40]}, {"position": "slice"}, "slice: .*gaps"),
    ({"case": [0, 1], "slice": [0.5, 1.5]}, {"position": "slice"}, "slice: .*integers"),
    ({"case": [0, 1], "at": np.zeros((2, 4), int)}, {"position": "at"}, "at: .*integers"),
    ({"case": [0, 0], "at": [[0, 0], [0, 1]]}, {"position": "at"}, "at: .*equal labels"),
    ({"case": ["a", "b"]}, {}, "case: .*integers"),
    ({"case": [0, 1]}, {"spacing": (1.0, 1.0, 1.0)}, "spacing: .*2"),
    (
      {"case": [0, 0], "slice": [0, 1], "mm": [[1, 1, 1], [2, 1, 1]]},
      {"position": "slice", "spacing": "mm"},
      "mm: .*case 0",
    ),
  ],
)
def test_cases_that_do_not_fit_are_named(entries, options, field):
  label = np.zeros((2, 3, 3), int)
  label[0, 0, 1] = 1
  with pytest.raises(ValueError, match=f"^{field}"):
    score(*rows(0 * label, label, **entries), **options)


@pytest.mark.parametrize("spacing", [(1.0, 0.0), (1.0, np.nan), 1.0])
def test_spacing_is_checked(spacing):
  with pytest.raises(ValueError, match="^spacing"):
    tasks.Cases(spacing=spacing)


def test_evaluation_keeps_a_byte_per_voxel(rng):
  predicted, label = regions(rng, (4, 6, 6))
  label[0, 0] = 255
  logits = 9 * np.eye(3, dtype=np.float32)[predicted] - 3
  task = tasks.segmentation(
    ignore_label=255, class_names=NAMES, cases=tasks.Cases(position="slice", spacing="mm")
  )
  model = from_apply(None, lambda w, image: image, variables=())
  batches = [
    {"image": logits[r], "label": label[r], "case": np.zeros(2, int), "slice": np.array(r),
     "mm": np.ones((2, 3), np.float32)} for r in ([3, 0], [1, 2])
  ]  # fmt: skip
  scores = train.evaluate(model, None, batches, task)
  whole = rows([predicted], [np.where(label == 255, 255, label)], case=[0])
  expected = score(*whole, background=True)
  assert {name: scores[name] for name in expected} == pytest.approx(expected)
  shapes = jax.eval_shape(task.predict, {"logits": jnp.asarray(logits)}, {"label": label})
  assert {name: x.dtype for name, x in shapes.items()} == {
    "class": np.uint8, "label": np.uint8, "iou": np.float32
  }  # fmt: skip
  with pytest.raises(ValueError, match="^slice"):
    train.evaluate(
      model, None, [{k: x for k, x in b.items() if k != "slice"} for b in batches], task
    )


def test_numbered_patches_of_volumes_have_no_position(rng):
  """They were scored as a case of four axes."""
  patches = rows(*regions(rng, (2, 4, 4, 4)), case=[0, 0], patch=[0, 1])
  with pytest.raises(ValueError, match="^patch: expected integers, "):
    score(*patches, position="patch")
