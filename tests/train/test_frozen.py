"""Tests layers that are frozen: their statistics stay, or the run warns of those that move."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import warnings

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import data, objectives
from distill_jax.models import from_keras, from_linen, from_nnx
from distill_jax.train import RunOptions, fit, make_init
from distill_jax.train.frozen import warn_of_frozen_statistics
from distill_jax.trees import path_mask

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, size=(16, 4)).astype(np.float32)
SOURCE = data.Source({"x": X, "label": (X[:, 0] > 3).astype(np.int32)}, classes=2)
BATCH = dict(SOURCE.arrays)
OBJECTIVE = objectives.weighted(hard=(1.0, objectives.labels()))


class LinenNet(linen.Module):
  scale: bool = True

  @linen.compact
  def __call__(self, x, train):
    backbone = LinenBackbone(self.scale, name="backbone")
    return linen.Dense(2, name="head")(backbone(x, train))


class LinenBackbone(linen.Module):
  scale: bool

  @linen.compact
  def __call__(self, x, train):
    x = linen.Dense(3)(x)
    norm = linen.BatchNorm(
      not train, momentum=0.5, use_scale=self.scale, use_bias=self.scale, name="norm"
    )
    return norm(x)


class NnxNet(nnx.Module):
  def __init__(self, rngs, frozen=False):
    self.backbone = nnx.BatchNorm(4, use_running_average=frozen, rngs=rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.backbone(x))


def keras_net(trainable):
  keras = pytest.importorskip("keras")
  x = keras.Input((4,))
  norm = keras.layers.BatchNormalization(momentum=0.5, name="backbone")
  norm.trainable = trainable
  return keras.Model(x, keras.layers.Dense(2, name="head")(norm(x)))


FREEZE = {
  "freeze": lambda: optax.chain(
    optax.adam(0.1), optax.freeze(lambda params: path_mask(params, "^student/backbone"))
  ),
  "multi_transform": lambda: optax.multi_transform(
    {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()},
    lambda params: jax.tree.map(
      lambda frozen: "freeze" if frozen else "train", path_mask(params, "^student/backbone")
    ),
  ),
  "masked": lambda: optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.set_to_zero(), lambda params: path_mask(params, "^student/backbone")),
    optax.sgd(0.1),
  ),
}


def check(student, optimizer):
  state = jax.eval_shape(make_init(student, None, OBJECTIVE, optimizer), KEY, BATCH)
  warn_of_frozen_statistics(student, optimizer, state, BATCH)


def train(student, optimizer):
  start = student.init(KEY, {"x": X})
  result = fit(
    student,
    None,
    OBJECTIVE,
    optimizer,
    SOURCE,
    steps=2,
    batch_size=16,
    run=RunOptions(progress=False),
    student_variables=jax.tree.map(np.asarray, start),
  )
  return start, result.variables


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_statistics_that_move_in_frozen_layers_warn():
  with pytest.warns(UserWarning, match="^optimizer: .*batch_stats/backbone/norm/mean"):
    start, end = train(from_linen(LinenNet(), inputs="x"), FREEZE["multi_transform"]())
  assert_same(end.params["backbone"], start.params["backbone"])
  assert (end.params["head"]["kernel"] != start.params["head"]["kernel"]).any()


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize(
  ("make", "statistic"),
  [
    (lambda: from_linen(LinenNet(), inputs="x"), "batch_stats/backbone/norm/mean"),
    (lambda: from_linen(LinenNet(scale=False), inputs="x"), "batch_stats/backbone/norm/mean"),
    (lambda: from_nnx(NnxNet(nnx.Rngs(0)), inputs="x"), "backbone/mean"),
    (lambda: from_keras(lambda: keras_net(True), inputs="x"), "backbone/moving_mean"),
  ],
)
def test_statistics_of_every_library_warn(make, statistic, freeze):
  with pytest.warns(UserWarning, match=f"^optimizer: .*{statistic}"):
    check(make(), FREEZE[freeze]())


def evaluated_backbone(net, x, train):
  return net(x, train=False)


@pytest.mark.parametrize(
  ("make", "optimizer"),
  [
    (lambda: from_linen(LinenNet(), inputs="x", call=evaluated_backbone), FREEZE["freeze"]),
    (lambda: from_nnx(lambda rngs: NnxNet(rngs, frozen=True), inputs="x"), FREEZE["freeze"]),
    (lambda: from_keras(lambda: keras_net(False), inputs="x"), lambda: optax.sgd(0.1)),
  ],
)
def test_layers_in_evaluation_mode_stay_without_a_word(make, optimizer):
  student = make()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    check(student, optimizer())
  variables = student.init(KEY, BATCH)
  assert_same(student.apply(*variables, BATCH, train=True, key=KEY)[1], variables.state)


@pytest.mark.parametrize(
  "optimizer", [optax.sgd(0.0), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))]
)
def test_trained_layers_do_not_warn(optimizer):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    check(from_linen(LinenNet(), inputs="x"), optimizer)
