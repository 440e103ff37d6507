"""What `fit` measures: heads, terms next to a task, padded batches, and labels of every batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from sklearn import metrics as sk

from distill_jax import data, losses, objectives, tasks
from distill_jax.models import from_apply
from distill_jax.train import evaluate
from distill_jax.types import Objective, Variables

RNG = np.random.default_rng(7)
WEIGHTS = RNG.normal(size=(4, 5)).astype(np.float32)
IMAGE = RNG.normal(size=(45, 4)).astype(np.float32)
Z = IMAGE @ WEIGHTS
LABEL, KIND = (Z[:, rows].argmax(1).astype(np.int32) for rows in (slice(3), slice(3, 5)))
HARD = objectives.weighted(hard=(1.0, objectives.labels()))
BATCHES = [
  {"image": IMAGE[i : i + 16], "label": LABEL[i : i + 16], "kind": KIND[i : i + 16]}
  for i in (0, 16, 32)
]


def heads(w, image):
  z = image @ w
  return {"logits": z[:, :3], "kind": z[:, 3:]}


def student():
  return from_apply(lambda key, x: 0.01 * jax.random.normal(key, (4, 5)), heads)


def teacher():
  return from_apply(None, heads, variables=3 * WEIGHTS)


def fitted(objective=HARD, validation=None, teacher=None, steps=2, **options):
  return fit_with(
    student(), teacher, objective, optax.adam(0.1), BATCHES[:2], steps=steps, batch_size=16,
    validation=BATCHES if validation is None else validation, **options,
  )  # fmt: skip


def test_two_heads_learn_their_own_entries_and_the_last_batch_of_13_counts_once():
  objective = objectives.weighted(
    hard=(1.0, objectives.labels()), kind=(1.0, objectives.labels(output="kind"))
  )
  result = fitted(objective, steps=60, eval_every=60, best="kind/accuracy")
  scores = result.history[-1]
  outputs = heads(np.asarray(result.variables.params), IMAGE)
  predicted = {name: np.asarray(z).argmax(1) for name, z in outputs.items()}
  assert scores["accuracy"] == pytest.approx(sk.accuracy_score(LABEL, predicted["logits"]))
  assert scores["kind/accuracy"] == pytest.approx(sk.accuracy_score(KIND, predicted["kind"]))
  macro = sk.f1_score(KIND, predicted["kind"], average="macro")
  assert scores["kind/macro_f1"] == pytest.approx(macro)
  assert min(scores["accuracy"], scores["kind/accuracy"]) > 0.85


@pytest.mark.parametrize("best", ["soft", None])
def test_terms_are_measured_next_to_a_task(best):
  objective = objectives.weighted(
    hard=(0.25, objectives.labels()), soft=(0.5, objectives.logits(losses.kl_divergence))
  )
  result = fitted(objective, teacher=teacher(), best=best, eval_every=1)
  assert result.best.name == (best or "accuracy")
  scores = result.history[-1]
  outputs = heads(np.asarray(result.variables.params), IMAGE)["logits"]
  expected = np.asarray(losses.kl_divergence(outputs, 3 * Z[:, :3])).mean()
  assert scores["soft"] == pytest.approx(expected, rel=1e-4)
  assert scores["teacher_kl"] == pytest.approx(expected, rel=1e-4)
  assert scores["loss"] == pytest.approx(0.25 * scores["nll"] + 0.5 * expected, rel=1e-4)
  assert scores["accuracy"] == pytest.approx((outputs.argmax(1) == LABEL).mean())
  elsewhere = evaluate(result.student, result.variables, BATCHES, result.task)
  assert elsewhere["accuracy"] == pytest.approx(scores["accuracy"]) and "loss" not in elsewhere


@pytest.mark.parametrize("reason", ["entry", "state"])
def test_terms_that_cannot_be_measured_have_no_scores(reason):
  """Validation examples may lack an entry of the objective; memories are of the training ones."""

  def init(key, student, teacher):
    return Variables({}, {"steps": jnp.zeros(())} if reason == "state" else {})

  def apply(params, state, student, teacher, batch, *, step, key):
    scale = batch["extra"].mean() if reason == "entry" else 1.0
    return {"own": (1.0, scale * (student["logits"] ** 2).mean())}, state

  extra = [{**batch, "extra": np.ones(16, np.float32)} for batch in BATCHES[:2]]
  result = fit_with(
    student(), None, Objective(init, apply), optax.adam(0.1), extra, steps=1, batch_size=16,
    validation=BATCHES,
  )  # fmt: skip
  train, validation = result.history
  assert "own" in train and not {"own", "loss"} & {*validation}


def with_last(**entries):
  last = {**BATCHES[2], **{name: values(BATCHES[2][name]) for name, values in entries.items()}}
  return [*BATCHES[:2], last]


def replaced(value, index=4):
  return lambda x: np.where(np.arange(len(x)) == index, value, x)


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize(("entry", "value"), [("label", 3), ("label", -7), ("kind", 2)])
def test_a_wrong_label_in_the_last_validation_batch_raises(entry, value, as_function):
  batches = with_last(**{entry: replaced(value)})
  validation = (lambda: iter(batches)) if as_function else batches
  with pytest.raises(ValueError, match=f"^evaluation: .*{entry}: .*{value}"):
    fitted(validation=validation, eval_every=1)


@pytest.mark.parametrize("ignore_label", [255, -100, -1])
def test_ignored_labels_count_in_no_batch(ignore_label):
  ignored = with_last(label=replaced(ignore_label))
  result = fitted(validation=ignored, ignore_label=ignore_label)
  outputs = np.asarray(heads(np.asarray(result.variables.params), IMAGE)["logits"])
  kept = np.arange(45) != 36
  expected = (outputs.argmax(1) == LABEL)[kept].mean()
  assert result.history[-1]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("is_task_given", [True, False])
def test_validation_without_labels_warns_where_a_task_is_given(recwarn, is_task_given):
  source = data.Source({"image": IMAGE, "label": LABEL}, classes=3, ignore_label=-1)
  unlabeled = data.Source(
    {"image": -IMAGE, "label": np.full(45, -1)}, classes=3, ignore_label=-1, name="other"
  )
  soft = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  task = tasks.classification() if is_task_given else None
  result = fit_with(
    student(), teacher(), soft, optax.adam(0.1), source, steps=1, batch_size=16,
    validation=unlabeled, task=task,
  )  # fmt: skip
  assert "soft" in result.history[-1] and "accuracy" not in result.history[-1]
  texts = [str(warning.message) for warning in recwarn]
  is_warned = any("['label']" in text and "'accuracy', got none" in text for text in texts)
  assert is_warned == is_task_given
