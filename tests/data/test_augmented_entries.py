import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data

ROWS, SIZE = 24, 6
KINDS = {"image": "image", "teacher_image": "image", "label": "label_map", "boxes": "boxes"}
TRANSFORMS = {
  "turns": (data.flip(), data.flip(up_down=True), data.rotate90()),
  "shift_crop": (data.shift_crop(2),),
}


def a_batch(rng):
  """One pixel of each image is 1; the label map and the box mark the same pixel."""
  image = np.zeros((ROWS, SIZE, SIZE), np.float32)
  row, column = rng.integers(1, SIZE - 1, (2, ROWS))
  image[np.arange(ROWS), row, column] = 1
  box = np.stack([column, row, column + 1, row + 1], 1).astype(np.float32)
  return {
    "image": image[..., None],
    "teacher_image": np.kron(image, np.ones((2, 2), np.float32))[..., None],
    "label": image.astype(np.uint8),
    "boxes": np.stack([box, np.zeros_like(box)], 1),
    "id": np.arange(ROWS),
    "view": np.zeros(ROWS, int),
  }


@pytest.mark.parametrize("name", TRANSFORMS)
def test_all_entries_move_alike(rng, name):
  batch = a_batch(rng)
  augmented = jax.jit(data.augmentation(*TRANSFORMS[name], seed=0, entries=KINDS))(batch)
  image = np.asarray(augmented["image"])[..., 0]
  assert (image != batch["image"][..., 0]).any((1, 2)).sum() > ROWS / 4
  np.testing.assert_array_equal(augmented["teacher_image"][:, ::2, ::2, 0], image)
  np.testing.assert_array_equal(augmented["teacher_image"][:, 1::2, 1::2, 0], image)
  label = np.asarray(augmented["label"])
  assert label.dtype == np.uint8
  np.testing.assert_array_equal(label == 1, image == 1)
  # What comes from outside the image is void.
  assert set(np.unique(label)) == ({0, 1, 255} if name == "shift_crop" else {0, 1})
  for i, (left, top, right, bottom) in enumerate(np.asarray(augmented["boxes"])[:, 0].astype(int)):
    inside = np.zeros((SIZE, SIZE), bool)
    inside[top:bottom, left:right] = True
    np.testing.assert_array_equal(inside, image[i] == 1)
  np.testing.assert_array_equal(np.asarray(augmented["boxes"])[:, 1], 0)


def test_rotations_are_uniform():
  image = np.tile(np.arange(4, dtype=np.float32).reshape(1, 2, 2), (400, 1, 1))
  batch = {"image": image, "id": np.arange(400), "view": np.zeros(400, int)}
  result = np.asarray(jax.jit(data.augmentation(data.rotate90(), seed=0))(batch)["image"])
  counts = [(result == np.rot90(image[0], i)).all((1, 2)).sum() for i in range(4)]
  # chi-square, 3 degrees of freedom: p > 0.001
  assert sum(counts) == 400 and sum((c - 100) ** 2 / 100 for c in counts) < 16.3


def test_brightness_scales_images_only(rng):
  batch = a_batch(rng)
  augment = data.augmentation(data.brightness(0.5), seed=0, entries=KINDS)
  augmented = jax.jit(augment)(batch)
  factor = np.asarray(augmented["image"]).max((1, 2, 3))
  assert factor.min() >= 0.5 and factor.max() <= 1.5 and np.ptp(factor) > 0.5
  np.testing.assert_array_equal(augmented["teacher_image"].max((1, 2, 3)), factor)
  np.testing.assert_array_equal(augmented["label"], batch["label"])
  np.testing.assert_array_equal(augmented["boxes"], batch["boxes"])


