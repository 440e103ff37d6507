"""Digits, born-again networks (Furlanello et al. 2018): every student is as large as its teacher.

python -m distill_jax --config=configs/digits_born_again.py --seeds=0,1,2

Teacher and students are the same small convolutional network with different random weights at the
start. The first student learns from the teacher, each later one from the student before it. The
report compares the last one with the teacher and with the baseline. All generations stay in the
run's folder: student-SEED, student-SEED-gen2, ...

Measured on 2 CPU cores: 44 s. Test accuracy, 3 seeds: teacher 96.66 %, baseline 96.56 +- 0.43 %;
generations 1 to 3: 95.73 +- 0.32, 96.10 +- 0.28, 97.21 +- 1.69 %: no gain beyond the spread.
"""

import dataclasses

from digits import Digits

from distill_jax.jobs.config import Training
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN


@dataclasses.dataclass
class BornAgain(Digits):
  """As `Digits`; `teacher_width` and `student_widths` are not used.

  Attributes:
    widths: channels of the blocks of every network.
  """

  label_fraction: float = 1.0
  widths: tuple[int, ...] = (16, 32)
  temperature: float = 1.0
  hard_weight: float = 0.5
  generations: int = 3
  # With the same seed, the first student would start from its teacher's initial weights.
  teacher_seed: int = 1_000_000
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=400, batch_size=64, learning_rate=2e-3, weight_decay=1e-2
    )
  )

  def teacher(self):
    return self.student()

  def student(self):
    return from_nnx(lambda rngs: CNN(1, self.widths, 10, rngs=rngs))


def get_config():
  return BornAgain()
