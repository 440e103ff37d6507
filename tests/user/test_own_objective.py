"""An `Objective`, a `Term` and a learned term of one's own, in every place that runs them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, objectives, reduce
from distill_jax.cost import compile_for
from distill_jax.objectives import Term, learned, weighted
from distill_jax.train import RunOptions, StepOptions, fit, make_init, make_train_step
from distill_jax.types import Objective, Variables


def error_with_bias():
  """A term as `Term` documents it: a learned bias, a counter, and every argument."""

  def init(key, student_outputs, teacher_outputs):
    if student_outputs["logits"].shape != teacher_outputs["logits"].shape:
      raise ValueError("logits: expected the teacher's shape")
    classes = student_outputs["logits"].shape[-1]
    return Variables({"bias": jnp.zeros(classes)}, {"calls": jnp.zeros((), jnp.int32)})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    error = student["logits"] + params["bias"] - teacher["logits"]
    return ((error**2).mean(-1), batch.get("where")), {"calls": state["calls"] + 1}

  return Term(init, apply)


def mean_gap():
  """A term that relates rows: a scalar, over all devices where there is an axis."""

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    pairs = [reduce.total(x["logits"], axis_name=axis_name) for x in (student, teacher)]
    gap = reduce.value(pairs[0]) - reduce.value(pairs[1])
    return gap**2, state

  return Term(lambda key, student, teacher: Variables({}, {}), apply)


def squared_error():
  """An objective as `Objective` documents it."""

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    values = ((student["logits"] - teacher["logits"]) ** 2).mean(-1)
    hard = optax.softmax_cross_entropy_with_integer_labels(student["logits"], batch["label"])
    where = batch.get("where")
    # The weight may depend on the step.
    return {"soft": (0.5**step, (values, where)), "hard": (0.1, (hard, where))}, state

  return Objective(lambda key, student, teacher: Variables({}, {}), apply)


OBJECTIVES = {
  "term": weighted(error=(1.0, error_with_bias()), hard=(0.1, objectives.labels())),
  "objective": squared_error(),
}
OPTIMIZER = optax.sgd(0.2)


@pytest.fixture(scope="module")
def jitted(student, teacher, batch):
  """`name -> (initial state, state after two jitted steps, metrics)`."""

  def run(name):
    objective = OBJECTIVES[name]
    state = jax.jit(make_init(student, teacher, objective, OPTIMIZER))(jax.random.key(0), batch)
    step = jax.jit(make_train_step(student, teacher, objective, OPTIMIZER))
    first, _ = step(state, teacher.variables, batch)
    return (state, *step(first, teacher.variables, batch))

  return {name: run(name) for name in OBJECTIVES}


def assert_close_params(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params
  )


def test_own_term_trains_its_parameters_and_state(jitted, batch, teacher):
  state, end, metrics = jitted["term"]
  [bias] = jax.tree.leaves(end.params["objective"])
  assert bias.shape == (3,) and np.asarray(bias).any()
  assert [int(x) for x in jax.tree.leaves(end.model_state["objective"])] == [2]
  assert {"loss", "error", "hard"} <= set(metrics)


def test_own_objective_weighs_its_terms_by_step(jitted):
  _, _, metrics = jitted["objective"]
  soft, hard, loss = (float(reduce.value(metrics[x])) for x in ("soft", "hard", "loss"))
  assert loss == pytest.approx(0.5 * soft + 0.1 * hard, rel=1e-5)


def test_accumulation_equals_one_large_step(student, teacher, batch, jitted):
  state, end, _ = jitted["term"]
  options = StepOptions(microbatches=4)
  step = jax.jit(make_train_step(student, teacher, OBJECTIVES["term"], OPTIMIZER, options))
  for _ in range(2):
    state, metrics = step(state, teacher.variables, batch)
  assert_close_params(state, end)
  assert float(metrics["hard"][1]) == 16


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pmap_with_axis_name_equals_jit(student, teacher, batch, jitted, name):
  state, end, expected = jitted[name]
  devices = jax.local_devices()[:4]
  step = make_train_step(
    student, teacher, OBJECTIVES[name], OPTIMIZER, StepOptions(axis_name="devices")
  )
  step = jax.pmap(step, axis_name="devices", in_axes=(0, None, 0), devices=devices)
  state = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), state)
  parts = {k: v.reshape(4, 4, *v.shape[1:]) for k, v in batch.items()}
  for _ in range(2):
    state, metrics = step(state, teacher.variables, parts)
  for device in (0, 3):
    assert_close_params(_of_device(state, device), end)
    loss = reduce.value(_of_device(metrics["loss"], device))
    np.testing.assert_allclose(loss, reduce.value(expected["loss"]), rtol=1e-4)


def _of_device(tree, device):
  return jax.tree.map(lambda x: x[device], tree)


def test_term_that_relates_rows_under_pmap(student, teacher, batch):
  objective = weighted(gap=(1.0, mean_gap()))
  state = jax.jit(make_init(student, teacher, objective, OPTIMIZER))(jax.random.key(0), batch)
  step = make_train_step(student, teacher, objective, OPTIMIZER)
  _, expected = jax.jit(step)(state, teacher.variables, batch)
  options = StepOptions(axis_name="i")
  step = make_train_step(student, teacher, objective, OPTIMIZER, options)
  step = jax.pmap(step, axis_name="i", in_axes=(None, None, 0), devices=jax.local_devices()[:4])
  parts = {k: v.reshape(4, 4, *v.shape[1:]) for k, v in batch.items()}
  _, metrics = step(state, teacher.variables, parts)
  values = [reduce.value(tuple(x[0] for x in metrics[name])) for name in ("gap", "loss")]
  np.testing.assert_allclose(values, float(reduce.value(expected["gap"])), rtol=1e-4)


def test_masked_rows_of_a_batch_do_not_train(student, teacher, batch, jitted):
  state, _, _ = jitted["term"]
  step = jax.jit(make_train_step(student, teacher, OBJECTIVES["term"], OPTIMIZER))
  where = np.arange(16) < 10
  label = np.where(where, batch["label"], 2 - batch["label"])
  x = np.where(where[:, None], batch["x"], 100.0).astype(np.float32)
  ends = [
    step(state, teacher.variables, {**b, "where": where})[0]
    for b in (batch, {**batch, "x": x, "label": label})
  ]
  assert_close_params(*ends)


def test_compile_for_cpu_takes_own_term(student, teacher, batch):
  analysis = compile_for("cpu", student, teacher, OBJECTIVES["term"], OPTIMIZER, batch)
  assert analysis.fits and analysis.topology == "cpu" and analysis.chips == jax.device_count()
  assert analysis.items[0] == 16
  assert analysis.parameters == 4 * 3 + 3 + 3  # the term's bias trains too
  assert analysis.step.flops > 0 and "cpu" in str(analysis)


def test_fit_with_own_term(student, teacher, train, validation):
  result = fit(
    student, teacher, OBJECTIVES["term"], OPTIMIZER, train, steps=10, batch_size=16,
    evaluation=validation, run=RunOptions(progress=False),
  )  # fmt: skip
  scores = [line for line in result.history if line["phase"] == "validation"]
  assert scores[-1]["accuracy"] > scores[0]["accuracy"] or scores[-1]["accuracy"] == 1.0
  assert "error" in next(x for x in result.history if x["phase"] == "train")


def test_init_of_own_term_rejects_networks(student, teacher, batch):
  wide = teacher._replace(
    apply=lambda params, state, batch, *, train, key: ({"logits": jnp.zeros((16, 5))}, state)
  )
  with pytest.raises(ValueError, match=r"error.*logits"):
    make_init(student, wide, OBJECTIVES["term"], OPTIMIZER)(jax.random.key(0), batch)


def test_learned_term_as_documented(student, teacher, batch):
  def init(key, s, t):
    return Variables({"scale": jnp.ones(())}, {})

  def apply(params, state, s, t):
    return losses.hint(params["scale"] * s, t), state

  objective = weighted(scaled=(1.0, learned("logits", "logits", init, apply)))
  state = jax.jit(make_init(student, teacher, objective, OPTIMIZER))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, teacher, objective, OPTIMIZER))
  end, _ = step(state, teacher.variables, batch)
  [scale] = jax.tree.leaves(end.params["objective"])
  assert float(scale) != 1.0


def test_schedule_weight_follows_the_step(student, teacher, batch):
  soft = objectives.logits(losses.logit_mse)
  objective = weighted(soft=(optax.linear_schedule(1.0, 0.0, 2), soft))
  state = jax.jit(make_init(student, teacher, objective, OPTIMIZER))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, teacher, objective, OPTIMIZER))
  ratios = []
  for _ in range(3):
    state, metrics = step(state, teacher.variables, batch)
    ratios.append(float(reduce.value(metrics["loss"]) / reduce.value(metrics["soft"])))
  np.testing.assert_allclose(ratios, [1.0, 0.5, 0.0], atol=1e-6)


def test_own_loss_function_in_logits(student, teacher, batch):
  def absolute(student, teacher, *, scale):
    return scale * jnp.abs(student - teacher).sum(-1)

  objective = weighted(soft=(1.0, objectives.logits(absolute, scale=2.0)))
  state = jax.jit(make_init(student, teacher, objective, OPTIMIZER))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, teacher, objective, OPTIMIZER))
  _, metrics = step(state, teacher.variables, batch)
  logits = [
    batch["x"] @ np.asarray(p["w"]) for p in (state.params["student"], teacher.variables[0])
  ]
  expected = 2 * np.abs(logits[0] - logits[1]).sum(-1).mean()
  np.testing.assert_allclose(reduce.value(metrics["soft"]), expected, rtol=1e-4)
  with pytest.raises(ValueError, match=r"scale"):
    objectives.logits(absolute)
  with pytest.raises(ValueError, match=r"scal"):
    objectives.logits(absolute, scal=1.0)


def test_weighted_rejects_terms_and_weights():
  for terms in (
    {},
    {"hard": objectives.labels()},
    {"hard": (-1.0, objectives.labels())},
    {"hard": (float("nan"), objectives.labels())},
    {"hard": (1.0, losses.kl_divergence)},
    {"loss": (1.0, objectives.labels())},
  ):
    with pytest.raises(ValueError, match="|".join(terms) or "term"):
      weighted(**terms)
