"""`evaluate`, `predict` and evaluations in `fit` for kinds of problems other than
classification.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from sklearn import metrics as sk

from distill_jax import data, losses, objectives, tasks, train
from distill_jax.distributed import sharding
from distill_jax.models import from_apply
from distill_jax.train.accumulator import Accumulator
from distill_jax.train.evaluation import evaluate_models
from distill_jax.types import Objective, Variables


def source(label, seed=0, rows=60, **arrays):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(rows, 4)).astype(np.float32)
  return data.Source({"image": image, "label": label(image)} | arrays)


def linear(outputs, name="logits"):
  return from_apply(
    lambda key, x: 0.01 * jax.random.normal(key, (4, outputs)), lambda w, x: {name: x @ w}
  )


WEIGHTS = np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
REGRESSION = objectives.weighted(hard=(1.0, objectives.labels(loss=optax.squared_error)))
MULTI_LABEL = objectives.weighted(
  hard=(1.0, objectives.labels(loss=optax.sigmoid_binary_cross_entropy))
)


def number(image):
  return image @ WEIGHTS[:, 0]


def classes(image):
  return (image @ WEIGHTS > 0).astype(np.int32)


def test_regression_trains_and_validates_with_its_task():
  validation = source(number, seed=1, rows=30)
  result = fit_with(
    linear(1), None, REGRESSION, optax.adam(0.05), source(number), steps=60, batch_size=16,
    validation=validation, eval_every=20, task=tasks.regression(),
  )  # fmt: skip
  lines = [line for line in result.history if line["phase"] == "validation"]
  assert lines[-1]["rmse"] < 0.5 * lines[0]["rmse"] and lines[-1]["r2"] > 0.5
  prediction = result.predict(validation)["logits"][:, 0]
  rmse = np.sqrt(sk.mean_squared_error(validation.arrays["label"], prediction))
  assert rmse == pytest.approx(min(line["rmse"] for line in lines), rel=1e-5)


def test_a_choosing_score_that_never_changes_is_named_with_one_that_does():
  label = lambda image: (image[:, 0] > 0).astype(np.int32)  # noqa: E731
  arguments = linear(3), None, HARD, optax.sgd(1e-5), source(label)
  options = {"batch_size": 16, "eval_every": 1, "validation": source(label, seed=1)}
  with pytest.warns(UserWarning, match="^best: .*'accuracy' .* 5, .*best='nll'"):
    fit_with(*arguments, steps=5, **options)


HARD = objectives.weighted(hard=(1.0, objectives.labels()))


@pytest.mark.parametrize(
  "examples",
  [
    data.Source({"image": np.ones((8, 4)), "label": np.full(8, -1)}, classes=3, ignore_label=-1),
    data.Source({"image": np.ones((8, 4)), "label": np.zeros((8, 3), np.float32)}),
    {"image": np.ones((8, 4), np.float32), "label": np.full(8, 255)},
  ],
)
def test_labels_alone_on_unlabeled_examples_raise_before_training(examples):
  with pytest.raises(ValueError, match="^source: .*hard"):
    fit_with(
      linear(3), None, HARD, optax.sgd(1.0), examples, steps=1, batch_size=8, ignore_label=255
    )


IMAGE = np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32)
CLASS = np.arange(8) % 3
BCE = objectives.labels(loss=optax.sigmoid_binary_cross_entropy)


@pytest.mark.parametrize(
  ("field", "term", "outputs", "task", "entries"),
  [
    # Without a task for the entry, only the objective knows its classes.
    ("other", objectives.labels(entry="other"), 3, None, {"other": np.full(8, 7)}),
    ("label", objectives.labels(), 3, None, {"label": np.float32(np.eye(3))[CLASS] / 2}),
    ("label", objectives.labels(), 3, None, {"label": np.ones((8, 3), np.float32)}),
    ("hard.*ignore_label", objectives.labels(ignore_label=1), 3, None, {"label": CLASS}),
    ("w", objectives.labels(example_weights="w"), 3, None, {"label": CLASS, "w": CLASS - 1.0}),
    ("w", objectives.labels(example_weights="w"), 3, None, {"label": CLASS, "w": np.zeros(8)}),
    ("best: .*auroc", BCE, 1, tasks.binary(), {"label": np.ones(8, int)}),
    ("label", BCE, 3, tasks.multi_label(), {"label": np.full((8, 3), 2)}),
  ],
)
def test_labels_that_do_not_fit_raise_before_training(field, term, outputs, task, entries):
  examples = {"image": IMAGE, **entries}
  objective = objectives.weighted(hard=(1.0, term))
  for source in (examples, [examples]):
    with pytest.raises(ValueError, match=f"{field}.*: "):
      fit_with(
        linear(outputs), None, objective, optax.sgd(1.0), source, steps=2, batch_size=8,
        task=task, validation=examples if task else None,
      )  # fmt: skip


def test_bool_labels_have_an_accuracy():
  batch = {"image": IMAGE, "label": CLASS > 0}
  names = [metric.name for metric in tasks.infer({"logits": np.ones((8, 2))}, batch).metrics]
  assert names[0] == "accuracy"


def test_other_terms_train_on_unlabeled_examples():
  teacher = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS)
  objective = objectives.weighted(
    hard=(1.0, objectives.labels()), soft=(1.0, objectives.logits(losses.kl_divergence))
  )
  examples = {"image": np.ones((8, 4), np.float32), "label": np.full(8, -1)}
  result = fit_with(
    linear(3), teacher, objective, optax.sgd(1.0), examples, steps=1, batch_size=8, ignore_label=-1
  )
  assert result.history[-1]["grad_norm"] > 0 and "hard" not in result.history[-1]


def test_batches_that_trained_nothing_are_reported():
  batch = {"image": np.ones((8, 4), np.float32), "label": np.full(8, -1)}
  with pytest.warns(UserWarning, match="^source: .*hard"):
    fit_with(linear(3), None, HARD, optax.sgd(1.0), [batch], steps=1, batch_size=8, ignore_label=-1)


def test_multi_label_trains_and_validates_with_its_task():
  validation = source(classes, seed=1, rows=30)
  result = fit_with(
    linear(3), None, MULTI_LABEL, optax.adam(0.1), source(classes), steps=60, batch_size=16,
    validation=validation, eval_every=30, task=tasks.multi_label(),
  )  # fmt: skip
  scores = train.evaluate(result.student, result.variables, validation, tasks.multi_label())
  assert scores["macro_f1"] > 0.8 and scores["map"] > 0.8
  best = max(line["macro_f1"] for line in result.history if line["phase"] == "validation")
  assert scores["macro_f1"] == pytest.approx(best)


@pytest.mark.parametrize("labeled", [True, False])
def test_without_a_task_the_terms_are_the_metrics(labeled):
  teacher = from_apply(None, lambda w, x: {"embedding": x @ w}, variables=WEIGHTS)
  label = classes if labeled else lambda image: np.full(len(image), 0.5, np.float32)
  validation = source(label, seed=1, rows=30)
  objective = objectives.weighted(
    match=(0.5, objectives.features("embedding", "embedding", losses.hint))
  )
  result = fit_with(
    linear(3, "embedding"), teacher, objective, optax.adam(0.05), source(label), steps=40,
    batch_size=16, validation=validation, eval_every=20,
  )  # fmt: skip
  last = result.history[-1]
  student = result.predict(validation)["embedding"]
  expected = ((student - validation.arrays["image"] @ WEIGHTS) ** 2).mean()
  assert last["match"] == pytest.approx(expected, rel=1e-4)
  assert last["loss"] == pytest.approx(0.5 * expected, rel=1e-4)


def test_evaluations_hold_one_set_of_sums(monkeypatch):
  """Memory of an evaluation does not depend on the number of batches."""
  task = tasks.classification()
  model = linear(3)
  variables = model.init(jax.random.key(0), {"image": np.zeros((1, 4), np.float32)})
  batches = [
    {"image": np.ones((8, 4), np.float32), "label": np.zeros(8, np.int32)} for _ in range(12)
  ]
  live = []

  def watched():
    for batch in batches:
      live.append(sum(x.size for x in jax.live_arrays() if x.shape == (3, 3)))
      yield batch

  train.evaluate(model, variables, watched(), task)
  assert live[-1] <= live[2]


def test_evaluate_compares_with_a_teacher_and_drops_padding():
  labels = source(lambda image: (image @ WEIGHTS).argmax(1).astype(np.int32), rows=21)
  teacher = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS)
  other = from_apply(None, lambda w, x: x @ w, variables=-WEIGHTS)
  task = tasks.classification()
  pairs = [(teacher, teacher.variables), (other, other.variables)]
  results = evaluate_models(pairs, labels, task, teacher=pairs[0], predict=True, batch_size=8)
  assert [r.scores["agreement"] for r in results] == [1.0, 0.0]
  assert results[0].scores["accuracy"] == 1.0
  predicted = (labels.arrays["image"] @ WEIGHTS).argmax(1)
  np.testing.assert_array_equal(results[0].predictions["class"], predicted)
  assert train.evaluate(teacher, None, labels, task, batch_size=8)["accuracy"] == 1.0
  with pytest.raises(ValueError, match="variables"):
    train.evaluate(linear(3), None, labels, task)


@pytest.mark.parametrize("ignored", [-1, 255])
def test_evaluate_needs_a_label_or_a_teacher(ignored):
  task = tasks.classification(ignore_label=ignored)
  model, variables = linear(3), Variables(WEIGHTS, {})
  batch = {"image": np.ones((4, 4), np.float32), "label": np.full(4, ignored)}
  with pytest.raises(ValueError, match="^examples: expected some with a label"):
    train.evaluate(model, variables, [batch], task)
  scores = train.evaluate(model, variables, [batch], task, teacher=(model, variables))
  assert scores["agreement"] == 1 and "accuracy" not in scores


def test_scores_without_parts_are_those_of_the_other_examples():
  labels = source(lambda image: (image @ WEIGHTS).argmax(1).astype(np.int32), rows=45)
  model = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS + 0.5)
  task = tasks.classification()
  pair = [(model, model.variables)]
  (result,) = evaluate_models(pair, labels, task, leave_out=True, batch_size=2)
  parts = result.leave_out
  assert parts["macro_f1"].shape == (23,)
  without = labels.take(np.delete(np.arange(45), [6, 7]))
  scores = train.evaluate(model, None, without, task)
  assert {name: float(values[3]) for name, values in parts.items()} == pytest.approx(scores)
  (few,) = evaluate_models(pair, labels, task, leave_out=True, batch_size=8)
  assert few.leave_out == {}  # Of six parts no error follows.


def test_predict_takes_a_batch_a_source_and_batches():
  model = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS)
  examples = source(number, rows=21)
  expected = examples.arrays["image"] @ WEIGHTS
  batches = list(data.eval_batches(examples, 8))
  for given in (examples, batches, {"image": examples.arrays["image"]}):
    outputs = train.predict(model, None, given, batch_size=8)["logits"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


def test_rows_are_split_over_the_mesh_of_the_variables(mesh):
  rng, shardings = np.random.default_rng(0), []
  x = rng.normal(size=(13, 6)).astype(np.float32)
  weights = rng.normal(size=(6, 3)).astype(np.float32)

  def apply(p, image):
    jax.debug.inspect_array_sharding(jnp.asarray(image), callback=shardings.append)
    return image @ p["w"]

  model = from_apply(None, apply, variables={"w": weights})
  variables = sharding.replicate(model.variables, mesh)
  examples = data.Source({"image": x, "label": (x @ weights).argmax(1)}, classes=3)
  batch = {"image": x}
  for given in (batch, data.Source(batch), [batch]):
    outputs = train.predict(model, variables, given, batch_size=13)["logits"]
    np.testing.assert_allclose(outputs, x @ weights, rtol=1e-5)
  assert (2, 6) in [s.shard_shape((16, 6)) for s in shardings]
  shardings.clear()
  scores = train.evaluate(model, variables, examples, tasks.classification(), batch_size=13)
  assert scores["accuracy"] == 1.0
  assert (2, 6) in [s.shard_shape((16, 6)) for s in shardings]


def test_evaluations_that_cannot_choose_are_rejected_first():
  labels = source(lambda image: (image @ WEIGHTS).argmax(1).astype(np.int32), rows=32)
  goal = objectives.weighted(hard=(1.0, objectives.labels()))
  run = dict(steps=4, batch_size=16, task=tasks.classification())
  with pytest.raises(ValueError, match="best"):
    fit_with(
      linear(3), None, goal, optax.sgd(0.1), labels, validation=labels, best="agreement", **run
    )
  with pytest.raises(ValueError, match="evaluation"):
    batches = iter(list(data.eval_batches(labels, 16)))
    fit_with(linear(3), None, goal, optax.sgd(0.1), labels, validation=batches, **run)


@pytest.mark.parametrize(
  ("task", "field"),
  [
    (tasks.regression(output="prediction"), "prediction"),
    (tasks.multi_label(label="y"), "y"),
    (tasks.language_modeling(), "logits"),
    (tasks.segmentation(), "logits"),
  ],
)
def test_outputs_and_labels_of_another_task_are_named(task, field):
  model = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS)
  labels = source(lambda image: (image @ WEIGHTS).argmax(1).astype(np.int32), rows=8)
  with pytest.raises(ValueError, match=field):
    train.evaluate(model, None, labels, task)


def documented_objective():
  """Written as `Objective`'s docstring says, without `objectives`."""

  def init(key, student_outputs, teacher_outputs):
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    error = (student["logits"] - teacher["logits"]) ** 2
    return {"match": (1.0, (error.mean(-1), batch.get("where")))}, state

  return Objective(init, apply)


