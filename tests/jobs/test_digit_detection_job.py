"""configs/digit_detection.py: families, methods and scenes without labels, on small files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scene_files
from digit_detection import METHODS, DigitDetection, with_labels

from distill_jax.data import UNLABELED
from distill_jax.data.sets import digit_scenes
from distill_jax.jobs.config import ConfigError, check_config

SMALL = {"teacher_width": 4, "student_width": 2}
NECKS = ("fgd", "mgd", "pkd", "cwd", "score_weighted")
TERMS = {name: {"boxes", "maps"} for name in NECKS}
TERMS |= {"logits": {"boxes", "soft"}, "ld": {"boxes", "soft", "edges"}}


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  label = rng.integers(-1, 10, (2, 3)).astype(np.int32)
  corners = rng.uniform(0, 30, (2, 3, 2))
  boxes = np.concatenate([corners, corners + 20], -1).astype(np.float32)
  image = rng.random((2, 64, 64, 3)).astype(np.float32)
  ids = {"id": np.arange(2), "view": np.zeros(2, np.int32)}
  return ids | {"image": image, "boxes": boxes, "label": label, "labeled": np.array([True, False])}


def outputs(model, batch):
  def run(batch):
    return model.apply(*model.init(jax.random.key(0), batch), batch, train=True, key=None)[0]

  return jax.eval_shape(run, batch)


@pytest.mark.parametrize(
  ("family", "teacher_family", "methods"),
  [
    ("yolo", "", METHODS),
    ("ssd", "", ("logits", "score_weighted")),  # The others do not depend on the head.
    ("yolo", "retinanet", ("pkd", "score_weighted")),
  ],
)
def test_every_method_has_its_terms(batch, family, teacher_family, methods):
  families = {"family": family, "teacher_family": teacher_family}
  config = DigitDetection(methods=methods, **families, **SMALL)
  check_config(config)
  batch = jax.eval_shape(config.augment(), batch)
  student, teacher = outputs(config.student(), batch), outputs(config.teacher(), batch)
  assert set(config.cached_outputs()) <= set(teacher)
  cached = {name: teacher[name] for name in config.cached_outputs()}
  for name in methods:
    objective = config.variant_objective(name)

    def terms(batch, student, cached, objective=objective):
      variables = objective.init(jax.random.key(0), student, cached)
      key = jax.random.key(0)
      return objective.apply(*variables, student, cached, batch, step=jnp.array(0), key=key)[0]

    assert set(jax.eval_shape(terms, batch, student, cached)) == TERMS[name]
  predicted = jax.eval_shape(config.task().predict, student, batch)
  assert predicted["boxes"].shape[::2] == (2, 4)


def test_scenes_without_labels_have_no_boxes_and_train_no_baseline(tmp_path, monkeypatch):
  scene_files.install(tmp_path, monkeypatch)
  scenes = digit_scenes.load(64, {"train": 40, "validation": 1, "test": 1})["train"]
  config = DigitDetection(label_fraction=0.25)
  few = config.student_train(scenes)
  labeled = few.arrays["labeled"]
  assert labeled.sum() == 10 and (few.arrays["label"][~labeled] == UNLABELED).all()
  assert not few.arrays["boxes"][~labeled].any()
  np.testing.assert_array_equal(few.arrays["boxes"][labeled], scenes.arrays["boxes"][labeled])
  baseline = config.baseline_train(few)
  assert set(baseline.ids) == set(few.ids[labeled]) and baseline.arrays["labeled"].all()
  more = with_labels(scenes, 0.5).arrays["labeled"]
  assert (more >= labeled).all() and more.sum() == 20


@pytest.mark.parametrize(
  "fields",
  [
    {"family": "yol"},
    {"teacher_family": "rcnn"},
    {"methods": ("fdg",)},
    {"methods": ("ld",), "family": "ssd"},
    {"methods": ("logits",), "teacher_family": "ssd"},
    {"label_fraction": 0.0},
  ],
)
def test_fields_that_cannot_be_run_raise(fields):
  name = next(iter(fields))
  with pytest.raises(ConfigError, match=f"^{name}: expected"):
    DigitDetection(**fields).validate()
