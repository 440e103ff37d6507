"""Times the distillation of a CTC network on random frames."""

from typing import Any

import jax
import numpy as np
from cases import run_steps
from timing import Ratio, compare

from distill_jax import losses, objectives
from distill_jax.types import Model, Variables

OBJECTIVE = objectives.weighted(
  ctc=(1.0, objectives.ctc()),
  frames=(1.0, objectives.frames(losses.ctc_frames)),
)
CHANNELS = 40


def live_to_parts(quick: bool, pairs: int) -> Ratio:
  """Times distillation steps / the student's steps on given logits and the teacher's inference, in
  two jits."""
  rows, frames, classes, width = (4, 16, 8, 8) if quick else (16, 300, 64, 64)
  student, teacher = _network(width, classes), _network(4 * width, classes)
  batch = jax.device_put(_batch(rows, frames, classes))
  teacher = teacher._replace(variables=teacher.init(jax.random.key(1), batch))

  @jax.jit
  def infer(variables, batch):
    return teacher.apply(*variables, batch, train=False, key=None)[0]["logits"]

  given = batch | {"given": infer(teacher.variables, batch)}
  own = run_steps(student, _stored(), OBJECTIVE, [given])

  def separate(calls):
    return [(own(1), infer(teacher.variables, batch)) for _ in range(calls)][-1]

  return compare(run_steps(student, teacher, OBJECTIVE, [batch]), separate, pairs=pairs, calls=2)


def _stored() -> Model:
  """Returns a teacher whose logits are an entry of the batch."""
  variables = Variables({}, {})

  def apply(params, state, batch, *, train, key):
    return {"logits": batch["given"], "lengths": batch["frames"]}, state

  return Model(lambda key, batch: variables, apply, variables)


def _network(width: int, classes: int) -> Model:
  """Returns two convolutions over 5 frames each, and a linear head."""
  shapes = {"0": (5, CHANNELS, width), "1": (5, width, width), "head": (1, width, classes)}

  def init(key, batch):
    keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
    initializer = jax.nn.initializers.lecun_normal()
    return Variables({name: initializer(keys[name], shape) for name, shape in shapes.items()}, {})

  def apply(params, state, batch, *, train, key):
    x = batch["features"]
    for name in shapes:
      x = jax.lax.conv_general_dilated(
        x if name == "0" else jax.nn.relu(x),
        params[name],
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
      )
    return {"logits": x, "lengths": batch["frames"]}, state

  return Model(init, apply)


def _batch(rows: int, frames: int, classes: int) -> dict[str, Any]:
  """Returns random frames, between half and all of them valid, and transcripts of a tenth."""
  rng = np.random.default_rng(0)
  return {
    "id": np.arange(rows),
    "features": rng.normal(size=(rows, frames, CHANNELS)).astype(np.float32),
    "frames": rng.integers(frames // 2, frames + 1, rows).astype(np.int32),
    "label": rng.integers(1, classes, (rows, max(frames // 10, 1))).astype(np.int32),
  }
