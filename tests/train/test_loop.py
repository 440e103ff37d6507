"""`fit`: what a run writes, resumes, refuses and reports."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import data, losses, objectives, tasks, teachers
from distill_jax.distributed import sharding
from distill_jax.models import from_apply
from distill_jax.storage import sealed_json
from distill_jax.train import NonFiniteError, loop
from distill_jax.types import Variables

CLASSES, WIDTH = 3, 4


def source(seed=0, rows=120):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(rows, WIDTH)).astype(np.float32)
  label = image[:, :CLASSES].argmax(1).astype(np.int32)
  return data.Source(
    {"id": np.arange(rows), "image": image, "label": label}, classes=CLASSES, name="toy"
  )


def linear(classes=CLASSES, **kwargs):
  return from_apply(
    lambda key, x: 0.1 * jax.random.normal(key, (WIDTH, classes)), lambda w, x: x @ w, **kwargs
  )


def teacher():
  return linear(variables=4 * np.eye(WIDTH, CLASSES, dtype=np.float32))


def goal():
  return objectives.weighted(
    hard=(0.5, objectives.labels()),
    soft=(0.5, objectives.logits(losses.kl_divergence, temperature=2.0)),
  )


def run(folder=None, steps=20, **kwargs):
  networks = dict(
    student=linear(),
    teacher=teacher(),
    objective=goal(),
    optimizer=optax.adam(0.05),
    source=source(),
  )
  settings = dict(
    batch_size=16,
    validation=source(1, 30),
    eval_every=5,
    log_every=5,
  )
  return fit_with(**(networks | settings | dict(steps=steps, folder=folder) | kwargs))


def assert_identical(a, b):
  def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def test_student_learns_and_best_variables_are_returned():
  fitted = run(steps=200, eval_every=20)
  validation = [line for line in fitted.history if line["phase"] == "validation"]
  assert [line["step"] for line in validation] == list(range(20, 201, 20))
  assert validation[-1]["accuracy"] > 0.8
  logits = source(1, 30).arrays["image"] @ np.asarray(fitted.variables.params)
  accuracy = (logits.argmax(1) == source(1, 30).arrays["label"]).mean()
  np.testing.assert_allclose(accuracy, max(line["accuracy"] for line in validation), rtol=1e-6)
  train = [line for line in fitted.history if line["phase"] == "train"]
  assert {"loss", "hard", "soft", "accuracy", "grad_norm", "examples_per_second"} <= set(train[-1])
  np.testing.assert_allclose(
    train[-1]["loss"], 0.5 * train[-1]["hard"] + 0.5 * train[-1]["soft"], rtol=1e-5
  )


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
  whole = run(tmp_path / "whole")
  run(tmp_path / "parts", steps=5)
  resumed = run(tmp_path / "parts")
  assert_identical(whole.state, resumed.state)
  assert_identical(whole.variables, resumed.variables)
  steps = [(line["step"], line["phase"]) for line in resumed.history]
  assert steps == [(s, p) for s in (5, 10, 15, 20) for p in ("train", "validation")]
  assert sealed_json.read_lines(tmp_path / "parts" / "metrics.jsonl") == resumed.history


def test_resumed_run_reports_what_an_undisturbed_one_does(tmp_path):
  def lines_of(fitted):
    return [
      {k: v for k, v in line.items() if k != "examples_per_second"} for line in fitted.history
    ]

  every = {"checkpoint_every": 3, "log_every": 5, "eval_every": 10}
  whole = run(tmp_path / "whole", **every)

  def stopped(start):  # as if killed after step 8, two steps past a checkpoint
    for step, batch in enumerate(data.batches(source(), 16, seed=0, start=start), start + 1):
      if step > 8:
        raise KeyboardInterrupt
      yield batch

  named = lambda start: data.batches(source(), 16, seed=0, start=start)  # noqa: E731
  stopped.identity = named.identity = "toy"
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "parts", source=stopped, **every)
  assert lines_of(run(tmp_path / "parts", source=named, **every)) == lines_of(whole)


def test_resume_drops_torn_lines_and_those_after_the_checkpoint(tmp_path):
  run(tmp_path, steps=10)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    line = {"step": 13, "phase": "train", "loss": 1}
    file.write(sealed_json.dump_lines([line], first=5) + '{"step": 14, "pha')
  steps = [line["step"] for line in run(tmp_path).history]
  assert steps == [5, 5, 10, 10, 15, 15, 20, 20]


def test_a_removed_line_is_named_when_a_run_resumes(tmp_path):
  run(tmp_path, steps=5)
  run(tmp_path, steps=10)
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[1:]))
  with pytest.warns(RuntimeWarning, match=f"line 1 of {path} is missing"):
    history = run(tmp_path, steps=15).history
  assert [line["step"] for line in history] == [5, 10, 10, 15, 15]
  assert sealed_json.read_lines(path) == history


def test_an_edited_evaluation_is_restored_from_its_checkpoint(tmp_path):
  first = run(tmp_path)
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines()
  edited = [
    re.sub(r'"accuracy": [^,]+', '"accuracy": 2.0', line) if "validation" in line else line
    for line in lines
  ]
  assert edited != lines
  path.write_text("\n".join(edited) + "\n")
  with pytest.warns(RuntimeWarning, match=rf"2, 4, 6, 8 of {path}"):
    again = run(tmp_path)
  assert_identical(first.variables, again.variables)
  assert first.best_step == again.best_step
  by_step = [
    {line["step"]: line for line in r.history if "accuracy" in line} for r in (first, again)
  ]
  assert by_step[1][first.best_step] == by_step[0][first.best_step]
  assert by_step[1][20] == by_step[0][20]
  trained = [[line for line in r.history if line["phase"] == "train"] for r in (first, again)]
  assert trained[0] == trained[1]
  # The file was mended, too.
  assert sealed_json.read_lines(path) == again.history


@pytest.mark.parametrize("devices", [1, 8])
def test_a_finished_run_is_not_trained_again(tmp_path, devices):
  first = run(tmp_path, mesh=sharding.data_mesh(devices))
  again = run(tmp_path, mesh=sharding.data_mesh(devices))
  assert_identical(first.state, again.state)
  assert len(again.history) == len(first.history)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"seed": 1}, "seed"),
    ({"batch_size": 8}, "batch_size"),
    ({"source": source(5)}, "data"),
    ({"num_views": 2}, "num_views"),
  ],
)
def test_another_run_is_not_resumed(tmp_path, changed, message):
  run(tmp_path, steps=5)
  with pytest.raises(ValueError, match=message):
    run(tmp_path, **changed)


def test_without_a_teacher():
  fitted = run(
    teacher=None, objective=objectives.weighted(hard=(1.0, objectives.labels())), steps=50
  )
  assert fitted.history[-1]["accuracy"] > 0.5


def test_your_own_pipeline_is_checked_batch_by_batch():
  batches = data.batches(source(), 16, seed=3)
  pool = [next(batches) for _ in range(10)]
  fitted = run(source=lambda start: iter(pool[start:]), steps=10)
  assert int(fitted.state.step) == 10
  with pytest.raises(ValueError, match="source.*step 11"):
    run(source=lambda start: iter(pool[start:]), steps=11)
  bad = [dict(b, label=np.full(16, -1, np.int32)) for b in pool]
  with pytest.raises(ValueError, match="label"):
    run(source=lambda start: iter(bad[start:]), steps=10)
  with pytest.raises(ValueError, match="batch_size"):
    run(source=lambda start: ({k: v[:8] for k, v in b.items()} for b in pool), steps=10)


def test_a_pipeline_may_fill_the_same_buffers_again():
  pool = [b for b, _ in zip(data.batches(source(), 16, seed=3), range(30))]

  def refilled(start):
    buffers = {name: x.copy() for name, x in pool[0].items()}
    for batch in pool[start:]:
      for name, x in batch.items():
        buffers[name][:] = x
      yield buffers

  ours, theirs = (run(source=s, steps=30) for s in (refilled, lambda start: iter(pool[start:])))
  assert_identical(ours.state, theirs.state)


def test_without_validation_the_last_weights_are_returned(tmp_path):
  for folder in (None, tmp_path):
    fitted = run(folder, validation=None)
    assert_identical(fitted.variables, Variables(fitted.state.params["student"], {}))


def test_reports_are_means_over_the_steps_since_the_last():
  each = [line for line in run(log_every=1).history if line["phase"] == "train"]
  fives = [line for line in run(log_every=5).history if line["phase"] == "train"]
  for name in ("loss", "hard", "soft", "accuracy", "grad_norm", "nonfinite"):
    means = np.reshape([line[name] for line in each], (-1, 5)).mean(1)
    np.testing.assert_allclose([line[name] for line in fives], means, rtol=1e-12, err_msg=name)


def test_validation_may_be_batches():
  whole = run(validation=source(1, 30))
  batches = list(data.eval_batches(source(1, 30), 16))
  assert [{**line, "examples_per_second": 0} for line in run(validation=batches).history] == [
    {**line, "examples_per_second": 0} for line in whole.history
  ]


def test_non_finite_updates_in_a_row_abort_with_the_last_state():
  def batches(
    start,
  ):  # the teacher's own NaN is not in the batch, so no check on the host can see it
    for step, batch in enumerate(data.batches(source(), 16, seed=0)):
      yield batch | {"poison": np.full((16, 1), step >= 7, np.float32)}

  broken = from_apply(
    None,
    lambda w, x, poison: x @ w + jnp.where(poison > 0, jnp.nan, 0),
    variables=np.eye(WIDTH, CLASSES, dtype=np.float32),
    inputs=("image", "poison"),
  )
  causes = r"^max_skips: .*teacher output 'logits', term 'soft';"
  with pytest.raises(NonFiniteError, match=causes) as error:
    run(teacher=broken, source=batches, max_skips=4, steps=40, log_every=4)
  good = run(teacher=broken, source=batches, max_skips=100, steps=7, validation=None)
  assert_identical(error.value.state.params, good.state.params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(error.value.state.params))


def test_indivisible_batch_size_names_the_nearest_ones():
  with pytest.raises(ValueError, match="16 or 24"):
    run(batch_size=20)
  assert int(run(batch_size=20, mesh=sharding.data_mesh(4), steps=2).state.step) == 2


def test_weights_of_another_network_are_rejected():
  wide = from_apply(lambda key, x: jnp.zeros((WIDTH, 2 * CLASSES)), lambda w, x: x @ w[:, :CLASSES])
  with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 6\)|\(4, 6\).*\(4, 3\)"):
    run(teacher=wide, teacher_variables=Variables(np.eye(WIDTH, CLASSES, dtype=np.float32), {}))


def test_teacher_needs_weights():
  with pytest.raises(ValueError, match="teacher_variables"):
    run(teacher=linear())
  given = Variables(np.eye(WIDTH, CLASSES, dtype=np.float32), {})
  assert int(run(teacher=linear(), teacher_variables=given, steps=2).state.step) == 2
  with pytest.raises(ValueError, match="teacher_variables"):
    run(
      teacher=None,
      teacher_variables=given,
      objective=objectives.weighted(hard=(1.0, objectives.labels())),
    )


def test_student_needs_the_classes_of_the_data():
  with pytest.raises(ValueError, match="student.*3 classes.*got 2"):
    run(
      student=linear(2),
      teacher=None,
      objective=objectives.weighted(hard=(1.0, objectives.labels())),
    )


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "max_skips"])
def test_counts_below_one_are_rejected(name):
  with pytest.raises(ValueError, match=name):
    run(**{name: 0})


def test_the_callers_arrays_survive_donation():
  weights = jnp.eye(WIDTH, CLASSES)
  student = from_apply(None, lambda w, x: x @ w, variables=weights)
  run(student=student, steps=3)
  np.testing.assert_array_equal(weights, np.eye(WIDTH, CLASSES))


def test_a_line_per_evaluation_without_a_terminal(capsys):
  run(progress=True, title="student", steps=10)
  lines = capsys.readouterr().out.strip().splitlines()
  assert len(lines) == 2
  assert (
    lines[0].startswith("student 5/10") and "examples/s" in lines[0] and "val accuracy" in lines[0]
  )


def test_tensorboard_files_are_written(tmp_path):
  run(tmp_path, steps=5)
  assert any("tfevents" in name for name in os.listdir(tmp_path / "tensorboard"))


def test_ema_teacher_resumes_to_the_same_bits(tmp_path):
  average = teachers.moving_average(linear(), decay=0.9)
  whole = run(tmp_path / "whole", teacher=average)
  run(tmp_path / "parts", teacher=average, steps=5)
  resumed = run(tmp_path / "parts", teacher=average)
  assert_identical(whole.state, resumed.state)
  assert np.abs(whole.state.average.params - whole.state.params["student"]).max() > 0


def test_learned_projections_are_saved_but_not_returned(tmp_path):
  wide = from_apply(
    None,
    lambda w, x: {"logits": x @ w, "map": x},
    variables=np.eye(WIDTH, CLASSES, dtype=np.float32),
  )
  narrow = from_apply(
    lambda key, x: 0.1 * jax.random.normal(key, (WIDTH, CLASSES)),
    lambda w, x: {"logits": x @ w, "map": x[:, :2]},
  )
  hint = objectives.weighted(
    hard=(1.0, objectives.labels()), hint=(1.0, objectives.features("map", "map", losses.hint))
  )
  whole = run(tmp_path / "whole", student=narrow, teacher=wide, objective=hint)
  run(tmp_path / "parts", student=narrow, teacher=wide, objective=hint, steps=10)
  resumed = run(tmp_path / "parts", student=narrow, teacher=wide, objective=hint)
  assert_identical(whole.state, resumed.state)
  assert whole.state.params["objective"]["hint"]["kernel"].shape == (2, WIDTH)
  assert resumed.variables.params.shape == (WIDTH, CLASSES)


def test_a_frozen_teacher_that_changed_is_noticed(monkeypatch):
  monkeypatch.setattr(loop, "fingerprint", lambda tree: "after")
  with pytest.raises(RuntimeError, match="teacher_variables"):
    run(steps=2)


def test_incomparable_networks_are_rejected_before_training():
  with pytest.raises(ValueError, match=r"term 'soft'.*\(16, 4\).*\(16, 3\)"):
    run(student=linear(4))
  one = from_apply(None, lambda w, x: x @ w, variables=np.ones((WIDTH, 1), np.float32))
  with pytest.raises(ValueError, match=r"\(16, 3\).*\(16, 1\)"):
    run(teacher=one)
  single = from_apply(
    None, lambda w, x: (x @ w)[:1], variables=np.eye(WIDTH, CLASSES, dtype=np.float32)
  )
  with pytest.raises(ValueError, match=r"\(16, 3\).*\(1, 3\)"):
    run(teacher=single)


@pytest.mark.parametrize("folder", ["file", "readonly"])
def test_unwritable_folder_is_rejected_at_the_start(tmp_path, folder, monkeypatch):
  if folder == "file":
    (tmp_path / "file").write_text("")
  else:  # root may write anywhere: let the probe fail as it would for a user
    monkeypatch.setattr("tempfile.TemporaryFile", _refuse)
  with pytest.raises(OSError, match=r"folder"):
    run(tmp_path / folder)


def _refuse(*args, **kwargs):
  raise PermissionError("read-only file system")


def test_a_relative_folder_is_resolved_at_the_start(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run("here", steps=2)
  assert (tmp_path / "here" / "checkpoints").is_dir()


def test_pipeline_labels_are_checked_against_num_classes():
  batches = [
    dict(b, label=np.where(b["id"] == 7, 3, b["label"])) for b in data.eval_batches(source(), 16)
  ][:7]
  with pytest.raises(ValueError, match="label"):
    run(source=lambda start: iter(batches[start:]), steps=5)
  marked = [
    dict(b, label=np.where(b["id"] == 7, -100, b["label"])) for b in data.eval_batches(source(), 16)
  ][:7]
  with pytest.raises(ValueError, match="declare ignore_label=-100"):
    run(source=lambda start: iter(marked[start:]), steps=5)
  fitted = run(source=lambda start: iter(marked[start:]), steps=5, ignore_label=-100)
  assert int(fitted.state.step) == 5


def test_validation_is_checked_before_training():
  wide = data.Source(
    {"image": np.ones((4, WIDTH), np.float32), "label": np.array([0, 1, 2, 11])}, classes=12
  )
  with pytest.raises(ValueError, match="student.*12.*3"):
    run(validation=wide)
  with pytest.raises(ValueError, match="best.*'accuracy'"):
    run(best="acuracy")
  with pytest.raises(ValueError, match="evaluation"):
    batch = next(data.eval_batches(source(1, 30), 16))
    run(validation=[batch | {"label": batch["label"][:, None]}], task=tasks.classification())


def test_unlabeled_validation_measures_terms_and_the_teacher():
  fitted = run(validation=data.unlabeled(source(1, 30)), steps=5)
  scores = fitted.history[-1]
  assert {"loss", "soft", "teacher_kl", "agreement"} <= set(scores)
  assert not {"hard", "accuracy"} & set(scores)


def test_a_score_that_is_not_finite_is_never_best():
  scores = iter([0.0, np.nan, 0.25, 0.5])  # the first is of a check on zeros
  plain = tasks.classification()
  task = plain._replace(compute=lambda sums: plain.compute(sums) | {"nll": next(scores)})
  fitted = run(steps=15, best="nll", task=task)
  expected = run(steps=10, validation=None)
  np.testing.assert_array_equal(fitted.variables.params, expected.state.params["student"])


def test_arguments_of_another_kind_are_rejected():
  with pytest.raises(ValueError, match="student"):
    run(student=lambda x: x)
  with pytest.raises(ValueError, match="objective"):
    run(objective=losses.kl_divergence)
  with pytest.raises(ValueError, match="source"):
    run(source="images/train")
  with pytest.raises(ValueError, match="teacher"):
    run(teacher=None)
