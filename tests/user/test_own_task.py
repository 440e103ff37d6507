"""Tasks of one's own, regression, several labels, `best`, patience and an EMA teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, losses, objectives, reduce, tasks, teachers
from distill_jax.models import from_apply
from distill_jax.train import Evaluation, RunOptions, evaluate, evaluate_models, fit
from distill_jax.types import Metric, Task, Variables

QUIET = RunOptions(progress=False)


def validations(result):
  return [line for line in result.history if line["phase"] == "validation"]


def hits(outputs, batch):
  return outputs["logits"].argmax(-1) == batch["label"]


def median_confidence_task():
  """A task from scratch: a sum (accuracy) and a score that is no sum (a median)."""

  def statistics(outputs, batch, teacher):
    where = batch.get("where")
    return {"hits": reduce.total(hits(outputs, batch), where), "teacher": teacher is not None}

  def evaluate_predictions(predictions, references):
    correct = predictions["prediction"] == references["label"]
    return {"median": float(np.median(predictions["confidence"])), "right": float(correct.mean())}

  def predict(outputs, batch):
    probabilities = jax.nn.softmax(outputs["logits"])
    return {"confidence": probabilities.max(-1), "prediction": probabilities.argmax(-1)}

  return Task(
    metrics=(
      Metric("hit_rate", "hit rate", "%", format=".2%"),
      Metric("median", "median confidence"),
      Metric("right", "hit rate on the host"),
    ),
    statistics=statistics,
    compute=lambda sums: {"hit_rate": float(reduce.value(sums["hits"]))},
    train_metrics=lambda outputs, batch: {
      "train_hits": reduce.total(hits(outputs, batch), batch.get("where"))
    },
    predict=predict,
    evaluate_predictions=evaluate_predictions,
  )


@pytest.fixture(scope="module")
def distill(student, teacher, objective):
  optimizer = optax.adam(0.05)

  def distill(source, evaluation, *, teacher=teacher, objective=objective, **kwargs):
    kwargs = dict(steps=12, batch_size=16, run=QUIET) | kwargs
    return fit(student, teacher, objective, optimizer, source, evaluation=evaluation, **kwargs)

  return distill


def test_task_from_scratch_is_evaluated_and_chooses(distill, train, validation):
  task = median_confidence_task()
  result = distill(train, Evaluation(validation, every=4), task=task)
  lines = validations(result)
  assert all({"hit_rate", "median", "right"} <= set(line) for line in lines)
  assert all(line["hit_rate"] == pytest.approx(line["right"]) for line in lines)
  assert "train_hits" in next(x for x in result.history if x["phase"] == "train")
  scores = evaluate(result.student, result.variables, validation, task)
  assert scores["hit_rate"] == pytest.approx(max(line["hit_rate"] for line in lines))
  logits = result.predict(validation)["logits"]
  confidence = np.exp(logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)).max(-1)
  assert scores["median"] == pytest.approx(float(np.median(confidence)), rel=1e-4)
  [evaluated] = evaluate_models(
    [(result.student, result.variables)], validation, task, predict=True
  )
  assert evaluated.predictions["confidence"].shape == (24,)


def test_with_metric_adds_a_mean(distill, train, validation):
  def top2(outputs, batch, teacher):
    ranks = (outputs["logits"] > _logit_of_label(outputs, batch)).sum(-1)
    return reduce.total(ranks < 2, where=batch.get("where"))

  metric = Metric("top2", "top-2 accuracy", "%", format=".2%")
  task = tasks.classification().with_metric(metric, top2)
  result = distill(train, Evaluation(validation, every=4, best="top2"), task=task)
  scores = evaluate(result.student, result.variables, validation, task)
  logits = result.predict(validation)["logits"]
  label = validation.arrays["label"]
  expected = [y in np.argsort(row)[-2:] for row, y in zip(logits, label)]
  assert scores["top2"] == pytest.approx(np.mean(expected))
  assert task.metrics[-1].name == "top2" and task.metrics[0].name == "accuracy"
  with pytest.raises(ValueError, match=r"top2"):
    task.with_metric(metric, top2)


def _logit_of_label(outputs, batch):
  return jnp.take_along_axis(outputs["logits"], batch["label"][:, None], axis=-1)


def test_best_by_another_metric(distill, train, validation):
  result = distill(train, Evaluation(validation, every=2, best="nll"))
  scores = evaluate(result.student, result.variables, validation, tasks.classification())
  assert scores["nll"] == pytest.approx(min(x["nll"] for x in validations(result)), rel=1e-5)
  with pytest.raises(ValueError, match=r"best"):
    distill(train, Evaluation(validation, best="perplexity"))


def test_patience_stops_training(student, train, validation, baseline):
  result = fit(
    student, None, baseline, optax.sgd(0.0), train, steps=50, batch_size=16, run=QUIET,
    evaluation=Evaluation(validation, every=5, patience=2),
  )  # fmt: skip
  # No update changes the weights: the first evaluation stays the best.
  assert [line["step"] for line in validations(result)] == [5, 10, 15]
  assert int(result.state.step) == 15


def test_moving_average_as_teacher(student, train, validation, objective):
  teacher = teachers.moving_average(student, decay=0.9)
  result = fit(
    student, teacher, objective, optax.adam(0.05), train, steps=12, batch_size=16, run=QUIET,
    evaluation=validation,
  )  # fmt: skip
  assert validations(result)[-1]["accuracy"] > 0.6
  average, last = result.state.average.params["w"], result.state.params["student"]["w"]
  assert average.shape == last.shape and not np.array_equal(average, last)
  with pytest.raises(ValueError, match=r"decay"):
    teachers.moving_average(student, decay=1.0)


@pytest.fixture(scope="module")
def regression(examples):
  """Two targets a row, under names of one's own."""
  x = examples.arrays["x"]
  y = x @ np.array([[1.0, -1.0], [0.5, 0.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
  source = data.Source({"x": x, "y": y}, name="targets")
  network = from_apply(
    lambda key, x: {"w": jnp.zeros((4, 2))},
    lambda params, x: {"prediction": x @ params["w"]},
    inputs="x",
  )
  return source.take(slice(0, 96)), source.take(slice(96, 120)), network


def test_regression_by_names_of_ones_own(regression):
  train, validation, network = regression
  task = tasks.regression(label="y", output="prediction", unit="mm")

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    return (jnp.square(student["prediction"] - batch["y"]).mean(-1), batch.get("where")), state

  term = objectives.Term(lambda key, s, t: Variables({}, {}), apply)
  result = fit(
    network, None, objectives.weighted(error=(1.0, term)), optax.adam(0.2), train, steps=30,
    batch_size=16, evaluation=Evaluation(validation, every=10), task=task, run=QUIET,
  )  # fmt: skip
  scores = evaluate(network, result.variables, validation, task)
  error = result.predict(validation)["prediction"] - validation.arrays["y"]
  spread = validation.arrays["y"] - validation.arrays["y"].mean()
  rmse = np.sqrt(np.square(error).mean())
  names = [m.name for m in task.metrics]
  assert set(names) - {"pearson", "spearman"} == set(scores)  # of one number per example only
  assert scores[names[0]] == pytest.approx(rmse, rel=1e-3) and task.metrics[0].better == "min"
  assert scores[names[1]] == pytest.approx(np.abs(error).mean(), rel=1e-3)
  expected = 1 - np.square(error).sum() / np.square(spread).sum()
  assert scores[names[2]] == pytest.approx(expected, rel=1e-3)
  assert {m.unit for m in task.metrics} >= {"mm"}


def test_regression_distilled_by_documented_terms(regression, examples):
  """`objectives.labels(optax.squared_error)` with labels [B] and an output [B, 1]."""
  x = examples.arrays["x"]
  label = (x @ np.array([1.0, -2.0, 0.5, 0.0], np.float32)).astype(np.float32)
  source = data.Source({"x": x, "label": label})
  train, validation = data.split(source, 0.2)

  def apply(params, x):
    return x @ params["w"]

  def init(key, x):
    return {"w": jnp.zeros((4, 1))}

  student = from_apply(init, apply, inputs="x")
  variables = {"w": jnp.array([[1.0], [-2.0], [0.5], [0.0]])}
  teacher = from_apply(init, apply, variables=variables, inputs="x")
  objective = objectives.weighted(
    hard=(0.5, objectives.labels(optax.squared_error)),
    soft=(0.5, objectives.logits(losses.logit_mse)),
  )
  arguments = dict(steps=40, batch_size=16, run=QUIET)
  result = fit(
    student, teacher, objective, optax.adam(0.2), train, evaluation=validation,
    task=tasks.regression(), **arguments,
  )  # fmt: skip
  lines = validations(result)
  first = tasks.regression().metrics[0].name
  assert lines[-1][first] < 0.2 * lines[0][first]
  # Without a task none is inferred from numbers: the objective's own terms are evaluated.
  result = fit(
    student, teacher, objective, optax.adam(0.2), train, evaluation=validation, **arguments
  )
  assert {"loss", "hard", "soft"} <= set(validations(result)[-1])


def test_multi_label_classes(examples):
  x = examples.arrays["x"]
  label = np.stack([x[:, 0] > 0, x[:, 1] > 0, x[:, 2] + x[:, 3] > 0], -1).astype(np.float32)
  source = data.Source({"x": x, "label": label})
  train, validation = data.split(source, 0.2)
  student = from_apply(
    lambda key, x: {"w": jnp.zeros((4, 3))}, lambda params, x: x @ params["w"], inputs="x"
  )
  objective = objectives.weighted(hard=(1.0, objectives.labels(optax.sigmoid_binary_cross_entropy)))
  task = tasks.multi_label()
  result = fit(
    student, None, objective, optax.adam(0.1), train, steps=30, batch_size=16, task=task,
    evaluation=validation, run=QUIET,
  )  # fmt: skip
  scores = evaluate(student, result.variables, validation, task)
  predicted = result.predict(validation)["logits"] > 0
  exact = (predicted == validation.arrays["label"].astype(bool)).all(-1).mean()
  assert exact > 0.5 and any(v == pytest.approx(exact, abs=1e-6) for v in scores.values())
  assert set(scores) == {metric.name for metric in task.metrics}


def test_task_that_does_not_fit_names_the_field(teacher, validation):
  with pytest.raises(ValueError, match=r"label"):
    evaluate(teacher, None, validation, tasks.regression())
  with pytest.raises(ValueError, match=r"label"):
    evaluate(teacher, None, validation, tasks.multi_label())


def test_infer_chooses_only_where_safe():
  logits = jnp.zeros((4, 3))
  label = np.zeros(4, np.int32)
  assert tasks.infer({"logits": logits}, {"label": label}).metrics[0].name == "accuracy"
  assert tasks.infer({"logits": logits[:, :1]}, {"label": label.astype(np.float32)}) is None
  assert tasks.infer({"logits": logits}, {"label": np.zeros((4, 3), np.float32)}) is None
  assert tasks.infer({"logits": logits}, {}) is None
