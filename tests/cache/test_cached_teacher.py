"""A cache written by a teacher stands for it: the same parameters, and refused wherever it does not belong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from toys import AUGMENT, CLASSES, ROWS, images, linear, student, written

from distill_jax import data, losses, objectives, teachers
from distill_jax.cache import (
  CorruptCache,
  Dense,
  Incomplete,
  Mismatch,
  RandomSampling,
  TopK,
  describe,
  open_cache,
  verify,
  vocabulary,
  writer,
)
from distill_jax.cache.teacher_inputs import ArrayInputs
from distill_jax.models import from_apply
from distill_jax.train import RunOptions, fit
from distill_jax.types import Variables

OBJECTIVE = objectives.weighted(
  hard=(0.1, objectives.labels()),
  soft=(0.9, objectives.logits(losses.kl_divergence, temperature=4.0)),
)


@pytest.fixture
def source(rng):
  return images(rng)


def train(teacher, source, **changed):
  settings = dict(steps=12, batch_size=16) | changed
  return fit_with(
    student(), teacher, changed.pop("objective", OBJECTIVE), optax.adam(1e-2), source, **settings
  )


def largest_difference(a, b):
  apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a.state.params, b.state.params)
  return max(jax.tree.leaves(apart))


# what it is for


@pytest.mark.parametrize("augment, num_views", [(None, 1), (AUGMENT, 3)])
def test_a_run_from_the_cache_ends_with_the_parameters_of_one_with_the_live_teacher(
  tmp_path, source, augment, num_views
):
  cached = written(tmp_path, source, augment=augment, num_views=num_views)
  assert len(cached) == ROWS * num_views
  from_cache = train(cached, source, augment=augment)
  live = train(linear(), source, augment=augment, num_views=num_views)
  assert largest_difference(from_cache, live) < 1e-6
  plain = train(linear(1), source, augment=augment, num_views=num_views)
  assert largest_difference(plain, live) > 1e-3  # the teacher matters here


def test_it_is_bit_for_bit_the_teacher_that_answers_apart_from_the_step(tmp_path, source):
  cached = written(tmp_path, source, augment=AUGMENT, num_views=2, batch_size=16)
  teacher = linear()
  answer = jax.jit(
    lambda batch: teacher.apply(*teacher.variables, AUGMENT(batch), train=False, key=None)[0][
      "logits"
    ]
  )
  said = {}  # asked in the order of the cache, in batches of its size
  ids, views = cached.manifest.rows.ids_and_views(0, 2 * ROWS)
  for first in range(0, 2 * ROWS, 16):
    rows = np.minimum(np.arange(first, first + 16), 2 * ROWS - 1)
    batch = ArrayInputs(source).batch(ids[rows], views[rows])
    said |= dict(zip(zip(batch["id"].tolist(), batch["view"].tolist()), np.asarray(answer(batch))))

  def pipeline(start):
    for batch in data.batches(source, 16, seed=0, start=start, num_views=2):
      pairs = zip(batch["id"].tolist(), batch["view"].tolist())
      yield batch | {"teacher/logits": np.stack([said[pair] for pair in pairs])}

  from_cache = train(cached, source, augment=AUGMENT)
  assert largest_difference(from_cache, train(teachers.cached(), pipeline, augment=AUGMENT)) == 0


@pytest.mark.parametrize("url", ["memory://cached-teacher/", "file://"])
def test_wherever_it_lies(tmp_path, source, url):
  url = f"{url}{tmp_path}"
  assert (
    largest_difference(train(written(url, source), source), train(open_cache(url), source)) == 0
  )


def test_float16_changes_little(tmp_path, source):
  live = train(linear(), source)
  assert (
    0
    < largest_difference(
      train(written(tmp_path, source, outputs={"logits": Dense()}), source), live
    )
    < 2e-3
  )


def test_the_student_may_see_a_part_of_the_examples_and_other_labels(tmp_path, source):
  cached = written(tmp_path, source)
  few = data.label_fraction(data.split(source, 0.4)[0], 0.3)
  assert largest_difference(train(cached, few), train(linear(), few)) < 1e-6


def test_a_pipeline_of_one_s_own_is_joined_too(tmp_path, source):
  cached = written(tmp_path, source)
  pipeline = lambda start: data.batches(source, 16, seed=0, start=start)  # noqa: E731
  assert largest_difference(train(cached, pipeline), train(cached, source)) == 0


def test_sparse_targets_teach(tmp_path, source):
  for codec, loss in (
    (TopK(2, temperature=2.0), losses.sparse_kl),
    (RandomSampling(3), losses.sampled_cross_entropy),
  ):
    cached = written(tmp_path / type(codec).__name__, source, outputs={"logits": codec})
    objective = objectives.weighted(soft=(1.0, objectives.sparse(loss)))
    history = fit(student(), cached, objective, optax.adam(1e-2), source, steps=40, batch_size=16, run=RunOptions(progress=False)).history
    lines = [line["loss"] for line in history if line["phase"] == "train"]
    assert lines[-1] < lines[0]


def test_several_outputs_are_kept_each_in_its_own_way(tmp_path, source):
  cached = written(
    tmp_path, source, outputs={"logits": Dense("float32"), "hidden": Dense("bfloat16")}
  )
  batch = {"id": source.ids[:4], "view": np.zeros(4, np.int32), "image": source.arrays["image"][:4]}
  joined = cached.add_columns(batch)
  assert sorted(set(joined) - set(batch)) == ["teacher/hidden.values", "teacher/logits.values"]
  said = cached.model.apply({}, {}, joined, train=False, key=None)[0]
  expected = linear().apply(*linear().variables, batch, train=False, key=None)[0]
  np.testing.assert_allclose(said["logits"], expected["logits"], rtol=1e-6)
  np.testing.assert_allclose(said["hidden"], expected["hidden"], rtol=2**-8)
  assert said["hidden"].dtype == jnp.float32


# writing


def test_the_same_call_again_opens_what_is_there(tmp_path, source, monkeypatch):
  written(tmp_path, source)
  before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  monkeypatch.setattr(writer, "_fill", None)  # would fail
  assert len(written(tmp_path, source)) == ROWS
  assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_cache_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, source, monkeypatch):
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)
  written(tmp_path / "whole", source)
  put, calls = writer.shards.write_shard, []

  def stops(*arguments):
    if len(calls) == 2:
      raise KeyboardInterrupt
    calls.append(1)
    return put(*arguments)

  with monkeypatch.context() as patched:
    patched.setattr(writer.shards, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
      written(tmp_path / "stopped", source)
  with pytest.raises(Incomplete, match="2 of 4 shards are missing"):
    open_cache(tmp_path / "stopped")
  written(tmp_path / "stopped", source)
  shards = sorted(path.name for path in (tmp_path / "whole").glob("shard-*"))
  assert len(shards) == 4
  for name in shards:
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_a_shard_that_is_written_anew_is_read_back_and_compared(tmp_path, source, monkeypatch):
  """Another device's last bits are not those that the record of completion has."""
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)
  written(tmp_path, source)
  (tmp_path / "shard-00000002").unlink()
  with monkeypatch.context() as patched:
    put = writer.shards.write_shard
    patched.setattr(
      writer.shards,
      "write_shard",
      lambda *args: put(*args[:-1], {name: x + np.float32(1e-6) for name, x in args[-1].items()}),
    )
    with pytest.raises(CorruptCache, match="complete.json does not agree with the shards"):
      written(tmp_path, source)
  (tmp_path / "complete.json").unlink()
  assert len(written(tmp_path, source)) == ROWS