@pytest.mark.parametrize("how", ["jit", "pmap", "accumulation"])
def test_documented_objective_works(how):
  student = linear(3)
  teacher = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS)
  objective, optimizer = documented_objective(), optax.sgd(0.1)
  batch = next(data.batches(source(number), 16, seed=0))
  parts = student, teacher, objective, optimizer
  state = train.make_init(*parts)(jax.random.key(0), batch)
  one, metrics = train.make_train_step(*parts)(state, teacher.variables, batch)
  if how == "accumulation":
    options = train.StepOptions(microbatches=4)
    other, _ = train.make_train_step(*parts, options)(state, teacher.variables, batch)
  elif how == "pmap":
    options = train.StepOptions(axis_name="data")
    step = jax.pmap(train.make_train_step(*parts, options), "data", in_axes=(None, None, 0))
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    other = jax.tree.map(lambda x: x[0], step(state, teacher.variables, split)[0])
  else:
    other, _ = jax.jit(train.make_train_step(*parts))(state, teacher.variables, batch)
  np.testing.assert_allclose(other.params["student"], one.params["student"], rtol=1e-5)
  total, count = metrics["match"]
  assert count == 16 and total > 0


def test_loss_fn_is_the_step_s_loss():
  student = linear(3)
  teacher = from_apply(None, lambda w, x: x @ w, variables=WEIGHTS)
  objective = documented_objective()
  batch = next(data.batches(source(number), 16, seed=0))
  state = train.make_init(student, teacher, objective, optax.sgd(0.1))(jax.random.key(0), batch)
  loss_fn = train.make_loss_fn(student, teacher, objective)
  (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params, state.model_state, teacher.variables, batch, step=state.step, key=state.key
  )
  x = jnp.asarray(batch["image"])
  error = x @ state.params["student"] - x @ WEIGHTS
  assert loss == pytest.approx(float((error**2).mean()), rel=1e-5)
  np.testing.assert_allclose(grads["student"], 2 * x.T @ error / error.size, rtol=1e-4, atol=1e-6)
  assert set(aux.terms) == {"match"} and "logits" in aux.outputs


@pytest.mark.parametrize(
  ("task", "grid", "number"),
  [
    (tasks.classification(), (), 4000),
    (tasks.language_modeling(), (2,), 4000),
    (tasks.segmentation(), (2, 2), 60),
    (tasks.multi_label(), (), 4000),
  ],
)
def test_what_is_added_up_does_not_grow_with_batches_or_with_classes_squared(task, grid, number):
  shape = (8, *grid, number)
  logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  is_multi_label = grid == () and "map" in {metric.name for metric in task.metrics}
  label = (logits > 2).astype(np.int32) if is_multi_label else logits.argmax(-1)
  statistics = jax.jit(task.statistics)({"logits": logits}, {"label": label}, None)
  statistics = jax.device_get(statistics)
  accumulator = Accumulator(task)
  sizes = []
  for _ in range(6):
    accumulator.add(jax.tree.map(jnp.asarray, statistics), {})
    held = jax.tree.leaves((accumulator._statistics, accumulator._rows))
    sizes.append(sum(leaf.nbytes for leaf in held))
  assert len(set(sizes)) == 1 and sizes[0] < 2**17
