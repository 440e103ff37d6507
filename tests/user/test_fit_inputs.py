"""`fit` with every documented kind of source, evaluation, teacher and folder."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import optax
import pytest

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import write_cache
from distill_jax.models import from_apply
from distill_jax.train import CheckpointOptions, Evaluation, RunOptions, evaluate, fit, predict

QUIET = RunOptions(progress=False)


def assert_equal_trees(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def numpy_batches(source, start=0):
  """A pipeline of one's own: batch `step` depends on `step` only."""
  step = start
  while True:
    rows = np.random.default_rng(step).choice(len(source.ids), 16, replace=False)
    yield {name: array[rows] for name, array in source.arrays.items() if name != "id"}
    step += 1


class Loader:
  """Batches that can be iterated again and again, the last one filled up under 'where'."""

  def __init__(self, source):
    self.source = source

  def __iter__(self):
    return data.eval_batches(self.source, 16)


@pytest.fixture(scope="module")
def distill(student, teacher, objective):
  """`fit` of the shared networks: `distill(source, steps=..., ...)`."""
  # One optimizer and objective, so that jax finds the compiled programs again.
  optimizer = optax.adam(0.05)

  def distill(source, *, teacher=teacher, objective=objective, steps=20, **kwargs):
    kwargs = dict(batch_size=16, run=QUIET) | kwargs
    return fit(student, teacher, objective, optimizer, source, steps=steps, **kwargs)

  return distill


@pytest.fixture(scope="module")
def result(distill, train, validation):
  return distill(train, evaluation=Evaluation(validation, every=5))


def test_fit_on_source_learns(result):
  scores = [line for line in result.history if line["phase"] == "validation"]
  assert [line["step"] for line in scores] == [5, 10, 15, 20]
  assert scores[-1]["accuracy"] > 0.8 and scores[-1]["nll"] < scores[0]["nll"]
  assert any(line["phase"] == "train" and line["loss"] > 0 for line in result.history)
  assert int(result.state.step) == 20


@pytest.mark.parametrize("kind", ["generator", "list", "iterator"])
def test_fit_on_own_pipeline(distill, train, kind):
  def generator(start):
    yield from numpy_batches(train, start)

  pipelines = {
    "generator": generator,
    "list": lambda start: [batch for batch, _ in zip(numpy_batches(train), range(20))][start:],
    "iterator": lambda start: iter(data.batches(train, 16, seed=0, start=start)),
  }
  result = distill(pipelines[kind])
  assert int(result.state.step) == 20
  params = result.variables.params
  prediction = (train.arrays["x"] @ params["w"] + params["b"]).argmax(-1)
  assert (prediction == train.arrays["label"]).mean() > 0.7


def test_pipeline_errors_name_the_field(distill, train):
  batches = [batch for batch, _ in zip(numpy_batches(train), range(5))]
  for source in (iter(batches), lambda start: batches[start:], "images/train", 3, None, []):
    with pytest.raises(ValueError, match=r"source"):
      distill(source)
  with pytest.raises(ValueError, match=r"batch_size"):
    distill(lambda start: numpy_batches(train, start), batch_size=32)
  tuples = [(batch["x"], batch["label"]) for batch in batches]
  with pytest.raises(ValueError, match=r"^source: .*data\.from_iterable\(.*keys="):
    distill(tuples)
  with pytest.raises(ValueError, match=r"^evaluation: .*data\.from_iterable\(.*keys="):
    distill(train, evaluation=tuples)
  with pytest.raises(ValueError, match=r"label"):
    distill(lambda start: ({**b, "label": b["label"] + 3} for b in numpy_batches(train, start)))
  with pytest.raises(ValueError, match=r"x"):
    distill(lambda start: ({"x": b["x"] * np.nan, "label": b["label"]} for b in batches))


def test_validation_kinds_give_the_same_scores(distill, train, validation, result):
  batches = [dict(batch) for batch in data.eval_batches(validation, 16)]
  expected = [line for line in result.history if line["phase"] == "validation"]
  for examples in (batches, Loader(validation)):
    other = distill(train, evaluation=Evaluation(examples, every=5))
    actual = [line for line in other.history if line["phase"] == "validation"]
    for a, b in zip(actual, expected, strict=True):
      assert a["step"] == b["step"]
      assert a["accuracy"] == pytest.approx(b["accuracy"]) and a["nll"] == pytest.approx(b["nll"])


@pytest.fixture(scope="module")
def batches(train):
  return [batch for batch, _ in zip(numpy_batches(train), range(20))]