def test_entries_of_the_users_own_transform(rng):
  batch = a_batch(rng)
  own = data.augmentation(lambda key, image: 1 - image, seed=0, entries=("image",))
  np.testing.assert_array_equal(own(batch)["image"], 1 - batch["image"])
  with pytest.raises(ValueError, match=r"^transforms: .*'label'"):
    data.augmentation(lambda key, image: image, seed=0, entries=KINDS)(batch)
  for wrong in (
    lambda key, image: jnp.zeros((3, 3, 1)),
    lambda key, image: image.astype(jnp.int32),
    lambda key, image: np.flipud(np.asarray(image)),
  ):
    with pytest.raises(ValueError, match=r"^transforms:"):
      data.augmentation(wrong, seed=0, entries=("image",))(batch)


@pytest.mark.parametrize("name", ["teacher_image", "label", "boxes"])
def test_other_images_raise_until_they_are_named(rng, name):
  """They stayed as they were next to a flipped 'image'."""
  batch = a_batch(rng)
  batch = {key: batch[key] for key in ("image", "id", "view", name)}
  with pytest.raises(ValueError, match=rf"^entries: .*{name!r}"):
    data.augmentation(data.flip(), seed=0)(batch)
  with pytest.raises(ValueError, match=rf"^entries: .*{name!r}"):
    data.mixup(1.0, None)(jax.random.key(0), batch)
  result = data.augmentation(lambda key, x: x, seed=0, entries=("image",))(batch)
  np.testing.assert_array_equal(result[name], batch[name])


@pytest.mark.parametrize(
  "name, values, suggestion",
  [
    ("boxes", np.zeros((ROWS, 3, 4), int), r"'boxes': 'boxes'"),
    ("joints", np.zeros((ROWS, 5, 2), int), r"x \+ 1"),
    ("joints", np.zeros((ROWS, 5, 3), np.float32), r"x \+ 1"),
    ("bbox", np.zeros((ROWS, 4), np.float32), r"'bbox': 'boxes'"),
    ("label", np.zeros((ROWS, SIZE, SIZE), int), r"'label': 'label_map'"),
    ("label", np.zeros((ROWS, SIZE, SIZE, 1), np.uint8), r"'label': 'label_map'"),
    ("depth", np.zeros((ROWS, SIZE, SIZE), np.float32), r"\('image', 'depth'\)"),
  ],
)
def test_entries_that_depend_on_the_image_raise(rng, name, values, suggestion):
  """Boxes and points of integers stayed; a label map was suggested as an image."""
  batch = {key: x for key, x in a_batch(rng).items() if key in ("image", "id", "view")}
  with pytest.raises(ValueError, match=rf"^entries: .*{name!r}.*{suggestion}"):
    data.augmentation(data.flip(), seed=0)(batch | {name: values})
  jax.eval_shape(
    data.augmentation(data.flip(), seed=0), batch | {"features": np.zeros((ROWS, 9), np.float32)}
  )


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_label_maps_are_no_images(rng, dtype):
  """Padding was class 0, and mixup blended class numbers."""
  batch = {key: x for key, x in a_batch(rng).items() if key in ("image", "id", "view", "label")}
  batch["label"] = batch["label"].astype(dtype)
  names = ("image", "label")
  with pytest.raises(ValueError, match=r"^label: .*label_map"):
    data.augmentation(data.shift_crop(2), seed=0, entries=names)(batch)
  with pytest.raises(ValueError, match=r"^label: "):
    data.mixup(1.0, None, entries=names)(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=r"^entries: ((?!'label_map').)*$"):
    data.mixup(1.0, None)(jax.random.key(0), batch)
  with pytest.raises(ValueError, match=r"^entries: .*'label': 'label_map'"):
    data.cutmix(1.0, None)(jax.random.key(0), batch)


@pytest.mark.parametrize("mixer", [data.mixup, data.cutmix])
@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_second_label_entry_raises_until_it_is_named(rng, mixer, dtype):
  """It kept one image's labels, next to a blend of two."""
  batch = {key: x for key, x in a_batch(rng).items() if key in ("image", "id", "view")}
  batch |= {"label": np.arange(ROWS) % 3, "type": np.zeros(ROWS, dtype)}
  with pytest.raises(ValueError, match=r"^classes: .*'type'"):
    mixer(1.0, 3)(jax.random.key(0), batch)
  if dtype is bool and mixer is data.mixup:
    mixed = jax.eval_shape(mixer(1.0, {"label": 3, "type": 2}), jax.random.key(0), batch)
    assert mixed["type"].shape == (ROWS, 2)


