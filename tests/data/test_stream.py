import itertools
import threading

import jax
import numpy as np
import optax
import pytest
from fitting import fit_with
from pictures import encoded, noise, write_classes

from distill_jax import data, objectives
from distill_jax.cache.teacher_inputs import ImageInputs
from distill_jax.data.crops import center_crop, random_resized_crop
from distill_jax.data.images import BadImageError, Images
from distill_jax.data.sets import folder
from distill_jax.data.stream import EvalStream, Stream
from distill_jax.models import from_apply

CROP = random_resized_crop(8, seed=1)


def images(n=13, broken=(), max_bad=0.5, classes=3, **changes):
  """Ids 100, 101, ..., of many sizes; the label is the id modulo 3."""
  files = {id: encoded(noise(id, 10 + id % 5, 9 + id % 7, 3)) for id in range(100, 100 + n)}
  files.update(dict.fromkeys(broken, b"broken"))
  read = lambda ids: [(files[id], id % 3) for id in ids]  # noqa: E731
  return Images(read, np.arange(100, 100 + n), classes, max_bad=max_bad, **changes)


def stream(examples=None, **changes):
  settings = dict(batch_size=4, crop=CROP, seed=5, threads=4) | changes
  return Stream(examples or images(), **settings)


def first(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others):
    assert batch.keys() == other.keys()
    for name in batch:
      assert batch[name].dtype == other[name].dtype
      np.testing.assert_array_equal(batch[name], other[name])


def test_row_is_the_crop_of_its_id_and_view():
  examples = images()
  for batch in first(stream(examples)(0), 7):
    types = {name: (str(values.dtype), values.shape) for name, values in batch.items()}
    assert types.pop("image") == ("float32", (4, 8, 8, 3))
    assert types == dict.fromkeys(("id", "view", "label"), ("int32", (4,)))
    np.testing.assert_array_equal(batch["label"], batch["id"] % 3)
    for id, view, pixels in zip(batch["id"].tolist(), batch["view"].tolist(), batch["image"]):
      [(image, _)] = examples.decode([id])
      np.testing.assert_array_equal(pixels, CROP(image, id, view))


@pytest.mark.parametrize("num_views", [0, 2])
def test_order_and_views_match_sets_in_memory(num_views):
  ids = np.arange(100, 113)
  source = data.Source({"id": ids, "label": ids % 3}, classes=3)
  expected = first(data.batches(source, 4, seed=5, num_views=num_views), 12)
  got = first(stream(num_views=num_views)(0), 12)
  # The fourth batch is the first one of the second epoch.
  assert stream().steps_per_epoch == 3 and got[2]["view"][0] != got[3]["view"][0]
  assert_same([{name: batch[name] for name in ("id", "label", "view")} for batch in got], expected)


@pytest.mark.parametrize("start", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 7])
def test_resumed_stream_matches_with_any_threads(start, threads):
  expected = first(stream()(0), 11)
  assert_same(first(stream(threads=threads)(start), 11 - start), expected[start:])