def test_writers_with_other_batches_go_on_with_one_another_s_shards(tmp_path, source, monkeypatch):
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)
  begin = writer.shards.begin

  def late(store, wanted, same):  # another writer comes first, after this one has looked
    begin(store, dataclasses.replace(wanted, rows_per_shard=24), same)
    return begin(store, wanted, same)

  monkeypatch.setattr(writer.shards, "begin", late)
  cached = written(tmp_path, source, batch_size=16)
  assert cached.manifest.rows_per_shard == 24 and len(cached.manifest.plan) == 3
  np.testing.assert_allclose(
    cached.add_columns({"id": source.ids})["teacher/logits.values"],
    source.arrays["image"].reshape(ROWS, -1) @ linear().variables.params,
    atol=1e-5,
  )


def test_the_disk_s_room_is_looked_at_before_anything_is_computed(tmp_path, source, monkeypatch):
  usage = writer.shards.Store.probe_writable.__globals__["shutil"].disk_usage(tmp_path)
  monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
  with pytest.raises(OSError, match=r"cannot write 2,\d\d\d bytes to .*: the disk has 1,000 left"):
    written(tmp_path, source)


def test_a_process_helps_with_what_others_left(tmp_path, source, monkeypatch):
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)
  assert len(written(tmp_path, source, part=(1, 3))) == ROWS