@pytest.mark.parametrize(
  "entries, changed, field",
  [
    ("image", {}, "entries"),
    ({"image": "picture"}, {}, "entries"),
    ({"boxes": "boxes"}, {}, "entries"),
    (("image", "depth"), {}, "depth"),
    (("image",), {"image": np.zeros((ROWS, 3, 8, 8), np.float32)}, "image"),
    (("image",), {"image": np.zeros((ROWS, 8), np.float32)}, "image"),
    ({"image": "image", "label": "label_map"}, {"label": np.zeros((ROWS, 6, 6))}, "label"),
    ({"image": "image", "boxes": "boxes"}, {"boxes": np.zeros((ROWS, 2, 5))}, "boxes"),
    (("image", "teacher_image"), {"teacher_image": np.zeros((ROWS, 9, 9, 1))}, "entries"),
  ],
)
def test_entries_of_another_kind_raise(rng, entries, changed, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    jax.eval_shape(
      data.augmentation(data.shift_crop(1), seed=0, entries=entries), a_batch(rng) | changed
    )


def test_arguments_of_transforms_are_checked(rng):
  for limit in (0, 1.5):
    with pytest.raises(ValueError, match=r"^limit:"):
      data.brightness(limit)
  batch = {"image": np.ones((2, 4, 6), np.uint8), "id": np.arange(2), "view": np.zeros(2, int)}
  for transform, field in ((data.brightness(0.1), "brightness"), (data.rotate90(), "rotate90")):
    with pytest.raises(ValueError, match=rf"^{field}:"):
      jax.eval_shape(data.augmentation(transform, seed=0), batch)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_images_and_label_entries_mix_with_one_weight(rng, name):
  batch = a_batch(rng) | {
    "image": rng.random((4, 6, 6), np.float32),
    "teacher_image": rng.random((4, 12, 12, 1), np.float32),
    "label": np.arange(4),
    "age": rng.random((4, 1), np.float32),
  }
  del batch["boxes"]
  mixer = data.mixup if name == "mixup" else data.cutmix
  mix = mixer(0.8, {"label": 4, "age": None}, entries=("image", "teacher_image"))
  mixed = mix(jax.random.key(1), batch)
  w = float(mixed["label"][0, 0])
  assert 0 < w < 1
  expected = w * batch["age"] + (1 - w) * np.roll(batch["age"], 1, 0)
  np.testing.assert_allclose(mixed["age"], expected, rtol=1e-6)
  for entry in ("image", "teacher_image"):
    values = np.asarray(batch[entry])
    partner = np.roll(values, 1, 0)
    if name == "mixup":
      np.testing.assert_allclose(mixed[entry], w * values + (1 - w) * partner, rtol=1e-5)
    else:
      pasted = np.asarray(mixed[entry]) == partner
      np.testing.assert_allclose(pasted.reshape(4, -1).mean(1), 1 - w, atol=1e-6)


def test_cutmix_pastes_label_maps(rng):
  batch = a_batch(rng)
  kinds = {"image": "image", "label": "label_map"}
  del batch["teacher_image"], batch["boxes"]
  mixed = data.cutmix(1.0, None, entries=kinds)(jax.random.key(3), batch)
  assert mixed["label"].dtype == np.uint8
  np.testing.assert_array_equal(np.asarray(mixed["label"]), np.asarray(mixed["image"])[..., 0])
  assert (np.asarray(mixed["label"]) != batch["label"]).any()
  with pytest.raises(ValueError, match=r"^entries: .*label_map"):
    data.mixup(1.0, None, entries=kinds)
  with pytest.raises(ValueError, match=r"^label: .*classes"):
    data.mixup(1.0, None)(
      jax.random.key(0), {"image": batch["image"], "label": np.zeros(ROWS, int)}
    )
