"""Tests which part of a batch that is not finite is named."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, objectives
from distill_jax.models import from_apply
from distill_jax.train import StepOptions, make_init
from distill_jax.train.arguments import Arguments
from distill_jax.train.nonfinite import find_nonfinite

X = np.ones((4, 3), np.float32)
SOFT = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
HARD = objectives.weighted(hard=(1.0, objectives.labels()))


def model(apply, w):
  return from_apply(None, lambda p, image: apply(p["w"], image), variables={"w": jnp.asarray(w)})


STUDENT = model(lambda w, x: x * w, X[0])
NAN = np.where(np.arange(12).reshape(4, 3) == 7, np.nan, X).astype(np.float32)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
  ("student", "teacher", "goal", "image", "expected"),
  [
    (STUDENT, None, HARD, X, []),
    (STUDENT, None, HARD, NAN, ["entry 'image'", "student output 'logits'", "term 'hard'"]),
    (
      STUDENT,
      model(lambda w, x: x * w + jnp.nan, X[0]),
      SOFT,
      X,
      ["teacher output 'logits'", "term 'soft'"],
    ),
    # A class that is missing on both sides.
    (
      model(lambda w, x: (x * w).at[:, 0].set(-jnp.inf), X[0]),
      model(lambda w, x: x.at[:, 0].set(-jnp.inf), X[0]),
      SOFT,
      X,
      [],
    ),
    # The derivative of sqrt at 0.
    (model(lambda w, x: jnp.sqrt(w) * x, 0 * X[0]), None, HARD, X, ["gradient of 'student/w'"]),
  ],
)
def test_causes_are_named(student, teacher, goal, image, expected, microbatches):
  batch = {"image": image, "label": np.zeros(4, np.int32)}
  state = make_init(student, teacher, goal, optax.sgd(0.1))(jax.random.key(0), batch)
  values: dict[str, Any] = dict.fromkeys(Arguments._fields)
  values |= {"student": student, "teacher": teacher, "objective": goal}
  arguments = Arguments(**values | {"step": StepOptions(microbatches=microbatches)})
  variables = () if teacher is None else teacher.variables
  assert find_nonfinite(arguments, state, variables, batch) == expected
