"""Compares training from a cache with training from the live teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from toys import AUGMENT, ROWS, largest_difference, linear, student, teacher_logits, written

from distill_jax import data, losses, objectives, teachers
from distill_jax.cache import (
  Dense,
  RandomSampling,
  TopK,
  check_run,
  check_teacher_weights,
  open_cache,
)
from distill_jax.cache.teacher_inputs import ArrayInputs
from distill_jax.types import Variables

OBJECTIVE = objectives.weighted(
  hard=(0.1, objectives.labels()),
  soft=(0.9, objectives.logits(losses.kl_divergence, temperature=4.0)),
)


def train(teacher, source, **changed):
  settings = dict(steps=12, batch_size=16) | changed
  return fit_with(student(), teacher, OBJECTIVE, optax.adam(1e-2), source, **settings)


@pytest.fixture(scope="module")
def trained(cached, source):
  """The result of a run from the cache without augmentation."""
  return train(cached, source)


def test_student_from_cache_matches_live_teacher(trained, cached, source):
  assert len(cached) == ROWS
  assert largest_difference(trained, train(linear(), source)) < 1e-6
  soft = [line["soft"] for line in trained.history if line["phase"] == "train"]
  assert soft[-1] > 0.1  # so the teacher determines the result


def test_student_of_augmented_views_matches_live_teacher(tmp_path, trained, source):
  cached = written(tmp_path, source, augment=AUGMENT, num_views=3)
  assert len(cached) == ROWS * 3
  from_cache = train(cached, source, augment=AUGMENT)
  live = train(linear(), source, augment=AUGMENT, num_views=3)
  assert largest_difference(from_cache, live) < 1e-6
  assert largest_difference(from_cache, trained) > 1e-3  # views differ


def test_student_matches_a_teacher_outside_the_step_bit_for_bit(augmented, source):
  teacher = linear()

  @jax.jit
  def logits_of(batch):
    return teacher.apply(*teacher.variables, AUGMENT(batch), train=False, key=None)[0]["logits"]

  logits = {}  # computed in the order of the cache, in batches of its size
  ids, views = augmented.manifest.rows.ids_and_views(0, 2 * ROWS)
  for first in range(0, 2 * ROWS, 16):
    rows = np.minimum(np.arange(first, first + 16), 2 * ROWS - 1)
    batch = ArrayInputs(source).batch(ids[rows], views[rows])
    keys = zip(batch["id"].tolist(), batch["view"].tolist())
    logits |= dict(zip(keys, np.asarray(logits_of(batch))))

  def pipeline(start):
    for batch in data.batches(source, 16, seed=0, start=start, num_views=2):
      keys = zip(batch["id"].tolist(), batch["view"].tolist())
      yield batch | {"teacher/logits": np.stack([logits[key] for key in keys])}

  from_cache = train(augmented, source, augment=AUGMENT)
  from_batches = train(teachers.cached(), pipeline, augment=AUGMENT)
  assert largest_difference(from_cache, from_batches) == 0


@pytest.mark.parametrize("url", ["memory://cached-training/", "file://"])
def test_every_location_returns_the_same_columns(tmp_path, cached, source, url):
  batch = {"id": source.ids}
  expected = cached.add_columns(batch)["teacher/logits.values"]
  for other in (written(f"{url}{tmp_path}", source), open_cache(f"{url}{tmp_path}")):
    np.testing.assert_array_equal(other.add_columns(batch)["teacher/logits.values"], expected)


def test_a_run_may_use_a_part_of_the_examples_and_other_labels(cached, source):
  few = data.label_fraction(data.split(source, 0.4)[0], 0.3)
  check_run(cached, few)
  columns = cached.add_columns({"id": few.ids})["teacher/logits.values"]
  np.testing.assert_allclose(columns, teacher_logits(few.arrays["image"]), atol=1e-5)


def test_a_pipeline_gets_the_columns_as_well(trained, cached, source):
  def pipeline(start):
    return data.batches(source, 16, seed=0, start=start)

  from_pipeline = train(cached, pipeline, teacher_variables=linear().variables)
  assert largest_difference(from_pipeline, trained) == 0


def with_copy(model, name):
  """Returns a model whose logits are also an output of another name."""

  def apply(*args, **kwargs):
    outputs, state = model.apply(*args, **kwargs)
    return {**outputs, name: outputs["logits"]}, state

  return model._replace(apply=apply)


def test_sparse_targets_reduce_their_loss(tmp_path, source):
  outputs = {"logits": TopK(2, temperature=2.0), "copy": RandomSampling(3)}
  cached = written(tmp_path, source, with_copy(linear(), "copy"), outputs)
  objective = objectives.weighted(
    top=(1.0, objectives.sparse(losses.sparse_kl)),
    samples=(1.0, objectives.sparse(losses.sampled_cross_entropy, output="copy")),
  )
  model = with_copy(student(), "copy")
  settings = dict(steps=40, batch_size=16, log_every=20)
  history = fit_with(model, cached, objective, optax.adam(1e-2), source, **settings).history
  lines = [line for line in history if line["phase"] == "train"]
  for term in ("top", "samples"):
    assert lines[-1][term] < lines[0][term]


def test_several_outputs_have_codecs_of_their_own(tmp_path, source):
  outputs = {"logits": Dense("float32"), "hidden": Dense("bfloat16")}
  cached = written(tmp_path, source, outputs=outputs)
  batch = {"id": source.ids[:4], "view": np.zeros(4, np.int32), "image": source.arrays["image"][:4]}
  columns = cached.add_columns(batch)
  assert sorted(set(columns) - set(batch)) == ["teacher/hidden.values", "teacher/logits.values"]
  decoded = cached.model.apply({}, {}, columns, train=False, key=None)[0]
  expected = linear().apply(*linear().variables, batch, train=False, key=None)[0]
  np.testing.assert_allclose(decoded["logits"], expected["logits"], rtol=1e-6)
  np.testing.assert_allclose(decoded["hidden"], expected["hidden"], rtol=2**-8)
  assert decoded["hidden"].dtype == jnp.float32


def test_a_loop_of_your_own_adds_and_decodes_columns(cached, source):
  batch = next(data.batches(source, 16, seed=0))
  columns = cached.add_columns(batch)
  decoded = cached.model.apply(*cached.model.variables, columns, train=False, key=None)[0]
  np.testing.assert_allclose(decoded["logits"], teacher_logits(batch["image"]), atol=1e-5)
  assert isinstance(open_cache(cached.store.url).model.variables, Variables)


def test_a_run_does_not_resume_from_another_cache(tmp_path, cached, source):
  train(cached, source, steps=4, folder=tmp_path / "run")
  other = written(tmp_path / "other", source, linear(1))
  with pytest.raises(ValueError, match="teacher"):
    train(other, source, steps=8, folder=tmp_path / "run")


def test_fit_rejects_a_cache_of_another_run(cached, augmented, source):
  with pytest.raises(ValueError, match=r"augmentation\.name"):
    train(augmented, source)
  with pytest.raises(ValueError, match="num_views: expected 2.*got 3"):
    train(augmented, source, augment=AUGMENT, num_views=3)
  with pytest.raises(ValueError, match="mix"):
    train(augmented, source, augment=AUGMENT, mix=data.mixup(1.0, 5))
  with pytest.raises(ValueError, match=r"teacher\.weights"):
    train(cached, source, teacher_variables=linear(1).variables)
  check_teacher_weights(cached, linear().variables)
