"""Fashion-MNIST with few labels: the teacher knows them all, the student a share; and a class it never sees.

python -m distill_jax --config=configs/fashion_mnist_few_labels.py --seeds=0,1,2 --config.label_fraction=0.01
python -m distill_jax --config=configs/fashion_mnist_few_labels.py --seeds=0,1,2 --config.label_fraction=0.1
python -m distill_jax --config=configs/fashion_mnist_few_labels.py --seeds=0,1,2 --config.label_fraction=1

Give each a --workdir of its own. The baseline has the labels alone; the distilled student also learns from the
teacher's opinion of the unlabelled images.

Hinton et al. 2015, section 3: a student that is distilled on a transfer set without one class still knows it,
once its bias for that class is raised. --config.left_out=5 leaves the sandals out; the correction is chosen on the
validation split.

python -m distill_jax --config=configs/fashion_mnist_few_labels.py --seeds=0,1,2 --config.left_out=5
"""

import dataclasses

from fashion_mnist import FashionMnist

from distill_jax import data
from distill_jax.config import Training, check


@dataclasses.dataclass
class FewLabels(FashionMnist):
  """As `FashionMnist`, with shorter training.

  Attributes:
    left_out: a class that the student and the baseline never see; -1: none.
  """

  label_fraction: float = 0.1
  left_out: int = -1
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=1500, batch_size=128, learning_rate=5e-3, weight_decay=1e-3)
  )

  def student_train(self, train):
    if self.left_out >= 0:
      train = data.leave_out_classes(train, [self.left_out])
    return data.label_fraction(train, self.label_fraction)

  def validate(self) -> None:
    super().validate()
    check(self, "left_out", least=-1, most=9)


def get_config():
  return FewLabels()
