"""A segmentation network of one's own, of stride 4, learns from labels and from a teacher."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import cache, data, losses, objectives
from distill_jax.distributed import sharding
from distill_jax.train import RunOptions, StepOptions, fit

pytestmark = pytest.mark.integration
ROWS, SIDE, CLASSES, IGNORED = 16, 8, 3, 255
AUGMENT = data.augmentation(
  data.flip(), data.shift_crop(1), seed=0, entries={"image": "image", "label": "label_map"}
)
OBJECTIVE = objectives.weighted(
  hard=(0.5, objectives.labels(ignore_label=IGNORED, class_weights=[1, 2, 3], resize=True)),
  soft=(
    0.5,
    objectives.logits(
      losses.kl_divergence,
      temperature=2.0,
      ignore_label=IGNORED,
      class_weights=[1, 2, 3],
      resize=True,
    ),
  ),
)


class Network(nnx.Module):
  """Logits [B, H / stride, W / stride, classes] of images [B, H, W, 1]."""

  def __init__(self, stride, rngs):
    window = (stride, stride)
    self.stem = nnx.Conv(1, 4, window, window, padding="VALID", rngs=rngs)
    self.head = nnx.Conv(4, CLASSES, (1, 1), rngs=rngs)

  def __call__(self, image):
    return self.head(nnx.relu(self.stem(image)))


@pytest.fixture(scope="module")
def source():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(ROWS, SIDE, SIDE, 1)).astype(np.float32)
  label = rng.integers(0, CLASSES, (ROWS, SIDE, SIDE))
  for i in range(ROWS):  # Microbatches and devices differ in their numbers of pixels.
    label[i, : i % (SIDE + 1)] = IGNORED
  return data.Source({"image": image, "label": label}, classes=CLASSES, ignore_label=IGNORED)


@pytest.fixture(scope="module")
def teacher():
  return Network(2, nnx.Rngs(1))


def train(teacher, source, devices=1, microbatches=1):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  result = fit(
    Network(4, nnx.Rngs(0)),
    teacher,
    OBJECTIVE,
    optax.sgd(1.0),
    source,
    steps=3,
    batch_size=8,
    step=StepOptions(augment=AUGMENT, microbatches=microbatches),
    run=RunOptions(mesh=mesh, num_views=2, progress=False),
  )
  return jax.tree.leaves(result.state.params["student"])


@pytest.fixture(scope="module")
def live(teacher, source):
  return train(teacher, source)


def assert_equal_weights(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_cache_of_augmented_views_gives_the_weights_of_the_live_teacher(
  tmp_path, teacher, source, live, capsys
):
  stored = cache.write_cache(
    tmp_path,
    teacher,
    source,
    {"logits": cache.Dense("float32")},
    augment=AUGMENT,
    num_views=2,
    batch_size=8,
  )
  num_bytes = 2 * (SIDE // 2) ** 2 * CLASSES * 4
  assert f"(logits {num_bytes:,})" in capsys.readouterr().out
  assert_equal_weights(live, train(stored, source))


@pytest.mark.parametrize(("devices", "microbatches"), [(8, 1), (1, 2)])
def test_denominators_are_those_of_the_whole_batch(teacher, source, live, devices, microbatches):
  assert_equal_weights(live, train(teacher, source, devices, microbatches))


class Coarse(nnx.Module):
  """The logits of a network on a smaller grid, and back."""

  def __init__(self, network, size):
    self.network = network
    self.size = size

  def __call__(self, image):
    logits = self.network(image)
    coarse = losses.resize_logits(logits, self.size)
    return losses.resize_logits(coarse, logits.shape[1:-1])


def test_a_cache_of_a_reduced_size_gives_the_weights_of_such_a_teacher(
  tmp_path, teacher, source, live
):
  codecs = {"logits": cache.Dense("float32", size=(2, 2))}
  options = {"augment": AUGMENT, "num_views": 2, "batch_size": 8, "progress": False}
  coarse = train(cache.write_cache(tmp_path, teacher, source, codecs, **options), source)
  assert_equal_weights(train(Coarse(teacher, (2, 2)), source), coarse)
  assert max(abs(x - y).max() for x, y in zip(live, coarse, strict=True)) > 1e-3
