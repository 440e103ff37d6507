"""`tasks.heads`: each head's scores are those of its own task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import tasks, train
from distill_jax.models import from_apply

MAIN = tasks.classification()
KIND = tasks.classification(label="kind", output="kind")
POSITIVE = tasks.binary(label="positive", output="positive")
TASK = tasks.heads(MAIN, kind=KIND, positive=POSITIVE)


def arrays(rng):
  outputs = {
    "logits": rng.normal(size=(12, 3)),
    "kind": rng.normal(size=(12, 4)),
    "positive": rng.normal(size=(12, 1)),
  }
  batch = {
    "label": rng.integers(0, 3, 12),
    "kind": rng.integers(0, 4, 12),
    "positive": rng.integers(0, 2, 12),
  }
  return jax.tree.map(jnp.asarray, (outputs, batch))


def test_parts_are_scored_where_all_tasks_score_them():
  found = tasks.detection(lambda outputs: outputs["found"])
  assert tasks.heads(MAIN, found=found).scores_parts
  assert not tasks.heads(POSITIVE, found=found).scores_parts


def test_scores_are_those_of_each_task(rng):
  outputs, batch = arrays(rng)
  teacher, _ = arrays(rng)
  scores = TASK.compute(jax.device_get(TASK.statistics(outputs, batch, teacher)))
  rows = jax.tree.map(np.asarray, TASK.predict(outputs, batch))
  scores |= TASK.evaluate_predictions(rows, {})
  expected = {}
  for prefix, task in (("", MAIN), ("kind/", KIND), ("positive/", POSITIVE)):
    own = task.compute(jax.device_get(task.statistics(outputs, batch, teacher)))
    if task is POSITIVE:
      own |= task.evaluate_predictions(jax.tree.map(np.asarray, task.predict(outputs, batch)), {})
    expected |= {f"{prefix}{name}": x for name, x in own.items()}
  assert scores == pytest.approx(expected)
  assert {"accuracy", "kind/accuracy", "positive/auroc"} <= set(scores)
  assert set(scores) <= {metric.name for metric in TASK.metrics}
  assert TASK.label_classes(outputs) == {"label": 3, "kind": 4, "positive": 2}
  metrics = TASK.train_metrics(outputs, batch)
  assert set(metrics) == {"accuracy", "kind/accuracy", "positive/accuracy"}


def test_a_second_head_of_the_same_name_is_inferred(rng):
  outputs, batch = arrays(rng)
  names = [metric.name for metric in tasks.infer(outputs, batch).metrics]
  assert names[0] == "accuracy" and "kind/accuracy" in names
  assert "positive/accuracy" not in names  # One logit is named by its user.


def test_heads_that_do_not_fit_together_raise():
  with pytest.raises(ValueError, match="^others"):
    tasks.heads(MAIN)
  with pytest.raises(ValueError, match="^ignore_label"):
    tasks.heads(
      tasks.classification(ignore_label=255),
      kind=tasks.classification(label="kind", output="kind", ignore_label=9),
    )


def test_heads_with_host_scores_need_no_images(rng):
  outputs, batch = arrays(rng)
  model = from_apply(None, lambda w, x: outputs, variables=(), inputs="x")
  batches = [{"x": outputs["logits"], **batch}]
  scores = train.evaluate(model, None, batches, TASK)
  assert {"accuracy", "positive/auroc"} <= set(scores)
