"""Defines what is distilled: a small CNN from a VGG, an MLP and a U-Net from wider ones."""

from collections.abc import Callable
from typing import NamedTuple

import handwritten
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import data, losses, objectives
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.models.zoo.unet import UNet
from distill_jax.models.zoo.vgg import VGG
from distill_jax.types import Model

CLASSES = 10
SUPERVISED = objectives.weighted(hard=(1.0, objectives.labels()))
DISTILLED = objectives.weighted(
  hard=(handwritten.HARD, objectives.labels()),
  soft=(
    1 - handwritten.HARD,
    objectives.logits(losses.kl_divergence, temperature=handwritten.TEMPERATURE),
  ),
)


class Problem(NamedTuple):
  """Two networks and random images.

  Attributes:
    student, teacher: the networks as Models.
    by_hand: the networks (student, teacher) as functions in `handwritten`; () without such ones.
    source: random images.
    batch_size: rows per step.
    calls: steps in one sample of the clock: some tens of milliseconds.
  """

  student: Model
  teacher: Model
  by_hand: tuple[Callable, ...]
  source: data.Source
  batch_size: int
  calls: int

  @property
  def optimizer(self) -> optax.GradientTransformation:
    return optax.adam(1e-3)

  def batch(self) -> dict[str, np.ndarray]:
    """Returns the first training batch, on the host."""
    return next(data.batches(self.source, self.batch_size, seed=0))


def cnn(quick: bool = False) -> Problem:
  """Returns CNN (16, 32, 64) from VGG-11 of a quarter's width, 28x28x1, batch 64."""
  widths, width, size = ((2, 2), 0.05, 8) if quick else ((16, 32, 64), 0.25, 28)
  return Problem(
    from_nnx(lambda rngs: CNN(1, widths, CLASSES, rngs=rngs)),
    with_weights(from_nnx(lambda rngs: VGG(1, 11, CLASSES, width=width, rngs=rngs))),
    (handwritten.cnn, handwritten.vgg),
    _images(size),
    batch_size=4 if quick else 64,
    calls=4,
  )


def mlp(quick: bool = False) -> Problem:
  """Returns MLP (64,) from MLP (256, 256), 28x28x1, batch 128: it shows a step's overhead."""
  widths, size = ((4,), 4) if quick else ((256, 256), 28)
  return Problem(
    from_nnx(lambda rngs: MLP(size**2, (4 if quick else 64,), CLASSES, rngs=rngs)),
    with_weights(from_nnx(lambda rngs: MLP(size**2, widths, CLASSES, rngs=rngs))),
    (handwritten.mlp, handwritten.mlp),
    _images(size),
    batch_size=4 if quick else 128,
    calls=20,
  )


def unet(quick: bool = False) -> Problem:
  """Returns U-Net (16, 32, 64) from U-Net (32, 64, 128), 64x64x1, 3 classes per pixel, batch 8."""
  widths, size = ((2, 2), 8) if quick else ((16, 32, 64), 64)
  wider = tuple(2 * width for width in widths)
  images = _images(size, rows=8 if quick else 256)
  label = np.random.default_rng(2).integers(0, 4, (len(images), size, size))
  arrays = {**images.arrays, "label": np.where(label == 3, 255, label)}
  return Problem(
    from_nnx(lambda rngs: UNet(1, widths, 3, rngs=rngs)),
    with_weights(from_nnx(lambda rngs: UNet(1, wider, 3, rngs=rngs))),
    (),
    data.Source(arrays, 3, ignore_label=255, name="random maps"),
    batch_size=4 if quick else 8,
    calls=1,
  )


def with_weights(model: Model) -> Model:
  """Initializes as He et al. in NumPy: compiling `init` takes longer than a quick run."""
  rng = np.random.default_rng(1)

  def sample(x):
    scale = np.sqrt(2 / np.prod(x.shape[:-1]))
    return jnp.asarray(
      scale * rng.normal(size=x.shape) if len(x.shape) > 1 else np.ones(x.shape), x.dtype
    )

  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), {}))
  return model._replace(variables=jax.tree.map(sample, shapes))


def _images(size: int, rows: int = 2048) -> data.Source:
  rng = np.random.default_rng(0)
  arrays: dict[str, np.ndarray] = {
    "id": np.arange(rows),
    "image": rng.random((rows, size, size, 1), np.float32),
    "label": rng.integers(0, CLASSES, rows),
  }
  return data.Source(arrays, CLASSES, name="random images")
