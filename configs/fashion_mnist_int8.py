"""Fashion-MNIST, a small vision transformer with int8 weights, distilled from a float teacher.

python -m distill_jax --config=configs/fashion_mnist_int8.py --seeds=0,1,2

Networks and training are those of fashion_mnist_vit.py; kd stays float. Needs the extra `quantize`.
The convolutional student is in fashion_mnist_int8_cnn.py.

- rounded: distilled in float, then rounded to int8;
- int8: distilled with the rounding that it will have (quantization-aware training).

Measured on 2 busy CPU cores: 7 minutes. Test accuracy in %, 3 seeds: kd 74.90 +- 0.67, rounded
74.93 +- 0.66, int8 74.95 +- 0.54: rounding costs a network of this size nothing. Compressed it
takes 103 kB on disk instead of 330, and on this CPU 1.2 times as long for 128 images.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from fashion_mnist_vit import NUM_HEADS, Transformers
from flax import nnx

from distill_jax.compression.quantize import fake_quantize, quantize
from distill_jax.jobs.recipes import Recipe
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vit import ViT
from distill_jax.types import Model, Variables

VARIANTS = ("kd", "rounded", "int8")
IMAGE = np.zeros((1, 28, 28, 1), np.float32)


def in_int8(recipe: Recipe, variant: str, make_module: Callable[[nnx.Rngs], nnx.Module]) -> Recipe:
  """Returns the recipe of one of `VARIANTS`.

  Args:
    recipe: that of the float student.
    variant: one of `VARIANTS`.
    make_module: `rngs -> nnx.Module`, the float student's network.
  """
  if variant == "kd":
    return recipe

  def int8_model(variables: Variables) -> Model:
    return from_nnx(quantize(make_module, variables, IMAGE))

  def int8_weights(variables):
    return int8_model(variables).variables

  # Only their shapes matter: the exported weights replace them.
  placeholder = recipe.student.init(jax.random.key(0), {"image": IMAGE})
  train_model = recipe.student if variant == "rounded" else from_nnx(fake_quantize(make_module))
  return recipe._replace(
    student=int8_model(placeholder), train_model=train_model, export_fn=int8_weights
  )


@dataclasses.dataclass
class Int8(Transformers):
  """As `Transformers`, with int8 students."""

  def variants(self):
    return VARIANTS

  def recipe(self, variant):
    return in_int8(super().recipe(variant), variant, self._module)

  def _module(self, rngs):
    sizes = (self.student_embed_dim, self.student_num_layers, NUM_HEADS)
    return ViT(1, 28, 10, *sizes, patch=7, rngs=rngs)


def get_config():
  return Int8()