def test_distant_start_is_immediate():
  assert next(stream(num_views=3)(10**12))["view"].tolist() == [10**12 // 3 % 3] * 4


def test_bad_image_is_replaced_by_the_next_good_one():
  examples = images(broken=(103, 107))
  got = [batch["id"].tolist() for batch in first(stream(examples)(0), 9)]
  clean = np.array([batch["id"] for batch in first(stream(images())(0), 9)]).reshape(3, 12)
  assert sorted(examples.bad) == [103, 107]
  differs = np.array(got).reshape(3, 12) != clean
  assert differs.sum() >= 3 and set(clean[differs].tolist()) == {103, 107}
  for row, other in zip(np.array(got).reshape(3, 12), clean):
    for i in np.flatnonzero(row != other)[:-1]:
      later = [id for id in other[i + 1 :].tolist() if id not in (103, 107)]
      assert not later or row[i] == later[0]
  assert_same(
    first(stream(images(broken=(103, 107)), threads=1)(2), 4), first(stream(examples)(2), 4)
  )


def test_too_many_bad_images_raise():
  with pytest.raises(BadImageError, match="2 of 13 .* id 103: .*max_bad"):
    first(stream(images(broken=(103, 107), max_bad=0.1))(0), 9)
  with pytest.raises(BadImageError):
    list(EvalStream(images(broken=(103, 107), max_bad=0.1), 4, center_crop(8)))


def test_label_that_is_no_class_raises():
  with pytest.raises(ValueError, match=r"^classes:"):
    images(classes=0)
  with pytest.raises(ValueError, match=r"^label: .*got 2 "):
    first(stream(images(classes=2))(0), 3)


@pytest.mark.parametrize("broken", [(), (104,), (112,)])
def test_evaluation_reads_every_good_image_once(broken):
  examples, crop = images(broken=broken), center_crop(8)
  evaluation = EvalStream(examples, 4, crop)
  batches = list(evaluation)
  assert len(batches) == len(evaluation) == 4
  where = np.concatenate([batch["where"] for batch in batches])
  ids = np.concatenate([batch["id"] for batch in batches])[where]
  assert where.dtype == bool and ids.tolist() == [id for id in range(100, 113) if id not in broken]
  pixels = np.concatenate([batch["image"] for batch in batches])[where]
  for id, row in zip(ids.tolist(), pixels):
    [(image, _)] = examples.decode([id])
    np.testing.assert_array_equal(row, crop(image, id, 0))
  assert_same(list(evaluation), batches)


def test_fit_on_a_stream_resumes_to_the_same_bits(tmp_path):
  def run(steps, name, **changes):
    student = from_apply(
      lambda key, image: 0.1 * jax.random.normal(key, (192, 3)),
      lambda w, image: image.reshape(-1, 192) @ w,
    )
    settings = dict(
      steps=steps, batch_size=8, log_every=2, folder=tmp_path / name, checkpoint_every=2
    )
    source = stream(images(broken=(105,)), batch_size=8, **changes)
    goal = objectives.weighted(hard=(1.0, objectives.labels()))
    return fit_with(student, None, goal, optax.sgd(0.1), source, **settings).state.params

  full = run(6, "full")
  half = run(4, "parts")
  assert (jax.tree.leaves(full)[0] != jax.tree.leaves(half)[0]).any()
  jax.tree.map(np.testing.assert_array_equal, run(6, "parts", threads=2), full)


def test_no_thread_outlives_its_iterator():
  before = set(threading.enumerate())
  batches = stream()(0)
  next(batches)
  # Threads of earlier tests may end meanwhile.
  started = set(threading.enumerate()) - before
  assert started
  batches.close()
  for thread in started:
    thread.join(10)
    assert not thread.is_alive(), thread


def test_identity_differs_between_sets_and_subsets(tmp_path):
  write_classes(tmp_path, {"a": 9, "b": 4})
  examples = folder.images(tmp_path)
  same = stream(folder.images(tmp_path), seed=9, batch_size=2).identity
  assert stream(examples).identity == same
  assert stream(examples.take(slice(0, 12))).identity != same
  (tmp_path / "a" / "0.png").unlink()
  assert stream(folder.images(tmp_path)).identity != same


@pytest.mark.parametrize(
  "changes",
  [{"batch_size": 14}, {"batch_size": 0}, {"threads": 0}, {"num_views": -1}, {"seed": -1}],
)
def test_arguments_out_of_range_raise(changes):
  with pytest.raises(ValueError, match=f"^{next(iter(changes))}:"):
    stream(**changes)


@pytest.mark.parametrize("rows", [[0, 1], [3], [1, 2]])
def test_process_reads_its_rows_of_each_batch(rows):
  rows, examples = np.array(rows), images(broken=(104, 109))
  full, local = first(stream(examples)(2), 6), first(stream(examples).for_rows(rows)(2), 6)
  assert_same([{name: values[rows] for name, values in batch.items()} for batch in full], local)
  evaluation = EvalStream(examples, 4, center_crop(8), threads=2)
  full, local = list(evaluation), list(evaluation.for_rows(rows))
  assert_same([{name: values[rows] for name, values in batch.items()} for batch in full], local)


def labeled(label, classes=None):
  """Images whose labels are `label(id)`."""
  files = {id: encoded(noise(id, 8, 8, 3)) for id in range(100, 108)}
  read = lambda ids: [(files[id], label(id)) for id in ids]  # noqa: E731
  return Images(read, np.arange(100, 108), classes)


def two_heads(id):
  return {"label": id % 3, "depth": np.float64(id / 2), "box": [id, 0.5]}


@pytest.mark.parametrize(
  ("label", "classes", "expected"),
  [
    (two_heads, 3, {"label": ("int32", ()), "depth": ("float32", ()), "box": ("float32", (2,))}),
    (lambda id: id / 7, None, {"label": ("float32", ())}),
    (lambda id: np.eye(3)[id % 3], None, {"label": ("float32", (3,))}),
  ],
)
def test_labels_of_several_entries_and_numbers_are_streamed(label, classes, expected):
  examples = labeled(label, classes)
  (train,) = first(stream(examples, batch_size=8)(0), 1)
  (evaluated,) = EvalStream(examples, 8, center_crop(8))
  stored = ImageInputs(examples, center_crop(8)).batch(examples.ids, 0 * examples.ids)
  for batch in (train, evaluated, stored, examples.load().arrays):
    assert {name: (batch[name].dtype, batch[name].shape[1:]) for name in expected} == expected
    for name in expected:
      values = [label(int(id)) for id in batch["id"]]
      values = [x[name] for x in values] if isinstance(values[0], dict) else values
      np.testing.assert_allclose(batch[name], np.array(values, np.float32))


@pytest.mark.parametrize(
  ("label", "field"), [(lambda id: {"id": id}, "read"), (lambda id: id / 7, "label")]
)
def test_labels_that_are_no_entries_or_classes_raise(label, field):
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    first(stream(labeled(label, 3))(0), 1)


def test_student_learns_two_streamed_labels():
  examples = labeled(lambda id: {"label": id % 3, "depth": id - 103.5}, 3)

  def apply(p, x):
    x = x.reshape(-1, 192)
    return {"logits": x @ p["label"], "depth": x @ p["depth"]}

  weights = {"label": np.zeros((192, 3), np.float32), "depth": np.zeros(192, np.float32)}
  student = from_apply(None, apply, variables=weights, inputs="image")
  objective = objectives.weighted(
    hard=(1.0, objectives.labels()),
    depth=(1.0, objectives.labels(optax.squared_error, output="depth")),
  )
  settings = dict(steps=20, batch_size=8, log_every=10, validation=None)
  source = stream(examples, batch_size=8, crop=center_crop(8))
  fitted = fit_with(student, None, objective, optax.adam(0.01), source, **settings)
  losses = [line["depth"] for line in fitted.history if line["phase"] == "train"]
  assert losses[-1] < losses[0]
