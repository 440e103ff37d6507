"""Compares live and cached training on augmented real images; `-s` prints the differences."""

import optax
import pytest
from fitting import fit_with
from toys import largest_difference

from distill_jax import data, losses, objectives
from distill_jax.cache import Dense, write_cache
from distill_jax.data.sets import digits, tfds
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN

VIEWS, BATCH = 3, 64
OBJECTIVE = objectives.weighted(
  hard=(0.1, objectives.labels()),
  soft=(0.9, objectives.logits(losses.kl_divergence, temperature=4.0)),
)
AUGMENT = data.augmentation(data.shift_crop(2), data.flip(), seed=0)


def fashion_mnist():
  try:
    return tfds.load("fashion_mnist", splits=["train"])["train"].take(slice(0, 2048))
  except (OSError, ValueError) as error:
    pytest.skip(f"no Fashion-MNIST: {error}")


def network(source, *widths):
  image = source.arrays["image"]
  return from_nnx(lambda rngs: CNN(image.shape[-1], widths, source.classes, rngs=rngs))


def train(student, teacher, objective, source, steps, **settings):
  return fit_with(
    student,
    teacher,
    objective,
    optax.adam(1e-3),
    source,
    steps=steps,
    batch_size=BATCH,
    num_views=VIEWS,
    augment=AUGMENT,
    **settings,
  )


@pytest.mark.parametrize(
  "load",
  [
    pytest.param(fashion_mnist, marks=pytest.mark.nightly, id="fashion_mnist"),
    pytest.param(lambda: digits.load()["train"], marks=pytest.mark.slow, id="digits"),
  ],
)
def test_live_and_cached_training_end_alike(tmp_path, load):
  source = load()
  steps = 2 * VIEWS * (len(source) // BATCH)  # every view twice
  trained = train(
    network(source, 16, 32), None, objectives.weighted(hard=(1.0, objectives.labels())), source, 100
  )
  teacher = network(source, 16, 32)._replace(variables=trained.variables)
  student = network(source, 8, 16)
  live = train(student, teacher, OBJECTIVE, source, steps)
  found = {}
  for dtype in ("float32", "float16"):
    cached = write_cache(
      tmp_path / dtype,
      teacher,
      source,
      {"logits": Dense(dtype)},
      augment=AUGMENT,
      num_views=VIEWS,
      batch_size=4 * BATCH,
      progress=False,
    )
    found[dtype] = largest_difference(train(student, cached, OBJECTIVE, source, steps), live)
  other = largest_difference(train(student, teacher, OBJECTIVE, source, steps, seed=1), live)
  print(
    f"\n{source.name}: {steps} steps, {VIEWS} views; largest difference of a parameter:",
    found,
    "another seed:",
    other,
  )
  assert found["float32"] < 1e-3 and 0 < found["float16"] < 0.1 < other
