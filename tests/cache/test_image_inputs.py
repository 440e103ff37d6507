"""Checks caches of images that are read and cropped while training."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from fitting import fit_with
from scipy.special import log_softmax
from toys import largest_difference, linear, student, teacher_logits

from distill_jax import losses, objectives
from distill_jax.cache import Dense, Mismatch, TopK, check_run, describe, verify, write_cache
from distill_jax.cache.teacher_inputs import ImageInputs
from distill_jax.data.crops import center_crop, random_resized_crop
from distill_jax.data.images import Images
from distill_jax.data.stream import Stream

CLASSES, ROWS = 5, 24
CROP = random_resized_crop(4, seed=3, area=(0.2, 1.0))
OBJECTIVE = objectives.weighted(
  soft=(1.0, objectives.logits(losses.kl_divergence, temperature=2.0))
)


def png(rng):
  height, width = rng.integers(6, 20, 2)
  stream = io.BytesIO()
  PIL.Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).save(stream, "PNG")
  return stream.getvalue()


def images_of(files, **changed):
  by_id = dict(zip(range(100, 100 + ROWS), files))
  settings = dict(
    read=lambda ids: [(by_id[int(id)], int(id) % CLASSES) for id in ids],
    ids=np.array(sorted(by_id)),
    classes=CLASSES,
    name="pictures",
    content="a",
    channels=1,
    max_bad=0.2,
  )
  return Images(**settings | changed)


@pytest.fixture(scope="module")
def files():
  rng = np.random.default_rng(0)
  return [png(rng) for _ in range(ROWS)]


@pytest.fixture(scope="module")
def images(files):
  return images_of(files)


def write(folder, images, outputs=None, teacher=None, **changed):
  outputs = outputs or {"logits": Dense("float32")}
  settings = dict(crop=CROP, num_views=2, batch_size=8, progress=False) | changed
  return write_cache(folder, teacher or linear(), images, outputs, **settings)


def without_black(model):
  """Returns a model whose logits of a black image are NaN."""

  def apply(params, state, batch, **kwargs):
    outputs, state = model.apply(params, state, batch, **kwargs)
    is_black = (batch["image"] == 0).all((1, 2, 3))[:, None]
    return {"logits": jnp.where(is_black, jnp.nan, outputs["logits"])}, state

  return model._replace(apply=apply)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, images):
  return write(tmp_path_factory.mktemp("images") / "cache", images)


def train(teacher, images, num_views=2, crop=CROP, **changed):
  source = Stream(images, 8, crop, 0, num_views)
  # 3 steps an epoch: of two views both are read, the first one twice.
  settings = dict(steps=9, batch_size=8, num_views=num_views) | changed
  return fit_with(student(), teacher, OBJECTIVE, optax.adam(1e-2), source, **settings)


def test_student_from_cache_matches_live_teacher(cached, images):
  assert len(cached) == 2 * ROWS
  live = train(linear(), images)
  assert largest_difference(train(cached, images), live) < 1e-6
  assert largest_difference(train(linear(1), images), live) > 1e-3
  agreement = verify(cached, linear(), images, crop=CROP, batch_size=8)["logits"]
  assert agreement.difference < 1e-5


def test_each_row_is_the_output_for_its_view(cached, images):
  batch = next(iter(Stream(images, 8, CROP, 0, 2)(4)))  # of the second view
  assert (batch["view"] == 1).all()
  expected = teacher_logits(batch["image"])
  name = "teacher/logits.values"
  np.testing.assert_allclose(cached.add_columns(batch)[name], expected, atol=1e-5)
  other = cached.add_columns({**batch, "view": np.zeros(8, np.int32)})[name]
  assert np.abs(other - expected).max() > 1e-2


def test_a_run_with_another_crop_is_rejected(cached, images, files):
  rng = np.random.default_rng(1)
  with pytest.raises(Mismatch, match="data: .*example id"):
    train(cached, images, crop=random_resized_crop(4, seed=4))
  with pytest.raises(Mismatch, match=r"data\.inputs\.image: .*5, 5, 1.*4, 4, 1"):
    train(cached, images, crop=random_resized_crop(5, seed=3))
  with pytest.raises(Mismatch, match="data: .*example id"):
    train(cached, images_of([png(rng) for _ in files]))
  with pytest.raises(Mismatch, match="num_views: expected 2.*got 0"):
    train(cached, images, num_views=0)


def test_each_field_that_differs_is_named(cached, images, files):
  def fields(source=images, crop=CROP, **changed):
    with pytest.raises(Mismatch) as caught:
      check_run(cached, source, crop=crop, **changed)
    return [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]

  other_crop = random_resized_crop(4, seed=4, area=(0.2, 1.0))
  assert fields(crop=other_crop) == ["data.crop.name", "data.crop.probes"]
  assert fields(images_of(files, name="others", content="b")) == ["data.content", "data.name"]
  assert fields(augment=lambda batch: {**batch, "image": 1 - batch["image"]}) == [
    "augmentation.name",
    "augmentation.probes",
  ]
  check_run(cached, images.take(slice(3, 9)), crop=CROP)
  with pytest.raises(ValueError, match="example id 7 is not"):
    check_run(cached, dataclasses.replace(images, ids=np.array([7])), crop=CROP)
  with pytest.raises(Mismatch, match=r"data\.crop\.name: .*center_crop.*random_resized_crop"):
    write(cached.store.url, images, crop=center_crop(4), augment=lambda batch: {**batch})


def test_num_views_is_at_most_what_the_crop_makes(tmp_path, images):
  with pytest.raises(ValueError, match="num_views: expected 1.*got 2"):
    write(tmp_path / "two", images, crop=center_crop(4))
  one = write(tmp_path / "one", images, crop=center_crop(4), num_views=1)
  batch = next(iter(Stream(images, 8, center_crop(4), 0, 0)(7)))  # of any epoch
  assert (batch["view"] > 0).all()
  columns = one.add_columns(batch)["teacher/logits.values"]
  np.testing.assert_allclose(columns, teacher_logits(batch["image"]), atol=1e-5)
  check_run(one, batch, num_views=0)


def test_no_run_reads_the_row_of_an_undecodable_image(tmp_path, files):
  corrupt = list(files)
  corrupt[5] = corrupt[5][:40]
  images = images_of(corrupt)
  # An undecodable image is black: what the teacher returns for it is neither checked nor read.
  cached = write(tmp_path, images, teacher=without_black(linear()))
  assert list(images.bad) == [105]
  assert verify(cached, linear(), images, 48, crop=CROP, batch_size=8)["logits"].rows == 46
  assert "largest probability" in describe(cached)
  ids = np.array([104, 105, 106])
  assert cached.valid_rows(ids, np.zeros(3, np.int32)).tolist() == [True, False, True]
  for first in range(0, 6):
    batch = next(iter(Stream(images_of(corrupt), 8, CROP, 0, 2)(first)))
    assert 105 not in batch["id"]
    cached.add_columns(batch)
  with pytest.raises(ValueError, match="id: .*example id 105"):
    # As if another version of Pillow decoded it.
    cached.add_columns({"id": ids, "view": np.zeros(3, np.int32)})
  with pytest.raises(ValueError, match="pictures"):
    write(tmp_path / "none", images_of([b"no image"] * ROWS))


def test_a_crop_is_required_for_images_only(tmp_path, images):
  with pytest.raises(ValueError, match="crop: .*got None"):
    write(tmp_path, images, crop=None)
  with pytest.raises(ValueError, match="crop: expected None"):
    write(tmp_path, images.load(4))


def test_top_k_stores_the_labels_log_probability(tmp_path, images):
  cached = write(tmp_path, images, {"logits": TopK(2)}, num_views=1)
  batch = ImageInputs(images, CROP).batch(images.ids[:8], np.zeros(8, int))
  log_probs = log_softmax(teacher_logits(batch["image"]), -1)
  expected = log_probs[np.arange(8), images.ids[:8] % CLASSES]
  stored = cached.add_columns(batch)["teacher/logits.label_log_prob"]
  np.testing.assert_allclose(jax.device_get(stored), expected, atol=1e-5)
