"""Fashion-MNIST, 10,000 images and 300 steps for the student: the base of the compression jobs.

python -m distill_jax --config=configs/fashion_mnist_10k.py --seeds=0,1,2

The jobs on pruning, initialization from the teacher and attention share it. The teacher sees all
images. The soft targets have temperature 1 and three times the labels' weight, the best of the
plain divergences in fashion_mnist_methods.py. The last weights are exported: no validation score
chooses them.
"""

import dataclasses

from fashion_mnist import FashionMnist

from distill_jax import data
from distill_jax.jobs.config import Training, check


@dataclasses.dataclass
class FashionMnist10k(FashionMnist):
  """As `FashionMnist`.

  Attributes:
    images: number of training images that the students see.
  """

  images: int = 10_000
  temperature: float = 1.0
  hard_weight: float = 0.25
  eval_every: int = 1000
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=800, batch_size=128, learning_rate=2e-3, weight_decay=1e-2
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=300, batch_size=128, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def student_train(self, train):
    return data.label_fraction(train.take(slice(self.images)), self.label_fraction)

  def variants(self):
    return ("kd",)

  def validate(self) -> None:
    super().validate()
    check(self, "images", least=1)


def get_config():
  return FashionMnist10k()
