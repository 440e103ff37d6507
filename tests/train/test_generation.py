"""Tasks that score text which the model generates: when it is generated, and by whom."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import objectives, reduce, tasks, teachers
from distill_jax.models import from_apply
from distill_jax.tasks import Metric, Task
from distill_jax.train import Evaluation, evaluate, evaluate_models, fit
from distill_jax.types import SAMPLE, Variables

IMAGE = np.tile(np.eye(4, dtype=np.float32), (2, 1))
LABEL = np.tile(np.arange(4), 2)
BATCHES = [{"x": IMAGE, "label": LABEL}, {"x": IMAGE[:3], "label": LABEL[:3]}]
HARD = objectives.weighted(hard=(1.0, objectives.labels()))


class Sampler:
  """A toy: the 'text' of a row is the most probable class, `shift` further."""

  def __init__(self, shift=0):
    self.shift, self.traces = shift, 0

  def __call__(self, variables, key, batch):
    self.traces += 1
    tokens = ((batch["x"] @ variables.params).argmax(-1) + self.shift) % 4
    return tokens[:, None], jnp.ones(len(tokens), int)


def model(sample=None, weights=None):
  made = from_apply(
    lambda key, x: jnp.zeros((4, 4)), lambda w, x: x @ w, variables=weights, inputs="x"
  )
  return made._replace(sample=sample)


def task(decides=""):
  """Returns a small task of classes: its statistics, and whether the 'text' is the label."""

  def statistics(outputs, batch, teacher):
    values = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["label"])
    return reduce.total(values, batch.get("where"))

  exact = Metric("exact", "exact match", "%", format=".2%")
  return Task(
    metrics=(exact, Metric("nll", "nll", better="min")),
    statistics=statistics,
    compute=lambda sums: {"nll": float(reduce.value(sums))},
    predict=lambda outputs, batch: {"text": outputs[SAMPLE][0]},
    evaluate_predictions=lambda predictions, references: {
      "exact": float((predictions["text"][:, 0] == references["label"]).mean())
    },
    generates=True,
    decides=decides,
  )


def fitted(student, task, **evaluation):
  options = {"steps": 40, "batch_size": 8, "task": task}
  validation = Evaluation(BATCHES, every=20, **evaluation)
  return fit(student, None, HARD, optax.adam(0.1), BATCHES[:1], **options, evaluation=validation)


def test_networks_are_scored_by_their_own_text():
  weights = Variables(3 * jnp.eye(4), {})
  models = [(model(Sampler()), weights), (model(Sampler(1)), weights)]
  scores = [x.scores for x in evaluate_models(models, BATCHES, task())]
  assert [x["exact"] for x in scores] == [1, 0]
  assert scores[0]["nll"] == scores[1]["nll"]  # Of the outputs, which are the same.
  assert tasks.heads(tasks.classification(), text=task()).generates
  assert teachers.moving_average(models[1][0], decay=0.9).sample is models[1][0].sample


@pytest.mark.parametrize("decides, best", [("", None), ("nll", None), ("", "hard")])
def test_text_is_generated_where_it_chooses_the_weights(decides, best):
  sampler = Sampler()
  result = fitted(model(sampler), task(decides), best=best)
  assert result.best.name == (best or decides or "exact")
  is_text = result.best.name == "exact"
  history = [line for line in result.history if line["phase"] == "validation"]
  assert all(("exact" in line) == is_text and "nll" in line for line in history)
  # Traced once for the check by shapes, and else once a shape of batches.
  assert sampler.traces <= (6 if is_text else 1)
  assert evaluate(result.student, result.variables, BATCHES, result.task)["exact"] == 1
  assert result.model.sample is sampler


@pytest.mark.parametrize("decides", ["", "nll"])
def test_a_student_without_text_raises_before_training(decides):
  with pytest.raises(ValueError, match=r"student.*sample"):
    fitted(model(), task(decides))
  with pytest.raises(ValueError, match=r"model.*sample"):
    evaluate(model(), 3 * jnp.eye(4), BATCHES, task())


@pytest.mark.parametrize(
  "sample",
  [
    lambda variables, key, batch: jnp.zeros((len(batch["x"]), 3), int),
    lambda variables, key, batch: (jnp.zeros((3, 3), int), jnp.zeros(3, int)),
    lambda variables, key, batch: (batch["x"], jnp.zeros(len(batch["x"]), int)),
  ],
)
def test_text_of_another_shape_is_refused(sample):
  with pytest.raises(ValueError, match=r"student\.sample"):
    fitted(model(sample), task("nll"))
