"""Fashion-MNIST, FitNets' two stages (Romero et al. 2015): first a teacher's map, then logits.

python -m distill_jax --config=configs/fashion_mnist_hint.py --seeds=0,1,2

Stage 1 is only the hint, through a learned 1x1 convolution; stage 2 is soft targets and labels, as
in fashion_mnist.py. Both are one run: the weights are schedules of the step, and the optimizer's
state continues.

Measured on 2 CPU cores with other work: 35 minutes. Accuracy on the validation split, 3 seeds:
baseline 90.68 +- 0.13 %, distilled 89.20 +- 0.31 %: no better than fashion_mnist.py without the
hint.
"""

import dataclasses

import optax
from fashion_mnist import FashionMnist

from distill_jax import losses, objectives
from distill_jax.jobs.config import ConfigError


@dataclasses.dataclass
class Hint(FashionMnist):
  """As `FashionMnist`.

  Attributes:
    hint_steps: number of steps of the first stage.
    student_layer, teacher_layer: names of the two maps; the student's is resized to the teacher's.
  """

  hint_steps: int = 750
  student_layer: str = "block2"
  teacher_layer: str = "block2"

  def objective(self):
    def stages(first: float, second: float) -> optax.Schedule:
      parts = [optax.constant_schedule(first), optax.constant_schedule(second)]
      return optax.join_schedules(parts, [self.hint_steps])

    hint = objectives.features(self.student_layer, self.teacher_layer, losses.hint)
    soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
    return objectives.weighted(
      hint=(stages(1.0, 0.0), hint),
      hard=(stages(0.0, self.hard_weight), objectives.labels()),
      soft=(stages(0.0, 1 - self.hard_weight), soft),
    )

  def validate(self) -> None:
    super().validate()
    if not 0 < self.hint_steps < self.student_training.steps:
      raise ConfigError(
        f"hint_steps: expected 1 to {self.student_training.steps - 1}, got {self.hint_steps}"
      )


def get_config():
  return Hint()