def test_the_rows_of_a_batch_that_fills_up_are_not_written(tmp_path, source):
  odd, even = (
    written(tmp_path / "a", source, batch_size=24),
    written(tmp_path / "b", source, batch_size=8),
  )
  rows = [c.row_reader.read(source.ids, np.zeros(ROWS, int))["logits.values"] for c in (odd, even)]
  np.testing.assert_allclose(*rows, atol=1e-5)


@pytest.mark.parametrize(
  "bad, message", [(np.nan, "holds NaN"), (np.inf, "holds NaN or .inf"), (7e4, "float32")]
)
def test_an_output_that_cannot_be_kept_names_its_example(tmp_path, source, bad, message):
  arrays = dict(source.arrays)
  arrays["image"] = arrays["image"].copy()
  arrays["image"][17, 0, 0, 0] = 1234.0

  def apply(w, x):
    return jnp.where((x == 1234.0).any((1, 2, 3))[:, None], bad, x.reshape(len(x), -1) @ w), {}

  teacher = from_apply(None, apply, variables=linear().variables.params)
  with pytest.raises(
    ValueError, match=rf"'logits' of example id {source.ids[17]}, view 0 .*{message}"
  ):
    written(
      tmp_path, dataclasses.replace(source, arrays=arrays), teacher, {"logits": Dense("float16")}
    )
  assert not list(tmp_path.glob("shard-*"))


def test_what_cannot_be_cached_is_refused(tmp_path, source):
  with pytest.raises(ValueError, match="the teacher gives no 'logit'; did you mean 'logits'"):
    written(tmp_path, source, outputs={"logit": Dense()})
  with pytest.raises(ValueError, match="k: expected 1 to 5"):
    written(tmp_path, source, outputs={"logits": TopK(6)})
  with pytest.raises(ValueError, match="num_views: expected 1 without augmentation, got 2"):
    written(tmp_path, source, num_views=2)
  with pytest.raises(ValueError, match="follows the student"):
    written(tmp_path, source, teachers.moving_average(student()))
  with pytest.raises(ValueError, match="has no weights"):
    written(tmp_path, source, student())
  with pytest.raises(ValueError, match=r"batch_size"):
    written(tmp_path, source, batch_size=12)
  assert not list(tmp_path.iterdir())


# what does not belong


def test_each_field_that_differs_is_named(tmp_path, source):
  written(tmp_path, source, augment=AUGMENT, num_views=2)

  def refused(*fields, **changed):
    with pytest.raises(Mismatch) as caught:
      written(tmp_path, **{"source": source, "augment": AUGMENT, "num_views": 2} | changed)
    lines = [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert set(fields) <= set(lines), caught.value
    return lines

  assert refused(teacher=linear(1)) == ["teacher.answers", "teacher.weights"]
  same_weights = linear()._replace(
    apply=lambda *args, **how: ({"logits": 2 * answer(*args, **how)[0]["logits"]}, {})
  )
  answer = linear().apply
  assert refused(teacher=same_weights) == ["teacher.answers"]
  assert refused("teacher.depth", description={"depth": 3}) == ["teacher.depth"]
  assert refused("outputs.logits.dtype", outputs={"logits": Dense("float16")})
  assert refused("num_views", num_views=3) == ["num_views"]
  other = data.augmentation(data.shift_crop(1), data.flip(), seed=4)
  assert refused(augment=other) == ["augmentation.name", "augmentation.probes"]
  assert refused("data.name", source=dataclasses.replace(source, name="other")) == ["data.name"]
  changed = {**source.arrays, "image": source.arrays["image"] + 1e-6}
  assert refused(source=dataclasses.replace(source, arrays=changed)) == ["data.examples"]
  assert refused("data.examples", "ids", source=source.take(slice(1, None)))
  relabeled = {**source.arrays, "label": np.zeros(ROWS, int)}
  written(
    tmp_path, dataclasses.replace(source, arrays=relabeled), augment=AUGMENT, num_views=2
  )  # labels are not inputs


def test_a_run_that_is_not_the_cache_s_is_refused_before_training(tmp_path, source):
  cached = written(tmp_path, source, augment=AUGMENT, num_views=2)
  with pytest.raises(
    Mismatch,
    match=r"augmentation.name: 'augmentation\(seed=3, transforms=\(shift_crop\(padding=1\), ",
  ):
    train(cached, source)
  with pytest.raises(Mismatch, match="holds 2 of each example, the run asks for 3"):
    train(cached, source, augment=AUGMENT, num_views=3)
  with pytest.raises(ValueError, match="mix: a mixed example is a new one"):
    train(cached, source, augment=AUGMENT, mix=data.mixup(1.0, CLASSES))
  with pytest.raises(Mismatch, match="data.name: 'toy' in the cache, 'other' wanted"):
    train(cached, dataclasses.replace(source, name="other"), augment=AUGMENT)
  words = tuple("dcabe")  # as many, in another order: another tokenizer
  with pytest.raises(Mismatch, match="data.classes"):
    train(cached, dataclasses.replace(source, class_names=words), augment=AUGMENT)
  arrays = {**source.arrays, "image": source.arrays["image"].copy()}
  arrays["image"][11] += 1
  with pytest.raises(Mismatch, match=f"example id {source.ids[11]} is not the one"):
    train(cached, dataclasses.replace(source, arrays=arrays), augment=AUGMENT)
  new = {**source.arrays, "id": np.arange(1000, 1000 + ROWS)}
  with pytest.raises(ValueError, match="example id 1000 is not in the cache"):
    train(cached, dataclasses.replace(source, arrays=new), augment=AUGMENT)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path, source):
  """Its words have other numbers, so that what the cache holds would teach other words (fault 31)."""
  words = ["the", "a", "cat", "dog", "sat"]
  tokenizers = [{"vocabulary": vocabulary(order)} for order in (words, words[::-1])]
  teacher, outputs = linear(), {"logits": TopK(2)}
  cached = written(tmp_path, source, teacher, outputs, description=tokenizers[0])
  check_teacher(cached, teacher, teacher.variables, outputs, source.arrays, tokenizers[0])
  for refused in (
    lambda: written(tmp_path, source, teacher, outputs, description=tokenizers[1]),
    lambda: check_teacher(cached, teacher, teacher.variables, outputs, source.arrays, tokenizers[1]),
  ):
    with pytest.raises(Mismatch, match="teacher.vocabulary: '.*' in the cache, '.*' wanted$"):
      refused()


