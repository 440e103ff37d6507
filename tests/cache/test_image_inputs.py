"""Caches of images that are read and cropped while training, in the place of the live teacher."""

import dataclasses
import io

import jax
import numpy as np
import optax
import PIL.Image
import pytest
from fitting import fit_with
from toys import linear

from distill_jax import losses, objectives
from distill_jax.cache import Dense, Mismatch, TopK, describe, verify, write_cache
from distill_jax.cache.teacher_inputs import ImageInputs
from distill_jax.data.crops import center_crop, random_resized_crop
from distill_jax.data.images import Images
from distill_jax.data.stream import Stream
from distill_jax.models import from_nnx
from distill_jax.models.zoo.mlp import MLP

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


def images_of(encoded, **changed):
  known = dict(zip(range(100, 100 + ROWS), encoded))
  settings = dict(
    read=lambda ids: [(known[int(id)], int(id) % CLASSES) for id in ids],
    ids=np.array(sorted(known)),
  )
  return Images(
    **settings
    | dict(classes=CLASSES, name="pictures", content="a", channels=1, max_bad=0.2)
    | changed
  )


@pytest.fixture
def encoded(rng):
  return [png(rng) for _ in range(ROWS)]


@pytest.fixture
def images(encoded):
  return images_of(encoded)


def written(folder, images, **changed):
  settings = dict(crop=CROP, num_views=2, batch_size=8, progress=False) | changed
  return write_cache(folder, linear(), images, {"logits": Dense("float32")}, **settings)


def train(teacher, images, num_views=2, crop=CROP, seed=0, **changed):
  student = from_nnx(lambda rngs: MLP(16, (8,), CLASSES, rngs=rngs))
  source = Stream(images, 8, crop, seed, num_views)
  settings = dict(steps=9, batch_size=8, num_views=num_views) | changed
  return fit_with(student, teacher, OBJECTIVE, optax.adam(1e-2), source, **settings).state.params


def largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_a_run_from_the_cache_ends_with_the_parameters_of_one_with_the_live_teacher(
  tmp_path, images
):
  cached = written(tmp_path, images)  # 3 steps an epoch: both views are seen, the first one twice
  assert len(cached) == 2 * ROWS
  live = train(linear(), images)
  assert largest_difference(train(cached, images), live) < 1e-6
  assert largest_difference(train(linear(1), images), live) > 1e-3
  assert verify(cached, linear(), images, crop=CROP, batch_size=8)["logits"].difference < 1e-5


def test_each_row_is_what_the_teacher_says_of_that_view_of_that_image(tmp_path, images):
  cached = written(tmp_path, images)
  batch = next(iter(Stream(images, 8, CROP, 0, 2)(4)))  # the second view
  assert (batch["view"] == 1).all()
  expected = batch["image"].reshape(8, -1).astype(np.float64) @ linear().variables.params
  np.testing.assert_allclose(cached.add_columns(batch)["teacher/logits.values"], expected, atol=1e-5)
  other = cached.add_columns({**batch, "view": np.zeros(8, np.int32)})["teacher/logits.values"]
  assert np.abs(other - expected).max() > 1e-2


def test_what_the_run_crops_otherwise_is_refused_before_training(tmp_path, images, encoded, rng):
  cached = written(tmp_path, images)
  with pytest.raises(
    Mismatch, match="is not the one that the teacher .* was shown: its inputs have changed, or are"
  ):
    train(cached, images, crop=random_resized_crop(4, seed=4))
  with pytest.raises(
    Mismatch, match="data.inputs.image: 'float32.4, 4, 1.' in the cache, 'float32.5, 5, 1.' wanted"
  ):
    train(cached, images, crop=random_resized_crop(5, seed=3))
  with pytest.raises(Mismatch, match="is not the one that the teacher"):
    train(cached, images_of([png(rng) for _ in encoded]))

  def fields(source=images, crop=CROP, **changed):
    with pytest.raises(Mismatch) as caught:
      check_run(cached, source, crop=crop, **changed)
    return [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]

  assert fields(crop=random_resized_crop(4, seed=4, area=(0.2, 1.0))) == [
    "data.crop.name",
    "data.crop.probes",
  ]
  assert fields(images_of(encoded, name="others", content="b")) == ["data.content", "data.name"]
  assert fields(augment=lambda batch: batch) == ["augmentation.name", "augmentation.probes"]
  check_run(cached, images.take(slice(3, 9)), crop=CROP)
  with pytest.raises(ValueError, match="example id 7 is not in the cache"):
    check_run(cached, dataclasses.replace(images, ids=np.array([7])), crop=CROP)
  with pytest.raises(
    Mismatch,
    match="data.crop.name: 'random_resized_crop.*' in the cache, 'center_crop.fraction=0.875, si",
  ):
    written(tmp_path, images, crop=center_crop(4), num_views=2, augment=lambda batch: {**batch})


def test_views_are_as_many_as_the_crop_makes(tmp_path, images):
  with pytest.raises(
    ValueError,
    match="num_views: expected 1, got 2: crop makes the same view of an image every time",
  ):
    written(tmp_path / "a", images, crop=center_crop(4))
  with pytest.raises(ValueError, match="holds 2 of each example, the run asks for 0"):
    train(written(tmp_path / "b", images), images, num_views=0)
  same = written(
    tmp_path / "c", images, crop=center_crop(4), num_views=1
  )  # any epoch reads its one view
  live = train(linear(), images, num_views=0, crop=center_crop(4))
  assert largest_difference(train(same, images, num_views=0, crop=center_crop(4)), live) < 1e-6


def test_an_image_that_cannot_be_decoded_is_nobody_s_row(tmp_path, encoded):
  broken = list(encoded)
  broken[5] = broken[5][:40]
  images = images_of(broken)
  cached = written(tmp_path, images)
  assert list(images.bad) == [105]
  assert (
    largest_difference(train(cached, images_of(broken)), train(linear(), images_of(broken))) < 1e-6
  )
  assert verify(cached, linear(), images, 48, crop=CROP, batch_size=8)["logits"].rows == 46
  assert "largest probability" in describe(cached)
  with pytest.raises(
    ValueError, match="example id 105: the image could not be decoded when the cache"
  ):
    train(cached, images_of(encoded))  # a Pillow that can
  with pytest.raises(ValueError, match="cannot be used"):
    written(tmp_path / "none", images_of([b"no image"] * ROWS))


def test_a_crop_is_asked_for_where_one_is_needed(tmp_path, images):
  with pytest.raises(
    ValueError, match="crop: the images of 'pictures' are read while the teacher sees them"
  ):
    written(tmp_path, images, crop=None)
  with pytest.raises(ValueError, match="crop: expected none: the examples are in memory"):
    written(tmp_path, images.load(4))


def test_labels_and_codecs_are_those_of_any_cache(tmp_path, images):
  cached = write_cache(
    tmp_path, linear(), images, {"logits": TopK(2)}, crop=CROP, batch_size=8, progress=False
  )
  batch = ImageInputs(images, CROP).batch(images.ids[:8], np.zeros(8, int))
  z = batch["image"].reshape(8, -1).astype(np.float64) @ linear().variables.params
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  found = cached.add_columns(batch)["teacher/logits.label_log_prob"]
  np.testing.assert_allclose(found, log_p[np.arange(8), images.ids[:8] % CLASSES], atol=1e-5)
