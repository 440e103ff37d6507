"""Times a detector's distillation step, and the scores of a test split."""

import jax
import numpy as np
from cases import run_steps
from problems import Problem, with_weights
from timing import Ratio, compare

from distill_jax import data, losses, objectives, tasks
from distill_jax.models import from_nnx
from distill_jax.models.zoo.detector import Detector
from distill_jax.models.zoo.yolo import YOLO
from distill_jax.types import Model

CLASSES = 10
MOST_BOXES = 6
HEAD = YOLO(CLASSES, bins=8)
HARD = (1.0, objectives.student_loss(HEAD.loss))
SUPERVISED = objectives.weighted(hard=HARD)
DISTILLED = objectives.weighted(
  hard=HARD, soft=(1.0, objectives.locations(losses.binary_kl, output="class_logits"))
)


def yolo(quick: bool = False) -> Problem:
  """Returns YOLO of width 8 from width 16, 1,000 scenes of 64x64x3 with up to 6 boxes, batch 32."""
  width, rows = (2, 8) if quick else (8, 1000)
  return Problem(
    _detector(width),
    with_weights(_detector(2 * width)),
    (),
    _scenes(rows),
    batch_size=4 if quick else 32,
    calls=1,
  )


def step_to_parts(problem: Problem, pairs: int) -> Ratio:
  """Times a distillation step / the student's step, which assigns targets, and the teacher's
  inference, in two jits.
  """
  batch = jax.device_put(problem.batch())
  student = run_steps(problem.student, None, SUPERVISED, [batch])
  teacher = _forward(problem.teacher)

  def separate(calls):
    return [(student(1), teacher(problem.teacher.variables, batch)) for _ in range(calls)][-1]

  ours = run_steps(problem.student, problem.teacher, DISTILLED, [batch])
  return compare(ours, separate, pairs=pairs, calls=problem.calls)


def scores_to_forward(problem: Problem, pairs: int) -> Ratio:
  """Times COCO's scores of all scenes / the student's forward passes over them.

  The detections are true boxes, moved a little, of random classes: as many as a head returns.
  """
  task = tasks.detection(HEAD.decode)
  arrays, rows = problem.source.arrays, len(problem.source)
  size = problem.batch_size
  batches = [
    {"image": arrays["image"][start : start + size]} for start in range(0, rows - size + 1, size)
  ]
  variables = jax.jit(problem.student.init)(jax.random.key(0), batches[0])
  predictions = _detections(arrays)
  forward = _forward(problem.student)

  def score(calls):
    return [task.evaluate_predictions(predictions, arrays) for _ in range(calls)][-1]

  def passes(calls):
    return [forward(variables, batch) for _ in range(calls) for batch in batches]

  return compare(score, passes, pairs=pairs, calls=1)


def _forward(model: Model):
  # All outputs are returned, so that XLA drops none of them.
  return jax.jit(lambda variables, batch: model.apply(*variables, batch, train=False, key=None)[0])


def _detector(width: int) -> Model:
  widths = (width, 2 * width, 4 * width, 4 * width)
  return from_nnx(lambda rngs: Detector(3, widths, HEAD, neck_width=2 * width, rngs=rngs))


def _scenes(rows: int) -> data.Source:
  rng = np.random.default_rng(0)
  label = rng.integers(-1, CLASSES, (rows, MOST_BOXES))
  corners = rng.uniform(0, 40, (rows, MOST_BOXES, 2))
  sides = rng.uniform(8, 24, (rows, MOST_BOXES, 2))
  boxes = np.concatenate([corners, corners + sides], -1)
  arrays = {
    "id": np.arange(rows),
    "image": rng.random((rows, 64, 64, 3), np.float32),
    "boxes": np.where(label[..., None] >= 0, boxes, 0).astype(np.float32),
    "label": label,
  }
  return data.Source(arrays, CLASSES, ignore_label=data.UNLABELED, name="random scenes")


def _detections(arrays) -> dict[str, np.ndarray]:
  """Returns `HEAD.max_detections` detections of each scene."""
  rng = np.random.default_rng(1)
  row = rng.integers(0, MOST_BOXES, (len(arrays["boxes"]), HEAD.max_detections))
  near = np.take_along_axis(arrays["boxes"], row[..., None], 1)
  shift = np.tile(rng.normal(size=(*row.shape, 2)), 2)
  return {
    "boxes": (near + shift).astype(np.float32),
    "score": rng.random(row.shape, np.float32),
    "class": rng.integers(0, CLASSES, row.shape),
  }