def test_a_pipeline_and_weights_are_compared_too(tmp_path, source):
  cached = written(tmp_path, source)

  def pipeline(start, shift=0.0):
    return (
      {**b, "image": b["image"] + shift} for b in data.batches(source, 16, seed=0, start=start)
    )

  train(cached, pipeline, teacher_variables=linear().variables)
  with pytest.raises(Mismatch, match="example id .* is not the one"):
    train(cached, lambda start: pipeline(start, 1.0))
  with pytest.raises(Mismatch, match="augmentation.name"):
    train(cached, pipeline, augment=AUGMENT)
  with pytest.raises(Mismatch, match="teacher.weights"):
    train(cached, source, teacher_variables=linear(1).variables)


def test_order_and_more_arrays_do_not_matter_but_shapes_do(tmp_path, source):
  cached = written(tmp_path, source)
  written(tmp_path, source.take(np.arange(ROWS)[::-1]))
  weighted = dataclasses.replace(
    source, arrays={**source.arrays, "weight": np.ones(ROWS, np.float32)}
  )
  check_run(cached, weighted)
  flat = {**source.arrays, "image": source.arrays["image"].reshape(ROWS, 16, 1, 1)}
  with pytest.raises(
    Mismatch, match="data.inputs.image: 'float32.4, 4, 1.' in the cache, 'float32.16, 1, 1.' wanted"
  ):
    check_run(cached, dataclasses.replace(source, arrays=flat))


def test_a_run_that_resumes_from_another_cache_is_refused(tmp_path, source):
  cached = [written(tmp_path / name, source, linear(seed)) for name, seed in (("a", 0), ("b", 1))]
  train(cached[0], source, steps=4, folder=tmp_path / "run")
  with pytest.raises(ValueError, match="teacher: "):
    train(cached[1], source, steps=8, folder=tmp_path / "run")


def test_an_augmentation_whose_views_cannot_be_made_again_is_refused(tmp_path, source):
  def mixes(batch):
    return {**batch, "image": batch["image"] - batch["image"].mean(0)}

  with pytest.raises(ValueError, match="came out otherwise alone than in a batch"):
    written(tmp_path, source, augment=mixes)


# looking at it


