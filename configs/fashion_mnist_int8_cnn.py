"""Fashion-MNIST, a small convolutional network with int8 weights, distilled from a float teacher.

python -m distill_jax --config=configs/fashion_mnist_int8_cnn.py --seeds=0,1,2

Networks and training are those of fashion_mnist_10k.py; the variants are those of
fashion_mnist_int8.py. Needs the extra `quantize`.

Measured on 2 busy CPU cores: 5 minutes. Test accuracy in %, 3 seeds: teacher 89.08; baseline 82.12
+- 0.10, kd 82.21 +- 0.20, rounded 82.18 +- 0.17, int8 82.11 +- 0.15: rounding costs nothing, so
training with it gains nothing. Compressed it takes 25.5 kB on disk instead of 90.8, and on this CPU
1.5 times as long for an image, 1.2 times for 128.
"""

import dataclasses

from fashion_mnist_10k import FashionMnist10k
from fashion_mnist_int8 import VARIANTS, in_int8

from distill_jax.models.zoo.cnn import CNN


@dataclasses.dataclass
class Int8Convolutions(FashionMnist10k):
  """As `FashionMnist10k`, with int8 students."""

  def variants(self):
    return VARIANTS

  def recipe(self, variant):
    return in_int8(super().recipe(variant), variant, self._module)

  def _module(self, rngs):
    return CNN(1, self.student_widths, 10, rngs=rngs)


def get_config():
  return Int8Convolutions()
