"""Fashion-MNIST, a small vision transformer that computes with int8 weights, distilled from a float teacher.

python -m distill_jax --config=configs/fashion_mnist_int8.py --seeds=0,1,2

Networks and training are those of fashion_mnist_vit.py; kd stays float. Needs the extra `quantize`. The
convolutional student is in fashion_mnist_int8_cnn.py.

- rounded: distilled in float, and rounded to int8 afterward;
- int8: distilled with the rounding that it will have (quantization-aware).

Measured on 2 busy CPU cores: 7 minutes. Test accuracy in %, 3 seeds: kd 74.90 +- 0.67, rounded 74.93 +- 0.66, int8
74.95 +- 0.54: a network of this size loses nothing when it is rounded. Compressed it takes 103 kB on disk in the place
of 330, and on this CPU 1.2 times as long for 128 images.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from fashion_mnist_vit import Transformers
from flax import nnx

from distill_jax.compression.quantize import fake_quantized, quantized
from distill_jax.jobs.recipes import Recipe
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vit import ViT
from distill_jax.types import Model, Variables

VARIANTS = ("kd", "rounded", "int8")
IMAGE = np.zeros((1, 28, 28, 1), np.float32)


def in_int8(recipe: Recipe, variant: str, make_module: Callable[[nnx.Rngs], nnx.Module]) -> Recipe:
  """The recipe of one of `VARIANTS`, from that of the student in float, whose network `make_module` makes."""
  if variant == "kd":
    return recipe

  def served(variables: Variables) -> Model:
    return from_nnx(quantized(make_module, variables, IMAGE))

  def weights(variables):
    return served(variables).variables

  any_weights = recipe.student.init(jax.random.key(0), {"image": IMAGE})
  learner = recipe.student if variant == "rounded" else from_nnx(fake_quantized(make_module))
  return recipe._replace(student=served(any_weights), train_model=learner, export_fn=weights)


@dataclasses.dataclass
class Int8(Transformers):
  """As `Transformers`, with students that are served in int8."""

  def variants(self):
    return VARIANTS

  def recipe(self, variant):
    return in_int8(super().recipe(variant), variant, self._module)

  def _module(self, rngs):
    return ViT(1, 28, 10, self.student_width, self.student_depth, 4, patch=7, rngs=rngs)


def get_config():
  return Int8()