@pytest.fixture(scope="module")
def expected(distill, batches):
  return distill(lambda start: batches[start:])


@pytest.mark.parametrize("kind", [list, iter, lambda batches: lambda: iter(batches)])
def test_iterables_are_trained_on_from_their_first_batch(distill, batches, expected, kind):
  assert_equal_trees(distill(kind(batches)).state.params, expected.state.params)


def test_dict_of_arrays_is_a_source(distill, train, validation):
  arrays = dict(train.arrays)
  expected = distill(data.Source(arrays), evaluation=validation)
  result = distill(arrays, evaluation=dict(validation.arrays))
  assert_equal_trees(result.variables, expected.variables)
  assert [x.get("accuracy") for x in result.history] == [
    x.get("accuracy") for x in expected.history
  ]


@pytest.mark.parametrize(
  "evaluation",
  [iter, lambda batches: (lambda it: lambda: it)(iter(batches)), lambda x: map(dict, x)],
)
def test_one_shot_evaluation_is_rejected_and_keeps_its_batches(distill, train, batches, evaluation):
  examples = evaluation(batches)
  with pytest.raises(ValueError, match=r"^evaluation:"):
    distill(train, evaluation=examples)
  if not callable(examples):
    assert len(list(examples)) == len(batches)


def test_generator_function_resumes_after_the_batches_that_were_used(
  distill, batches, expected, tmp_path
):
  def generator():
    yield from batches

  distill(generator, steps=10, checkpoints=tmp_path)
  with pytest.warns(UserWarning, match="source: reads 10 batches"):
    resumed = distill(generator, checkpoints=tmp_path)
  assert_equal_trees(resumed.state.params, expected.state.params)


def test_grain_pipeline_resumes_where_it_stood(distill, train, tmp_path, recwarn):
  grain = pytest.importorskip("grain")
  reads = []

  def example(row):
    reads.append(row)
    return {name: train.arrays[name][row] for name in ("x", "label")}

  def pipeline():
    rows = grain.MapDataset.range(len(train)).seed(3).shuffle()
    return rows.map(example).batch(16, drop_remainder=True)

  expected = distill(pipeline(), steps=12)
  distill(pipeline(), steps=8, checkpoints=CheckpointOptions(tmp_path, every=4))
  reads.clear()
  resumed = distill(pipeline(), steps=12, checkpoints=CheckpointOptions(tmp_path, every=4))
  assert_equal_trees(resumed.state.params, expected.state.params)
  assert not [w for w in recwarn if "reads" in str(w.message)]


