"""Arguments of `fit` and fields of its options: what is taken and what is rejected by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, objectives, tasks
from distill_jax.models import from_apply
from distill_jax.train import CheckpointOptions, Evaluation, RunOptions, StepOptions, fit
from distill_jax.train.arguments import count_steps
from distill_jax.train.inputs import as_source
from distill_jax.types import Metric

ROWS, WIDTH, CLASSES = 24, 4, 3
IMAGE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
SOURCE = data.Source(
  {"id": np.arange(ROWS), "image": IMAGE, "label": IMAGE[:, :CLASSES].argmax(1).astype(np.int32)},
  classes=CLASSES,
  name="toy",
)
STUDENT = from_apply(lambda key, x: jnp.zeros((WIDTH, CLASSES)), lambda w, x: x @ w)
OBJECTIVE = objectives.weighted(hard=(1.0, objectives.labels()))
QUIET = RunOptions(progress=False)


def run(objective=OBJECTIVE, **options):
  settings = dict(steps=2, batch_size=8, run=QUIET) | options
  return fit(STUDENT, None, objective, optax.sgd(0.1), SOURCE, **settings)


@pytest.mark.parametrize("value", [1e2, 4.0, 2.5, True, "10", None, 0, -1, np.float32(3)])
@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_counts_are_integers_of_at_least_one(name, value):
  with pytest.raises(ValueError, match=f"^{name}: expected an integer >= 1"):
    run(**{name: value})


@pytest.mark.parametrize("value", [1e2, 2.5, True, "10", 0, -1])
def test_epochs_are_integers_of_at_least_one(value):
  with pytest.raises(ValueError, match="^epochs: expected an integer >= 1"):
    run(steps=None, epochs=value)


def test_steps_and_epochs_exclude_each_other():
  with pytest.raises(ValueError, match="^epochs: expected None with steps=2"):
    run(epochs=1)
  with pytest.raises(ValueError, match="^steps: expected.*epochs="):
    run(steps=None)


class Loader:
  """Batches whose number is known before they are read, as a DataLoader's."""

  def __iter__(self):
    return data.eval_batches(SOURCE, 16)

  def __len__(self):
    return 2


@pytest.mark.parametrize(
  ("examples", "batch_size", "expected"),
  [
    (SOURCE, 8, 9),
    (SOURCE, 10, 6),  # The rows that do not fill a batch are left out.
    (SOURCE.arrays, 24, 3),
    (list(Loader()), 16, 6),
    (Loader(), 16, 6),
    (Loader, 16, 6),
  ],
)
def test_epochs_are_passes_over_the_source(examples, batch_size, expected):
  assert count_steps(as_source("source", examples), 3, batch_size) == expected


def test_training_of_some_epochs_reads_each_batch_as_often():
  spied = [batch | {"id": np.full(8, i)} for i, batch in enumerate(data.eval_batches(SOURCE, 8))]
  metrics = StepOptions(metrics=lambda outputs, batch: {"id": (batch["id"][0], jnp.ones(()))})
  options = RunOptions(progress=False, log_every=1)
  result = fit(
    STUDENT, None, OBJECTIVE, optax.sgd(0.1), spied, epochs=2, batch_size=8, step=metrics,
    run=options,
  )  # fmt: skip
  numbers = [line["id"] for line in result.history]
  assert numbers == [0, 1, 2, 0, 1, 2] and int(result.state.step) == 6


@pytest.mark.parametrize(
  "source", [lambda start: iter(Loader()), lambda: iter(Loader()), itertools.cycle(Loader())]
)
def test_epochs_need_a_source_of_known_length(source):
  with pytest.raises(ValueError, match="^epochs: expected.*known length.*steps="):
    count_steps(as_source("source", source), 2, 16)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("seed", 0.5),
    ("seed", jax.random.key(0)),
    ("task", "classification"),
    ("task", tasks.classification),
    ("evaluation", 10),
    ("evaluation", "validation"),
    ("evaluation", Evaluation),
    ("checkpoints", 100),
    ("checkpoints", ""),
    ("checkpoints", True),
    ("step", {"microbatches": 2}),
    ("step", lambda batch: batch),
    ("step", None),
    ("run", {"log_every": 10}),
    ("run", RunOptions),
    ("run", "runs/first"),
  ],
)
def test_arguments_of_another_type_are_rejected_by_name(name, value):
  with pytest.raises(ValueError, match=f"^{name}: expected"):
    run(**{name: value})


@pytest.mark.parametrize(
  ("options", "fields"),
  [
    (StepOptions, {"augment": 0.1}),
    (StepOptions, {"mix": "mixup"}),
    (StepOptions, {"on_policy": True}),
    (StepOptions, {"metrics": ("accuracy",)}),
    (StepOptions, {"microbatches": 2.0}),
    (lambda **fields: Evaluation(SOURCE, **fields), {"best": ("f1", "max")}),
    (lambda **fields: Evaluation(SOURCE, **fields), {"every": 1e2}),
    (lambda **fields: CheckpointOptions("run", **fields), {"identity": "first"}),
    (RunOptions, {"mesh": 8}),
    (RunOptions, {"log_every": 0}),
  ],
)
def test_fields_of_another_type_are_rejected_by_name(options, fields):
  with pytest.raises(ValueError, match=f"^{next(iter(fields))}: expected"):
    options(**fields)


def test_integers_of_numpy_are_counts():
  assert RunOptions(log_every=np.int64(5)).log_every == 5
  assert len(run(steps=np.int64(2), batch_size=np.int32(8), seed=np.uint8(0)).history) == 1


def test_fewer_steps_than_done_are_rejected(tmp_path):
  run(steps=2, checkpoints=tmp_path)
  with pytest.raises(ValueError, match="^steps: expected at least the 2"):
    run(steps=1, checkpoints=tmp_path)
  assert int(run(steps=2, checkpoints=tmp_path).state.step) == 2


def test_without_a_folder_reports_come_every_log_every_steps_and_before_evaluations():
  fitted = run(
    steps=20, evaluation=Evaluation(SOURCE, every=15), run=RunOptions(log_every=10, progress=False)
  )
  lines = [(line["phase"], line["step"]) for line in fitted.history]
  assert lines == [
    *[("train", 10), ("train", 15), ("validation", 15)],
    *[("train", 20), ("validation", 20)],
  ]


def with_names(*names):
  """Returns an objective of a user's own whose terms have these names."""

  def apply(params, state, student, teacher, batch, *, step, key):
    return {name: (1.0, student["logits"].mean()) for name in names}, state

  return OBJECTIVE._replace(apply=apply)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "nonfinite", "empty", "step", "phase"])
def test_names_of_the_step_are_reserved(name):
  with pytest.raises(ValueError, match=f"^objective: .*'{name}'"):
    run(with_names("own", name))
  metrics = StepOptions(metrics=lambda outputs, batch: {name: (jnp.ones(()), jnp.ones(()))})
  with pytest.raises(ValueError, match=f"^metrics: .*'{name}'"):
    run(step=metrics)


def test_metric_of_a_terms_name_is_rejected():
  metrics = StepOptions(metrics=lambda outputs, batch: {"hard": (jnp.ones(()), jnp.ones(()))})
  with pytest.raises(ValueError, match="^metrics: .*'hard'"):
    run(step=metrics)


def test_scores_of_a_task_have_their_own_names():
  metric = Metric("step", "step")
  task = tasks.classification().with_metric(metric, lambda outputs, batch, teacher: (1.0, 1.0))
  with pytest.raises(ValueError, match="^task: .*'step'"):
    run(task=task, evaluation=SOURCE)
