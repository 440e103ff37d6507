"""Fashion-MNIST, the student's convolutions start as those of its teacher.

python -m distill_jax --config=configs/fashion_mnist_inject.py --seeds=0,1,2

All students are as in fashion_mnist_10k.py; kd and the student alone start at random. The student's three blocks have
the widths of the first convolutions of the teacher's first three blocks; where they are other ones, evenly spaced
slices are taken (weight selection, Xu et al. 2024). The head starts at random: the teacher's reads a layer that the
student does not have.

- injected: the three convolutions and their norms;
- injected.one: the first block alone;
- injected.frozen: the first block, whose parameters stay as they are;
- injected.alone: the three, and the labels teach it, not the teacher.

Measured on 2 CPU cores, beside another such job: 6 minutes. Test accuracy in %, 3 seeds: teacher 89.08; student
alone 82.12 +- 0.10, kd 82.21 +- 0.20, injected 83.19 +- 0.08, one 82.53 +- 0.32, frozen 82.40 +- 0.27, alone
82.91 +- 0.12.
"""

import dataclasses
import functools

import optax
from fashion_mnist_10k import FashionMnist10k

from distill_jax.compression.initialization.provenance import Provenance
from distill_jax.compression.initialization.teacher import inject, sliced
from distill_jax.jobs.config import Training
from distill_jax.trees import matching
from distill_jax.types import Variables

LAYERS = {r"^(params|state)/blocks/(\d)/": r"\1/blocks/\2/0/"}
FIRST = {r"^(params|state)/blocks/(0)/": r"\1/blocks/\2/0/"}


@dataclasses.dataclass
class FrozenTraining(Training):
  """As `Training`.

  Attributes:
    frozen: parameters that stay as they start, a regular expression; empty: none.
  """

  frozen: str = ""

  def optimizer(self) -> optax.GradientTransformation:
    if not self.frozen:
      return super().optimizer()
    return optax.chain(
      super().optimizer(), optax.freeze(lambda params: matching(params, self.frozen))
    )


@dataclasses.dataclass
class Injected(FashionMnist10k):
  """As `FashionMnist10k`.

  Attributes:
    frozen_training: of the student whose first block stays.
  """

  frozen_training: FrozenTraining = dataclasses.field(
    default_factory=lambda: FrozenTraining(
      steps=300, batch_size=128, learning_rate=5e-3, weight_decay=1e-3, frozen="^student/blocks/0/"
    )
  )

  def variants(self):
    return ("kd", "injected", "injected.one", "injected.frozen", "injected.alone")

  def recipe(self, variant):
    made, first = super().recipe(variant), functools.partial(inject_convolutions, layers=FIRST)
    match variant:
      case "injected" | "injected.alone":
        return made._replace(init_from_teacher=inject_convolutions)
      case "injected.one":
        return made._replace(init_from_teacher=first)
      case "injected.frozen":
        return made._replace(init_from_teacher=first, training=self.frozen_training)
    return made

  def variant_objective(self, variant, trained_teacher=None):
    return self.baseline_objective() if variant == "injected.alone" else self.objective()


def inject_convolutions(
  own: Variables, trained_teacher, layers=LAYERS
) -> tuple[Variables, Provenance]:
  """The student's first weights, with the teacher's convolutions; and where each came from."""
  return inject(own, trained_teacher.variables, layers, fit=sliced)


def get_config():
  return Injected()
