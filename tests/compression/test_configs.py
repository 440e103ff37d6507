import jax
import numpy as np
import optax
import pytest

from distill_jax import data
from distill_jax.checkpoint import export_student
from distill_jax.compression.prune import layer_sparsity
from distill_jax.data import tfds
from distill_jax.main import main
from distill_jax.models import from_nnx
from distill_jax.models.vgg import VGG

SMALL = ["--config.teacher_width=0.03125", "--config.student_widths=(2,4)", "--config.devices=1", "--dry_run"]
BATCH = [f"--config.{role}_training.batch_size=8" for role in ("teacher", "student")]


@pytest.fixture
def dry_run(monkeypatch, tmp_path, rng, capsys):
  """Describes a config on random images; gives what was printed."""
  arrays = {"image": rng.random((40, 28, 28, 1), np.float32), "label": rng.integers(0, 10, 40)}
  source = data.Source(arrays, 10, name="fashion_mnist")
  monkeypatch.setattr(tfds, "load", lambda *args, **settings: {"train": source, "test": source})

  def run(name, *arguments):
    main([f"--config=configs/{name}.py", *SMALL, *BATCH, f"--workdir={tmp_path / 'run'}", *arguments])
    return capsys.readouterr().out

  return run


@pytest.mark.slow
def test_a_student_can_be_pruned(dry_run):
  out = dry_run("fashion_mnist_prune")
  assert "student:" in out and "one step of batch 8" in out


@pytest.mark.parametrize("kind", ["channels", "weights", "2:4"])
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


def test_what_cannot_be_pruned_is_said(dry_run):
  for option, message in (
    ("student_training.kind=chanels", "did you mean 'channels'"),
    ("student_training.sparsity=1.0", r"sparsity: expected a share in \[0, 1\)"),
    ("student_training.every=7", "nearest: 1399 or 1406"),
    ("eval_every=100", "eval_every: expected a finite number > 1400"),
  ):
    with pytest.raises(ValueError, match=message):
      dry_run("fashion_mnist_prune", f"--config.{option}")


@pytest.fixture
def teacher_folder(tmp_path):
  model = from_nnx(lambda rngs: VGG(1, 11, 10, width=0.03125, rngs=rngs))
  export_student(tmp_path / "teacher", jax.jit(model.init)(jax.random.key(0), {}), description={})
  return tmp_path / "teacher"


@pytest.mark.slow
def test_a_student_can_start_from_its_teacher(dry_run, teacher_folder):
  out = dry_run(
    "fashion_mnist_inject",
    f"--config.teacher_folder={teacher_folder}",
    "--config.student_training.frozen=^student/blocks/0/",
  )
  assert "student:" in out and "one step of batch 8" in out


def test_the_teachers_convolutions_are_in_the_student(monkeypatch, teacher_folder, dry_run):
  monkeypatch.syspath_prepend("configs")
  from fashion_mnist_inject import Injected

  config = Injected(teacher_folder=str(teacher_folder), teacher_width=0.03125, student_widths=(2, 3))
  student, teacher = (
    jax.jit(config.recipe("").learner.init)(jax.random.key(0), {}),
    config.teacher().variables,
  )
  ours, theirs = student.params["blocks"], teacher.params["blocks"]
  np.testing.assert_array_equal(ours[0]["conv"]["kernel"], theirs[0][0]["conv"]["kernel"])
  np.testing.assert_array_equal(ours[1]["conv"]["kernel"], theirs[1][0]["conv"]["kernel"][..., [0, 2, 3]])
  with pytest.raises(ValueError, match="teacher_folder: expected the folder"):
    dry_run("fashion_mnist_inject")
