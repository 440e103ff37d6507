"""Digits, distilled on a transfer set: images that the teacher never saw, without labels.

python -m distill_jax --config=configs/digits_transfer.py --seeds=0,1,2

The teacher learns from one part of the training images with their labels. The student sees only the
other part, and learns only from the teacher's soft targets. The baseline has the teacher's images
and labels, since it cannot learn without labels. Weights are chosen on labeled validation images.

Measured on 2 CPU cores: 50 s. Test accuracy, 3 seeds: teacher 94.71 % (it has half of the images),
baseline with the teacher's images 95.73 +- 0.43 %, distilled on the other half without a label
94.71 +- 1.21 %: as good as its teacher, which is worse than the baseline.
"""

import dataclasses

from digits import Digits

from distill_jax import data, losses, objectives
from distill_jax.jobs.config import check


@dataclasses.dataclass
class Transfer(Digits):
  """As `Digits`; `hard_weight` and `label_fraction` are not used.

  Attributes:
    transfer_fraction: fraction of the training images in the transfer set.
  """

  transfer_fraction: float = 0.5

  def teacher_train(self, train):
    return data.split(train, self.transfer_fraction, seed=1)[0]

  def student_train(self, train):
    return data.unlabeled(data.split(train, self.transfer_fraction, seed=1)[1])

  def baseline_train(self, train):
    return self.teacher_train(train)

  def objective(self):
    soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
    return objectives.weighted(soft=(1.0, soft))

  def validate(self) -> None:
    super().validate()
    check(self, "transfer_fraction", least=0.01, most=0.99)


def get_config():
  return Transfer()