def test_short_batches_count_their_rows_only(distill, train):
  """A batch of 5 in place of 16 equals a batch of 16 whose other rows 'where' masks."""
  batch = {name: x[:16] for name, x in train.arrays.items()}
  short = {name: x[:5] for name, x in batch.items()}
  masked = batch | {"where": np.arange(16) < 5, "x": batch["x"] + (np.arange(16) >= 5)[:, None]}
  expected = distill([batch, masked], steps=2)
  result = distill([batch, short], steps=2)
  for a, b in zip(
    jax.tree.leaves(result.state.params), jax.tree.leaves(expected.state.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_networks_of_other_inputs_are_named_with_the_batch(
  distill, train, teacher, objective, tmp_path
):
  """dot_general's TypeError was raised as it is."""
  other = from_apply(None, lambda w, x: x @ w, variables=np.ones((5, 3), np.float32), inputs="x")
  calls = {
    "teacher": [
      lambda: distill(train, teacher=other),
      lambda: write_cache(tmp_path, other, train, progress=False),
      lambda: evaluate(teacher, None, train, tasks.classification(), teacher=(other, None)),
    ],
    "student": [
      lambda: fit(other, teacher, objective, optax.sgd(0.1), train, steps=1, batch_size=16)
    ],
    "model": [
      lambda: predict(other, None, train),
      lambda: predict(other, None, {"x": train.arrays["x"]}),
      lambda: evaluate(other, None, train, tasks.classification()),
    ],
  }
  for field, functions in calls.items():
    for function in functions:
      with pytest.raises(ValueError, match=rf"^{field}: .*'x': 'float32 \[\d+, 4\]'.*TypeError"):
        function()


def test_balanced_batches_are_those_of_data_batches(distill, train, baseline):
  rare = train.take(np.flatnonzero((train.arrays["label"] > 0) | (train.ids < 12)))

  def run(examples, **options):
    run = RunOptions(progress=False, **options)
    return distill(examples, teacher=None, objective=baseline, steps=2, run=run)

  expected = list(itertools.islice(data.batches(rare, 16, seed=0, balance="label"), 2))
  balanced = run(rare, balance="label")
  assert_equal_trees(balanced.variables, run(expected).variables)
  assert (balanced.variables.params["w"] != run(rare).variables.params["w"]).any()
  with pytest.raises(ValueError, match=r"^balance:"):
    run(expected, balance="label")
  with pytest.raises(ValueError, match=r"^balance:"):
    RunOptions(balance=True)


IMAGES = {
  "image": np.zeros((32, 8, 8, 1), np.float32),
  "large": np.zeros((32, 8, 8, 1), np.float32),
}


def image_network(entry):
  apply = lambda w, image: image.reshape(len(image), -1) @ w  # noqa: E731
  init = lambda key, image: np.zeros((64, 3), np.float32)  # noqa: E731
  return from_apply(init, apply, variables=np.ones((64, 3), np.float32), inputs=entry)


def with_uint8(entry):
  return IMAGES | {entry: IMAGES[entry].astype(np.uint8)}


@pytest.mark.parametrize("entry", ["image", "large"])
@pytest.mark.parametrize("field", ["source", "evaluation"])
def test_uint8_images_are_rejected_before_training(field, entry):
  """Those of the teacher, 'large', were not."""
  examples = {"source": IMAGES, "evaluation": IMAGES} | {field: with_uint8(entry)}
  with pytest.raises(ValueError, match=rf"^{field}: {entry}: .*uint8"):
    fit(
      image_network("image"),
      image_network("large"),
      objectives.weighted(kd=(1.0, objectives.logits(losses.kl_divergence))),
      optax.sgd(0.1),
      examples["source"],
      steps=1,
      batch_size=16,
      evaluation=examples["evaluation"],
      run=QUIET,
    )


def test_uint8_images_are_rejected_by_caches_predict_and_evaluate(tmp_path):
  """They were taken as they are, with logits of 0 to 255 times the right ones."""
  network, batch = image_network("image"), with_uint8("image")
  task = tasks.objective_terms(())
  for apply in (
    lambda: write_cache(tmp_path / "cache", network, batch, progress=False),
    lambda: predict(network, None, batch),
    lambda: predict(network, None, [batch]),
    lambda: evaluate(network, None, batch, task),
    lambda: evaluate(image_network("large"), None, batch, task, teacher=(network, None)),
  ):
    with pytest.raises(ValueError, match=r"^(source|examples): image: .*uint8"):
      apply()
  assert not (tmp_path / "cache").exists()
  # An entry that no network reads may hold anything.
  assert predict(network, None, with_uint8("large"))["logits"].shape == (32, 3)


def test_validation_that_runs_dry_is_rejected(distill, train, validation):
  with pytest.raises((TypeError, ValueError), match=r"evaluation"):
    distill(train, evaluation=iter(data.eval_batches(validation, 16)))


CHANGES = {
  "wide": (lambda batch: {**batch, "x": np.ones((16, 5), np.float32)}, r"x: expected \[rows, 4\]"),
  "missing": (lambda batch: {"x": batch["x"]}, "label: expected integers"),
  "NaN": (lambda batch: {**batch, "x": batch["x"] * np.nan}, "x: expected finite"),
  "empty": (lambda batch: {name: x[:0] for name, x in batch.items()}, "x, label: expected"),
  "label": (lambda batch: {**batch, "label": batch["label"] + 3}, "label: expected a class"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("field", ["source", "evaluation"])
def test_batch_unlike_the_first_one_is_named(distill, batches, field, change):
  function, message = CHANGES[change]
  examples = {"source": batches[:4], "evaluation": batches[:4]}
  examples[field] = [*batches[:3], function(batches[3])]
  with pytest.raises(ValueError, match=rf"^{field}: batch 3\b.*{message}"):
    distill(examples["source"], evaluation=examples["evaluation"])


@pytest.mark.parametrize("field", ["source", "evaluation"])
def test_batch_of_another_shape_is_named_when_it_comes(distill, batches, field):
  """A TypeError of dot_general was raised in the middle of the training."""
  function, message = CHANGES["wide"]
  examples = {"source": batches[:4], "evaluation": batches[:4]}
  changed = [*batches[:3], function(batches[3])]
  examples[field] = lambda: iter(changed)
  evaluation = None if field == "source" else Evaluation(examples["evaluation"], every=1)
  with pytest.raises(ValueError, match=rf"^{field}: batch 3\b.*{message}"):
    distill(examples["source"], evaluation=evaluation)


def test_lists_are_checked_before_training(distill, batches, tmp_path):
  changed = [*batches[:3], CHANGES["wide"][0](batches[3])]
  too_few = data.from_iterable(batches[:3], epochs=2)
  for source, field in ((changed, "source"), (too_few, "epochs")):
    with pytest.raises(ValueError, match=rf"^{field}:"):
      distill(source, checkpoints=CheckpointOptions(tmp_path / field, every=1))
    assert not (tmp_path / field).exists()


def test_batches_of_many_sizes_train_a_network_that_takes_them(distill, batches):
  mean = from_apply(
    lambda key, x: np.zeros((1, 3), np.float32),
    lambda w, x: x.mean(1, keepdims=True) @ w,
    inputs="x",
  )
  wide = {**batches[1], "x": np.ones((16, 5), np.float32)}
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  result = fit(
    mean, None, objective, optax.sgd(0.1), [batches[0], wide], steps=2, batch_size=16, run=QUIET
  )
  assert int(result.state.step) == 2


@pytest.mark.parametrize("change", ["wide", "missing", "NaN", "empty"])
def test_predict_and_evaluate_name_the_batch(result, batches, change):
  function, message = CHANGES[change]
  examples = [*batches[:3], function(batches[3])]
  for apply in (
    lambda: result.predict(examples),
    lambda: evaluate(result.student, result.variables, examples, tasks.classification()),
  ):
    with pytest.raises(ValueError, match=rf"^examples: batch 3\b.*{message}"):
      apply()
  with pytest.raises(ValueError, match=r"^examples: arrays:"):
    result.predict({"x": batches[0]["x"], "label": np.zeros(3, int)})


def test_endless_and_training_streams_are_no_evaluation(distill, train, batches):
  for examples in (lambda start: iter(batches), lambda: itertools.cycle(batches)):
    with pytest.raises(ValueError, match=r"^evaluation: .*repeat"):
      distill(train, evaluation=examples)

  class ForRows:
    def for_rows(self, rows):
      return self

  class Training(ForRows):
    def __call__(self, start):
      return iter(batches[start:])

  class Evaluated(ForRows):
    def __iter__(self):
      return iter(batches)

  assert int(distill(Training(), evaluation=Evaluated(), steps=2).state.step) == 2
  with pytest.raises(ValueError, match=r"^evaluation: expected .*EvalStream"):
    distill(train, evaluation=Training())
  with pytest.raises(ValueError, match=r"^source: expected .*Stream"):
    distill(Evaluated())


class Tensor:
  """As a tensor of torch, which jax does not take."""

  def __init__(self, values):
    self.values = values
    self.shape, self.dtype = values.shape, "torch.float32"

  def __array__(self, dtype=None, copy=None):
    return self.values


def test_predict_takes_tensors_of_any_library(result, validation):
  x = validation.arrays["x"][:5]
  np.testing.assert_array_equal(
    result.predict({"x": Tensor(x)})["logits"], result.predict({"x": x})["logits"]
  )
  with pytest.raises(ValueError, match=r"^examples: .*keys="):
    result.predict(Tensor(x))


def test_result_is_of_the_best_evaluation(result, validation):
  best = max(x["accuracy"] for x in result.history if x["phase"] == "validation")
  scores = evaluate(result.student, result.variables, validation, tasks.classification())
  assert scores["accuracy"] == pytest.approx(best)


def test_predict_of_batch_source_and_batches(result, validation):
  of_source = result.predict(validation)["logits"]
  assert isinstance(of_source, np.ndarray) and of_source.shape == (24, 3)
  of_batches = result.predict(Loader(validation))["logits"]
  np.testing.assert_allclose(of_batches, of_source, rtol=1e-5, atol=1e-6)
  of_batch = result.predict({"x": validation.arrays["x"][:5]})["logits"]
  np.testing.assert_allclose(of_batch, of_source[:5], rtol=1e-5, atol=1e-6)
  small = predict(result.student, result.variables, validation, batch_size=7)["logits"]
  np.testing.assert_allclose(small, of_source, rtol=1e-5, atol=1e-6)


def test_evaluate_next_to_teacher(result, teacher, validation):
  task = tasks.classification()
  alone = evaluate(result.student, result.variables, validation, task)
  compared = evaluate(
    result.student, result.variables, validation, task, teacher=(teacher, teacher.variables)
  )
  assert set(compared) - set(alone) == {"agreement", "teacher_kl"}
  assert evaluate(teacher, None, validation, task)["accuracy"] == 1.0
  with pytest.raises(ValueError, match=r"variables"):
    evaluate(result.student, None, validation, task)
  with pytest.raises(ValueError, match=r"variables"):
    predict(result.student, None, validation)


def test_fit_without_teacher(distill, train, validation, baseline, objective):
  result = distill(train, teacher=None, objective=baseline, evaluation=validation)
  assert "agreement" not in result.history[-1]
  with pytest.raises(ValueError, match=r"teacher"):
    distill(train, teacher=None, objective=objective)


def test_teacher_variables_are_given_or_carried(distill, train, teacher, result, validation):
  bare = teacher._replace(variables=None)
  other = distill(
    train,
    teacher=bare,
    teacher_variables=teacher.variables,
    evaluation=Evaluation(validation, every=5),
  )
  assert_equal_trees(other.variables, result.variables)
  with pytest.raises(ValueError, match=r"teacher_variables"):
    distill(train, teacher=bare)


def test_interrupted_run_resumes_to_the_same_end(distill, train, validation, tmp_path):
  evaluation = Evaluation(validation, every=4)

  starts, fails = [], False

  def pipeline(start):
    starts.append(start)
    for step, batch in enumerate(numpy_batches(train, start), start):
      if fails and step == 13:
        raise KeyboardInterrupt
      yield batch

  expected = distill(pipeline, evaluation=evaluation)
  checkpoints = CheckpointOptions(tmp_path, every=3)
  fails = True
  with pytest.raises(KeyboardInterrupt):
    distill(pipeline, evaluation=evaluation, checkpoints=checkpoints)
  fails = False
  resumed = distill(pipeline, evaluation=evaluation, checkpoints=checkpoints)
  assert starts[-1] >= 9
  assert_equal_trees(resumed.variables, expected.variables)
  assert_equal_trees(resumed.state.params, expected.state.params)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line.pop("line_number") for line in lines] == list(range(1, len(lines) + 1))
  assert all(line.pop("checksum") for line in lines) and lines == resumed.history
  validations = [x["step"] for x in resumed.history if x["phase"] == "validation"]
  assert validations == [4, 8, 12, 16, 20]


def test_finished_run_returns_its_result_again(distill, train, validation, tmp_path):
  arguments = dict(evaluation=validation, checkpoints=tmp_path / "run")
  first = distill(train, **arguments)
  # An evaluation comes after every tenth of the steps.
  evaluated = [line["step"] for line in first.history if line["phase"] == "validation"]
  assert evaluated == list(range(2, 21, 2))
  again = distill(train, **arguments)
  assert_equal_trees(again.variables, first.variables)
  assert again.history == first.history
  longer = distill(train, steps=24, **arguments)
  assert int(longer.state.step) == 24


@pytest.mark.parametrize(
  "change, field",
  [
    (dict(seed=1), "seed"),
    (dict(batch_size=8), "batch_size"),
    (dict(identity={"learning_rate": 0.1}), "learning_rate"),
    (dict(num_views=2), "views"),
  ],
)
def test_folder_of_another_run_is_rejected(distill, train, tmp_path_factory, change, field):
  folder = tmp_path_factory.getbasetemp() / "other_run"
  if not folder.exists():
    distill(train, checkpoints=CheckpointOptions(folder, identity={"learning_rate": 0.05}))
  identity = change.pop("identity", {"learning_rate": 0.05})
  run = dataclasses.replace(QUIET, num_views=change.pop("num_views", 0))
  with pytest.raises(ValueError, match=field):
    distill(train, checkpoints=CheckpointOptions(folder, identity=identity), run=run, **change)


def test_options_reject_values_and_name_the_field(validation, tmp_path):
  for name, bad in (("every", 0), ("patience", 0)):
    with pytest.raises(ValueError, match=name):
      Evaluation(validation, **{name: bad})
  with pytest.raises(ValueError, match=r"every"):
    CheckpointOptions(tmp_path, every=0)
  for name, bad in (("log_every", 0), ("max_skips", 0), ("num_views", -1)):
    with pytest.raises(ValueError, match=name):
      RunOptions(**{name: bad})


def test_training_does_not_touch_the_callers_arrays(teacher, train, objective):
  start = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.float32)}
  student = from_apply(
    None, lambda params, x: x @ params["w"] + params["b"], variables=start, inputs="x"
  )
  result = fit(
    student, teacher, objective, optax.sgd(0.1), train, steps=2, batch_size=16, run=QUIET
  )
  assert not start["w"].any() and np.asarray(result.variables.params["w"]).any()
