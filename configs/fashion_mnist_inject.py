"""Fashion-MNIST, the student's convolutions start as those of its teacher.

python -m distill_jax --config=configs/fashion_mnist.py --stages=teacher --workdir=RUN
python -m distill_jax --config=configs/fashion_mnist_inject.py --config.teacher_folder=RUN/teacher --seeds=0,1,2

The student's three blocks have the widths of the first convolutions of the teacher's first three blocks; where they are
other ones, evenly spaced slices are taken (weight selection, Xu et al. 2024). The head starts at random: the teacher's
reads a layer that the student does not have. The student trained alone starts at random as a whole.

Not yet run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fashion_mnist import FashionMnist

from distill_jax.checkpoint import load_student
from distill_jax.compression.inject import inject, sliced
from distill_jax.compression.paths import matching
from distill_jax.config import ConfigError, Training
from distill_jax.types import Model, Variables

LAYERS = {r"^(params|state)/blocks/(\d)/": r"\1/blocks/\2/0/"}


@dataclasses.dataclass
class FrozenTraining(Training):
  """As `Training`.

  Attributes:
    frozen: parameters that stay as they start, a regular expression such as '^student/blocks/0/'; empty: none.
  """

  frozen: str = ""

  def optimizer(self) -> optax.GradientTransformation:
    if not self.frozen:
      return super().optimizer()
    return optax.chain(super().optimizer(), optax.freeze(lambda params: matching(params, self.frozen)))


@dataclasses.dataclass
class Injected(FashionMnist):
  """As `FashionMnist`, with a teacher that another run has trained.

  Attributes:
    teacher_folder: of the trained teacher, with the same `teacher_width`.
  """

  teacher_folder: str = ""
  student_training: FrozenTraining = dataclasses.field(
    default_factory=lambda: FrozenTraining(steps=3000, batch_size=128, learning_rate=5e-3, weight_decay=1e-3)
  )

  def teacher(self) -> Model:
    model = super().teacher()
    image = {"image": jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)}
    return model._replace(variables=load_student(self.teacher_folder, model, image))

  def learner(self) -> Model:
    student, teacher = self.student(), self.teacher().variables

    def init(key, batch):
      found, _ = inject(student.init(key, batch), teacher, LAYERS, fit=sliced)
      return Variables(*jax.tree.map(jnp.copy, tuple(found)))

    return student._replace(init=init)

  def validate(self) -> None:
    super().validate()
    if not self.teacher_folder:
      raise ConfigError(
        "teacher_folder: expected the folder of a trained teacher: --stages=teacher with configs/fashion_mnist.py "
        "leaves one"
      )


def get_config():
  return Injected()
