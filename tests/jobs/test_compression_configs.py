import jax
import numpy as np
import optax
import pytest

from distill_jax import data
from distill_jax.compression.pruning.weights import layer_sparsity
from distill_jax.data.sets import tfds
from distill_jax.jobs.cli import main
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vgg import VGG

SMALL = ["--config.images=24", "--config.teacher_training.batch_size=8", "--config.devices=1"]
WIDTHS = {"prune": "(4,8,12)", "attention": "(2,4,8)"}  # twos of four; the teacher's own
TRAINED = {
  "prune": ("channels", "weights", "two_of_four"),
  "spr": ("channels", "weights"),
  "teacher_init": ("frozen_training",),
  "assistant": ("hint_training", "pruned_training", "tuning"),
}


@pytest.fixture
def images(monkeypatch, rng):
  """Random images in the place of the set."""
  arrays = {"image": rng.random((80, 28, 28, 1), np.float32), "label": rng.integers(0, 10, 80)}
  source = data.Source(arrays, 10, name="fashion_mnist")
  monkeypatch.setattr(tfds, "load", lambda *args, **settings: {"train": source, "test": source})


def options(name):
  """Overrides that make a job as small as it can be."""
  widths = f"--config.student_widths={WIDTHS.get(name, '(2,4,6)')}"
  made = [*SMALL, *([] if name in ("vit", "int8") else ["--config.teacher_width=0.03125", widths])]
  for training in ("student_training", *TRAINED.get(name, ())):
    made += [
      f"--config.{training}.{field}" for field in ("batch_size=8", "steps=3", "warmup_steps=0")
    ]
  for training in (
    TRAINED["prune"] if name == "prune" else ("pruned_training",) if name == "assistant" else ()
  ):
    made += [f"--config.{training}.{field}" for field in ("begin=1", "end=1", "every=1")]
  if name in ("prune", "spr"):
    made += [f"--config.tuning.{field}" for field in ("batch_size=8", "steps=2")]
  if name == "spr":
    made += ["--config.validation_images=4"]
  return [*made, "--config.teacher_training.steps=2", "--config.teacher_training.warmup_steps=0"]


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("teacher_init", marks=pytest.mark.slow),
    *(
      pytest.param(name, marks=pytest.mark.nightly)
      for name in ("prune", "spr", "attention", "vit", "assistant")
    ),
    # The warnings are qwix's.
    *(
      pytest.param(name, marks=[pytest.mark.nightly, pytest.mark.filterwarnings("ignore")])
      for name in ("int8", "int8_cnn")
    ),
  ],
)
# The frozen block of teacher_init normalizes by the student's batches.
@pytest.mark.filterwarnings("ignore:optimizer. it freezes")
def test_every_job_runs_and_is_reported(images, tmp_path, name):
  main([f"--config=configs/fashion_mnist_{name}.py", *options(name), f"--workdir={tmp_path}"])
  report = (tmp_path / "report" / "report.md").read_text()
  assert "kd" in report and "Parameters" in report
  assert all((folder / "model.stablehlo").exists() for folder in tmp_path.glob("student-*"))


@pytest.mark.parametrize("kind", ["channels", "weights", "2_of_4"])
def test_every_kind_prunes_the_student(monkeypatch, kind):
  monkeypatch.syspath_prepend("configs")
  from fashion_mnist_prune import Pruned, PrunedTraining

  config = Pruned(student_widths=(4, 8))
  student = jax.jit(config.student().init)(jax.random.key(0), {})
  params = {"student": student.params, "objective": {}}
  step = PrunedTraining(kind=kind, begin=0, end=0, every=1).optimizer()

  @jax.jit
  def run(params):
    updates, _ = step.update(params, step.init(params), params)
    return optax.apply_updates(params, updates)

  pair = layer_sparsity(run(params))["student/blocks/1/conv/kernel"]
  np.testing.assert_allclose(pair[0] / pair[1], 0.5)


def test_what_cannot_be_pruned_is_said(images):
  for option, message in (
    ("channels.kind=chanels", r"kind: .*chanels"),
    ("weights.sparsity=1.0", r"weights.*sparsity"),
    ("channels.every=0", "every"),
    ("channels.end=3", r"end: .*steps=3"),
  ):
    with pytest.raises(ValueError, match=message):
      main(
        [
          "--config=configs/fashion_mnist_prune.py",
          *options("prune"),
          f"--config.{option}",
          "--dry_run",
        ]
      )


def test_the_teachers_convolutions_are_in_the_student(monkeypatch):
  monkeypatch.syspath_prepend("configs")
  from fashion_mnist_teacher_init import FIRST, TeacherInit, init_convolutions

  from distill_jax.jobs.config import TrainedTeacher

  config = TeacherInit(teacher_width=0.03125, student_widths=(2, 3))
  teacher = from_nnx(lambda rngs: VGG(1, 11, 10, width=0.03125, rngs=rngs))
  trained_teacher = TrainedTeacher(teacher, jax.jit(teacher.init)(jax.random.key(0), {}), None)
  own = jax.jit(config.student().init)(jax.random.key(1), {})
  student, origins = init_convolutions(own, trained_teacher)
  ours, theirs = student.params["blocks"], trained_teacher.variables.params["blocks"]
  np.testing.assert_array_equal(ours[0]["conv"]["kernel"], theirs[0][0]["conv"]["kernel"])
  np.testing.assert_array_equal(
    ours[1]["conv"]["kernel"], theirs[1][0]["conv"]["kernel"][..., [0, 2, 3]]
  )
  assert origins["params/head/kernel"].source is None
  first, _ = init_convolutions(own, trained_teacher, FIRST)
  np.testing.assert_array_equal(
    first.params["blocks"][1]["conv"]["kernel"], own.params["blocks"][1]["conv"]["kernel"]
  )