def test_verify_finds_a_teacher_that_says_something_else(tmp_path, source):
  outputs = {"logits": Dense("float16"), "hidden": Dense("float32")}
  cached = written(tmp_path, source, outputs=outputs, augment=AUGMENT, num_views=2)
  same = verify(cached, linear(), source, 50, augment=AUGMENT, batch_size=16)
  assert same["logits"].rows == 50 and 0 < same["logits"].difference < 0.01
  assert same["logits"].kl < 1e-5 and same["logits"].top1 == 1 and same["hidden"].difference < 1e-6
  other = verify(cached, linear(scale=1.1), source, 50, augment=AUGMENT, batch_size=16)
  assert (
    other["logits"].difference > 0.1 and other["logits"].kl > 1e-4 and other["hidden"].kl is None
  )
  unaugmented = verify(cached, linear(), source, 50, batch_size=16)
  assert unaugmented["hidden"].difference > 0.1
  with pytest.raises(ValueError, match="n: expected a whole number from 1, got 0"):
    verify(cached, linear(), source, 0)


def test_verify_compares_kept_classes_and_draws(tmp_path, source):
  top = written(tmp_path / "top", source, outputs={"logits": TopK(3, temperature=2.0)})
  agreed = verify(top, linear(), source, batch_size=16)["logits"]
  assert agreed.rows == ROWS and agreed.difference < 0.05 and agreed.kl < 1e-3 and agreed.top1 == 1
  assert verify(top, linear(1), source, batch_size=16)["logits"].top1 < 0.8
  draws = written(tmp_path / "draws", source, outputs={"logits": RandomSampling(4)})
  assert verify(draws, linear(), source, batch_size=16)["logits"].difference == 0
  assert verify(draws, linear(1), source, batch_size=16)["logits"].difference > 0.2


def test_the_description_says_how_sure_and_how_right_the_teacher_is(tmp_path, source):
  logits = linear().apply(
    *linear().variables, {"image": source.arrays["image"]}, train=False, key=None
  )[0]["logits"]
  z = np.asarray(logits, np.float64)
  p = np.exp(z - z.max(-1, keepdims=True))
  sure = (p / p.sum(-1, keepdims=True)).max(-1)
  right = (z.argmax(-1) == source.arrays["label"]).mean()
  text = describe(written(tmp_path, source), source)
  assert f"largest probability, mean {sure.mean():.3f}" in text
  assert f"accuracy on the {ROWS} labeled examples of toy: {right:.4f}" in text
  assert f"0.9 to 1.0  {(sure >= 0.9).mean():6.1%}" in text
  assert "60 rows: 60 examples x 1 views" in text and "teacher.weights" in text


def test_the_description_says_the_cross_entropy_of_kept_label_probabilities(tmp_path, source):
  z = (
    source.arrays["image"].reshape(ROWS, -1).astype(np.float64)
    @ np.float64(linear().variables.params)
    / 2
  )
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  label = np.where(np.arange(ROWS) < 40, source.arrays["label"], data.UNLABELED)
  partly = dataclasses.replace(
    source, arrays={**source.arrays, "label": label}, ignore_label=data.UNLABELED
  )
  text = describe(written(tmp_path, partly, outputs={"logits": TopK(2, temperature=2.0)}))
  wanted = -log_p[np.arange(40), label[:40]].mean()
  assert f"cross entropy at temperature 2 on the 40 labels that it was shown: {wanted:.4f}" in text


def test_a_cache_shows_what_it_is(tmp_path, source, monkeypatch):
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)
  cached = written(tmp_path, source, augment=AUGMENT, num_views=2)
  text = repr(cached)
  size = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
  assert text.startswith(
    f"cache in {tmp_path}\n  120 rows: 60 examples x 2 views, 40 bytes a row, {size:,} bytes"
  )
  assert (
    "\n  data.name: toy\n" in text
    and "... 32 in all]" in text
    and "outputs.logits.dtype: float32" in text
  )
  assert describe(cached).startswith(text)


def test_a_loop_of_one_s_own_joins_and_decodes(tmp_path, source):
  cached = written(tmp_path, source)
  batch = next(data.batches(source, 16, seed=0))
  said = cached.model.apply(*cached.model.variables, cached.add_columns(batch), train=False, key=None)[0]
  np.testing.assert_allclose(
    said["logits"], batch["image"].reshape(16, -1) @ linear().variables.params, rtol=1e-5
  )
  with pytest.raises(ValueError, match="let `Cache.join` add them"):
    cached.model.apply({}, {}, batch, train=False, key=None)


def test_weights_may_be_given_apart(tmp_path, source):
  teacher = linear()
  written(tmp_path, source, teacher._replace(variables=None), teacher_variables=teacher.variables)
  assert isinstance(open_cache(tmp_path).model.variables, Variables)
