"""Times sliding windows next to the network on the whole image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import Ratio, compare

from distill_jax.models import from_nnx, sliding_window
from distill_jax.models.zoo.unet import UNet
from distill_jax.types import Model


class Slices(NamedTuple):
  """A network and images [B, H, W, 1] whose sides are multiples of the window's.

  Attributes:
    model: the network.
    image: random images.
    window: side of a window.
  """

  model: Model
  image: jax.Array
  window: int


def slices(quick: bool = False) -> Slices:
  """Returns a U-Net of widths 8, 16 and 32, eight images of 192 x 144 and windows of 48 x 48."""
  widths, shape, window = (
    ((2, 2), (1, 8, 4, 1), 4) if quick else ((8, 16, 32), (8, 192, 144, 1), 48)
  )
  image = np.random.default_rng(0).random(shape, np.float32)
  model = from_nnx(lambda rngs: UNet(1, widths, 3, rngs=rngs))
  return Slices(model, jnp.asarray(image), window)


def windows_to_whole(problem: Slices, pairs: int) -> Ratio:
  """Times windows that do not overlap / the whole images: both compute the same pixels."""
  model, image, window = problem
  variables = jax.jit(model.init)(jax.random.key(0), {})
  windows = sliding_window(model, (window, window), overlap=0)

  def runner(model):
    forward = jax.jit(
      lambda variables, image: model.apply(*variables, {"image": image}, train=False, key=None)[0][
        "logits"
      ]
    )
    return lambda calls: [forward(variables, image) for _ in range(calls)][-1]

  return compare(runner(windows), runner(model), pairs=pairs, calls=1)
