"""Digits, deep mutual learning (Zhang et al. 2018): students of one size teach one another.

python -m distill_jax --config=configs/digits_mutual.py --seeds=0,1,2

There is no teacher. The first student of the cohort is evaluated, exported and compared with the
baseline.

Measured on 2 CPU cores: 20 s. Test accuracy, 3 seeds: baseline 96.75 +- 0.43 %, in a cohort of two
96.47 +- 0.16 %: no gain for so small a network on this set.
"""

import dataclasses

from digits import Digits

from distill_jax import losses, objectives
from distill_jax.jobs.config import check
from distill_jax.models import cohort, member


@dataclasses.dataclass
class Mutual(Digits):
  """As `Digits`; the labels have weight 1, and the teacher's fields are not used.

  Attributes:
    students: number of students in the cohort.
    mutual_weight: weight of the divergence from the other students.
  """

  label_fraction: float = 1.0
  temperature: float = 1.0
  students: int = 2
  mutual_weight: float = 1.0

  def teacher(self):
    return None

  def recipe(self, variant):
    recipe = super().recipe(variant)
    return recipe._replace(
      train_model=cohort([self.student()] * self.students),
      export_fn=lambda variables: member(variables, 0),
    )

  def objective(self):
    hard = {
      f"hard{i}": (1.0, objectives.labels(output=f"{i}/logits")) for i in range(self.students)
    }
    mutual = objectives.mutual(losses.kl_divergence, self.students, temperature=self.temperature)
    return objectives.weighted(mutual=(self.mutual_weight, mutual), **hard)

  def validate(self) -> None:
    super().validate()
    check(self, "students", least=2)
    check(self, "mutual_weight", least=0)


def get_config():
  return Mutual()
