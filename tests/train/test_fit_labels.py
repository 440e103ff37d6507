"""What `fit` does with labels: unlabeled rows, marks of no label, and those that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import data, objectives, tasks
from distill_jax.distributed import sharding
from distill_jax.models import from_apply

IMAGE = np.ones((4, 1), np.float32)


def linear(outputs):
  """Returns a student without hidden layers, which starts with zeros."""

  def apply(w, image):
    return image.reshape(len(image), -1) @ w

  return from_apply(lambda key, x: jnp.zeros((x[0].size, outputs)), apply)


def hard(loss=None, **options):
  return objectives.weighted(hard=(1.0, objectives.labels(loss, **options)))


def fitted(student, source, objective=None, steps=1, **options):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  student = linear(student) if isinstance(student, int) else student
  return fit_with(
    student, None, hard() if objective is None else objective, optax.sgd(0.25), source,
    steps=steps, batch_size=4, mesh=mesh, **options,
  )  # fmt: skip


@pytest.mark.parametrize("mix", [data.mixup, data.cutmix])
def test_examples_mixed_with_unlabeled_ones_train(mix):
  arrays = {"image": np.ones((4, 8, 8, 1), np.float32), "label": np.array([0, -1, -1, 2])}
  source = data.Source(arrays, classes=3, ignore_label=-1)
  result = fitted(3, source, steps=2, mix=mix(1.0, 3), log_every=1)
  assert result.history[-1]["nonfinite"] == 0
  assert np.isfinite(result.history[-1]["loss"])
  assert np.abs(result.variables.params).max() > 0


def batch(label, **entries):
  return {"image": IMAGE, "label": np.asarray(label), **entries}


def test_number_labels_are_trained_on_as_they_are():
  squared = hard(optax.squared_error, ignore_label=-100)
  result = fitted(1, [batch([3, -100, 2, 1])], squared, 30, ignore_label=-100)
  np.testing.assert_allclose(result.variables.params, 2, rtol=1e-5)
  # -1 is no mark of a regression.
  result = fitted(1, [batch([3, -1, 2, 0])], hard(optax.squared_error), 30)
  np.testing.assert_allclose(result.variables.params, 1, rtol=1e-5)


@pytest.mark.parametrize(
  ("label", "loss", "task"),
  [
    ([3, -999, 2, 1], optax.squared_error, tasks.regression),
    ([3.0, -999, 2, 1], optax.squared_error, tasks.regression),
    ([1.0, -999, 0, 1], optax.sigmoid_binary_cross_entropy, tasks.binary),
  ],
)
def test_task_ignores_the_numbers_that_a_term_ignores(label, loss, task):
  """The error of a regression was that of -999."""
  batches = [batch(label)]
  options = {"validation": batches, "eval_every": 1}
  objective = hard(loss, ignore_label=-999)
  with pytest.raises(ValueError, match=r"^task: .*-999.*got None"):
    fitted(1, batches, objective, task=task(), **options)
  if not (task is tasks.regression and isinstance(label[0], float)):
    return
  result = fitted(1, batches, objective, task=task(ignore_label=-999), **options)
  assert result.history[-1]["rmse"] == pytest.approx(np.sqrt(14 / 3 - 3))  # It predicts 1 by now.


def test_mark_that_the_loss_does_not_know_raises():
  with pytest.raises(ValueError, match=r"^source: .*label: .*labels\(loss, ignore_label=-100\)"):
    fitted(1, [batch([3, -100, 2, 1])], hard(optax.squared_error), ignore_label=-100)
  source = data.Source(batch([1, 255, 0, 1]), classes=2, ignore_label=255)
  with pytest.raises(ValueError, match=r"^label: .*labels\(loss, ignore_label=-1\)"):
    fitted(1, source, hard(optax.squared_error))


def test_ignore_label_of_a_term_is_enough():
  source = data.Source(batch([0, 255, 1, 0]))
  result = fitted(2, source, hard(ignore_label=255), 60, validation=source, eval_every=60)
  np.testing.assert_allclose(result.history[-1]["accuracy"], 2 / 3, rtol=1e-6)
  log_odds = result.variables.params @ np.array([1, -1])
  np.testing.assert_allclose(log_odds, np.log(2), rtol=1e-2)


TWO_HEADS = from_apply(
  lambda key, x: jnp.zeros((1, 5)),
  lambda w, x: {"logits": (x @ w)[:, :3], "kind": (x @ w)[:, 3:]},
)


def both_heads(*ignored):
  ignore_label, ignore_kind = ignored or (None, None)
  return objectives.weighted(
    hard=(1.0, objectives.labels(ignore_label=ignore_label)),
    kind=(1.0, objectives.labels(output="kind", ignore_label=ignore_kind)),
  )


def test_heads_have_ignore_labels_of_their_own():
  heads = both_heads(255, -100)
  batches = [batch([0, 255, 2, 255], kind=np.array([-100, 1, 0, 0]))]
  result = fitted(TWO_HEADS, batches, heads, validation=batches, eval_every=1)
  assert result.history[-1]["accuracy"] == 0.5
  assert result.history[-1]["kind/accuracy"] == pytest.approx(2 / 3)
  with pytest.raises(ValueError, match="^source: .*kind: .*255"):
    fitted(TWO_HEADS, [batch([0, 255, 2, 1], kind=np.array([255, 1, 0, 0]))], heads)


@pytest.mark.parametrize("missing", ["label", "kind"])
@pytest.mark.parametrize("as_source", [False, True])
def test_validation_has_the_labels_of_all_heads(missing, as_source):
  """It was scored on the other head alone."""
  examples = batch([0, 1, 2, 0], kind=np.array([0, 1, 0, 0]))
  rest = {name: x for name, x in examples.items() if name != missing}
  validation = data.Source(rest) if as_source else [rest]
  with pytest.raises(ValueError, match=f"^evaluation: expected the labels .*'{missing}'.*task"):
    fitted(TWO_HEADS, [examples], both_heads(), validation=validation)


SIGMOID = optax.sigmoid_binary_cross_entropy


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize(
  ("label", "hint"),
  [
    ([0, 1, 2, 0], "nearest class is 1"),
    ([-1, 1, -1, 1], r"\(label \+ 1\) // 2"),
    ([0, 255, 0, 255], "label // 255"),
    ([2, 1, 1, 2], "label - 1"),
  ],
)
def test_binary_labels_outside_0_and_1_raise(label, hint, dtype):
  for outputs, values in ((1, label), (2, np.stack([label, np.ones(4)], 1))):
    values = np.asarray(values, dtype)
    hints = hint if outputs == 1 else ""
    with pytest.raises(ValueError, match=f"^source: .*label: .*{hints}"):
      fitted(outputs, [batch(values)], hard(SIGMOID))
    with pytest.raises(ValueError, match=f"^label: .*{hints}"):
      fitted(outputs, data.Source(batch(values)), hard(SIGMOID))


def test_unlabeled_binary_examples_do_not_train():
  source = data.Source(batch([1, 255, 0, 1]), classes=2, ignore_label=255)
  result = fitted(1, source, hard(SIGMOID), 100)
  np.testing.assert_allclose(result.variables.params, np.log(2), rtol=1e-2)


def test_labels_from_1_suggest_no_ignore_label():
  with pytest.raises(ValueError, match="label - 1") as error:
    data.Source(batch([1, 2, 3, 3]), classes=3)
  assert "ignore_label" not in str(error.value)
  with pytest.raises(ValueError, match="^label: .*ignore_label=-1"):  # None of them is 1.
    data.Source(batch([-1, -1, -1, -1]), classes=2)


def test_negative_weight_in_a_later_batch_raises():
  good = batch([0, 1, 1, 0], importance=np.array([1.0, 0, 2, 1]))
  bad = good | {"importance": np.array([1.0, 0, -2, 1])}
  with pytest.raises(ValueError, match="^source: batch 1.*importance: .*-2"):
    fitted(2, lambda start: iter([good, bad]), hard(example_weights="importance"), 2)


@pytest.mark.parametrize(
  ("label", "field"), [(np.eye(3)[[0, 1, 2, 0]].astype(int), "label"), (np.ones(4), "label")]
)
def test_validation_labels_of_another_form_are_not_left_out(label, field):
  """They were not measured: the objective's loss took the place of the accuracy."""
  batches = [batch([0, 1, 2, 1])]
  with pytest.raises(ValueError, match=f"^evaluation: .*{field}: expected"):
    fitted(3, batches, evaluation=[batch(label)])
  rows = fitted(3, batches, evaluation=[batch(np.eye(3, dtype=np.float32)[[0, 1, 2, 0]])])
  assert "accuracy" in rows.history[-1]
