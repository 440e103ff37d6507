"""Optimizers of optax in `fit`: extra arguments, averaged weights, and what is rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import data, objectives
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.weights import prune
from distill_jax.models import from_apply
from distill_jax.train import evaluation_variables, make_init, make_train_step, params_ema
from distill_jax.train.optimizers import as_optimizer
from distill_jax.types import Skips, TrainState, Variables

ROWS, WIDTH, CLASSES = 24, 4, 3
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
SOURCE = data.Source(
  {"id": np.arange(ROWS), "image": IMAGE, "label": IMAGE[:, :CLASSES].argmax(1).astype(np.int32)},
  classes=CLASSES,
  name="toy",
)
STUDENT = from_apply(lambda key, x: 0.1 * jnp.ones((WIDTH, CLASSES)), lambda w, x: x @ w)
BATCH = dict(SOURCE.arrays)
KEY = jax.random.key(0)
OBJECTIVE = objectives.weighted(hard=(1.0, objectives.labels()))


def run(optimizer, steps=4, folder=None, **options):
  settings = dict(batch_size=8, validation=SOURCE, eval_every=2, steps=steps, folder=folder)
  return fit_with(STUDENT, None, OBJECTIVE, optimizer, SOURCE, **(settings | options))


def assert_equal_trees(a, b):
  def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def updates_of(optimizer, losses):
  """Returns the parameters after steps whose loss and gradient are set by the batch."""
  student = from_apply(lambda key, x: jnp.ones(()), lambda w, x: {"logits": w * x[:, None]})

  def apply(params, state, student, teacher, batch, *, step, key):
    return {"value": (1.0, (student["logits"][:, 0], None))}, state

  hard = objectives.labels(optax.squared_error)
  objective = objectives.weighted(hard=(1.0, hard))._replace(apply=apply)
  batch = {"id": np.arange(1), "image": np.ones(1, np.float32)}
  state = make_init(student, None, objective, optimizer)(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, None, objective, optimizer))
  for loss in losses:
    state, _ = step(state, (), batch | {"image": np.full(1, loss, np.float32)})
  return float(state.params["student"])


def test_plateau_reduces_the_rate_by_the_loss():
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1e-4)
  optimizer = optax.chain(optax.sgd(0.1), plateau)
  # The loss w x is 1, then larger: from then on the rate is half, and half again.
  w = 1.0
  for x, rate in [(1.0, 0.1), (2.0, 0.05), (2.0, 0.025)]:
    w -= rate * x
  np.testing.assert_allclose(updates_of(optimizer, [1.0, 2.0, 2.0]), w, rtol=1e-6)


def test_polyak_step_is_the_loss_over_the_squared_gradient():
  # f = w x, its gradient x: w - (w x / x^2) x = 0.
  np.testing.assert_allclose(updates_of(optax.polyak_sgd(10.0), [3.0]), 0.0, atol=1e-6)


def test_optimizers_that_have_no_extra_arguments_get_none():
  bare = optax.GradientTransformation(
    lambda params: (), lambda updates, state, params=None: (jax.tree.map(jnp.negative, updates), ())
  )
  np.testing.assert_allclose(updates_of(bare, [3.0]), -2.0)
  steps = optax.MultiSteps(optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau()), 2)
  np.testing.assert_allclose(updates_of(steps, [3.0, 5.0]), -3.0)


def test_skipped_update_leaves_the_optimizer_as_it_was():
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1e-4)
  optimizer = optax.chain(optax.sgd(0.1), plateau)
  assert updates_of(optimizer, [1.0, np.nan]) == updates_of(optimizer, [1.0])
  assert updates_of(optimizer, [1.0, np.nan, 2.0]) == updates_of(optimizer, [1.0, 2.0])


@pytest.mark.parametrize(
  "optimizer",
  [1e-3, 1, "adam", None, optax.adam, optax.constant_schedule(1e-3), optax.MultiSteps, object()],
)
def test_what_is_no_optimizer_is_rejected(optimizer):
  with pytest.raises(ValueError, match="^optimizer: expected"):
    run(optimizer)


@pytest.mark.parametrize(
  ("optimizer", "reason"),
  [
    (lambda: optax.lbfgs(), "value_fn"),
    (lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)), "value_fn"),
    (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)), "'value'"),
    (lambda: optax.contrib.sophia(0.1), "obj_fn"),
    (lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5), "fast"),
  ],
)
def test_optimizer_that_needs_more_than_gradients_is_rejected_by_name(optimizer, reason):
  state = jax.eval_shape(make_init(STUDENT, None, OBJECTIVE, optimizer()), KEY, BATCH)
  step = make_train_step(STUDENT, None, OBJECTIVE, optimizer())
  with pytest.raises(ValueError, match=f"^optimizer: expected .*{reason}.*use optax.adamw"):
    jax.eval_shape(step, state, (), BATCH)


@pytest.mark.parametrize(
  "optimizer", [lambda: optax.adam("1e-2"), lambda: optax.adamw(1e-2, weight_decay="0.1")]
)
def test_texts_as_hyperparameters_are_rejected(optimizer):
  with pytest.raises(ValueError, match="^optimizer: expected numbers"):
    state = jax.eval_shape(make_init(STUDENT, None, OBJECTIVE, optimizer()), KEY, BATCH)
    jax.eval_shape(make_train_step(STUDENT, None, OBJECTIVE, optimizer()), state, (), BATCH)


def test_mask_of_other_names_is_rejected():
  with pytest.raises(ValueError, match="^optimizer: .*'student'"):
    run(optax.masked(optax.sgd(0.1), {"kernel": True, "bias": False}))


def schedule_free():
  return optax.contrib.schedule_free_adamw(0.1, b1=0.9)


def validation_loss(fitted):
  logits = jnp.asarray(IMAGE @ np.asarray(fitted.variables.params))
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, SOURCE.arrays["label"])
  return float(loss.mean())


@pytest.mark.parametrize("folder", [False, True])
def test_schedule_free_weights_are_evaluated_and_returned(tmp_path, folder):
  fitted = run(schedule_free(), folder=tmp_path if folder else None)
  state = fitted.state
  expected = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)["student"]
  assert np.abs(expected - state.params["student"]).max() > 1e-3
  np.testing.assert_allclose(evaluation_variables(state).params, expected, rtol=1e-6)
  lines = [line for line in fitted.history if line["phase"] == "validation"]
  best = max(lines, key=lambda line: line["accuracy"])
  np.testing.assert_allclose(validation_loss(fitted), best["nll"], rtol=1e-5)


def test_average_of_the_parameters_is_the_recursion():
  optimizer = optax.chain(optax.sgd(0.5), params_ema(0.9))
  params = {"student": jnp.ones(3, jnp.bfloat16)}
  opt_state, average = optimizer.init(params), np.ones(3)
  for t in range(1, 4):
    updates, opt_state = optimizer.update({"student": jnp.ones(3, jnp.bfloat16)}, opt_state, params)
    params = optax.apply_updates(params, updates)
    decay = min(0.9, t / (t + 9))
    average = decay * average + (1 - decay) * np.asarray(params["student"], np.float64)
  np.testing.assert_allclose(opt_state[1].average["student"], average, rtol=1e-6)


def test_average_of_the_parameters_is_returned_and_resumes_to_the_same_bits(tmp_path):
  optimizer = optax.chain(schedule_free(), params_ema(0.9))
  whole = run(optimizer, folder=tmp_path / "whole")
  run(optimizer, steps=2, folder=tmp_path / "parts")
  parts = run(optimizer, folder=tmp_path / "parts")
  assert_equal_trees(whole.state, parts.state)
  assert_equal_trees(whole.variables, parts.variables)
  average = whole.state.opt_state[1].average["student"]
  np.testing.assert_array_equal(run(optimizer, validation=None).variables.params, average)


def state_of(optimizer, params):
  """Returns a train state after two updates of these parameters."""
  opt_state = optimizer.init(params)
  for scale in (1.0, -3.0):
    grads = jax.tree.map(lambda x, scale=scale: scale * jnp.arange(x.size).reshape(x.shape), params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  zero = jnp.zeros((), jnp.int32)
  skips = Skips(zero, zero, zero)
  model_state = {"student": {}, "objective": {}}
  return TrainState(zero, jax.random.key(0), params, model_state, opt_state, (), skips)


def test_frozen_parameters_are_evaluated_as_they_are():
  params = {"student": {"a": jnp.ones((2, 2)), "b": 2 * jnp.ones((2, 2))}, "objective": {}}
  labels = {"student": {"a": "train", "b": "frozen"}, "objective": {}}
  parts = {"train": schedule_free(), "frozen": optax.set_to_zero()}
  state = state_of(optax.multi_transform(parts, labels), params)
  variables = evaluation_variables(state)
  alone = state_of(schedule_free(), params)
  np.testing.assert_array_equal(variables.params["b"], params["student"]["b"])
  np.testing.assert_allclose(variables.params["a"], evaluation_variables(alone).params["a"])


def test_pruned_parameters_of_averages_are_zero():
  params = {"student": {"kernel": 1 + jnp.arange(6.0).reshape(2, 3)}, "objective": {}}
  optimizer = prune(schedule_free(), PolynomialSchedule(1, 1), sparsity=0.5)
  state = state_of(optimizer, params)
  zeros = np.asarray(state.params["student"]["kernel"]) == 0
  assert zeros.sum() == 3
  np.testing.assert_array_equal(
    np.asarray(evaluation_variables(state).params["kernel"]) == 0, zeros
  )


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", True])
def test_decay_outside_its_range_is_rejected(decay):
  with pytest.raises(ValueError, match="decay"):
    params_ema(decay)


def test_variables_of_other_optimizers_are_those_of_the_state():
  state = state_of(as_optimizer(optax.adam(0.1)), {"student": jnp.ones((2, 2)), "objective": {}})
  assert evaluation_variables(state) == Variables(
    state.params["student"], state.model_state["student"]
  )
