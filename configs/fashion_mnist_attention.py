"""Fashion-MNIST, a small convolutional network learns a VGG-11's attention, features and weights.

python -m distill_jax --config=configs/fashion_mnist_attention.py --seeds=0,1,2

All students are as in fashion_mnist_10k.py. The variants add terms to the labels and soft targets:

- at: attention transfer (Zagoruyko & Komodakis 2017) on the first two blocks, whose maps have one
  size;
- afd: attention that learns which of the teacher's five blocks each of the student's three matches
  (Ji et al. 2021);
- aligned: the kernels of the three blocks, as those of the first convolutions of the teacher's
  first three;
- at.afd.aligned: all of them.

Transformers: fashion_mnist_vit.py.

Measured on 2 CPU cores, next to another such job: 10 minutes. Test accuracy in %, 3 seeds: teacher
89.08; baseline 82.12 +- 0.10, kd 82.21 +- 0.20, at 81.91 +- 0.22, afd 80.77 +- 0.41, aligned 82.13
+- 0.25, all 81.00 +- 0.51. (AFD pairs blocks of different depth here, as in
fashion_mnist_methods.py.)
"""

import dataclasses

from fashion_mnist_10k import FashionMnist10k

from distill_jax import losses, objectives
from distill_jax.jobs.config import check
from distill_jax.models import with_weights

KERNELS = r"^blocks/\d/(0/)?conv/kernel$"


@dataclasses.dataclass
class Attentive(FashionMnist10k):
  """As `FashionMnist10k`.

  Attributes:
    at_weight, afd_weight, alignment_weight: weights of the variants' terms; those of labels and
      soft targets sum to 1.
  """

  at_weight: float = 250.0
  afd_weight: float = 50.0
  alignment_weight: float = 1.0

  def teacher(self):
    return with_weights(super().teacher(), KERNELS)

  def student(self):
    return with_weights(super().student(), KERNELS)

  def variants(self):
    return ("kd", "at", "afd", "aligned", "at.afd.aligned")

  def variant_objective(self, variant, trained_teacher=None):
    terms = {
      "at": lambda: {
        f"at{k}": (
          self.at_weight,
          objectives.features(f"block{k}", f"block{k}", losses.attention_transfer, project=False),
        )
        for k in (1, 2)
      },
      "afd": lambda: {
        "afd": (
          self.afd_weight,
          objectives.layer_attention(
            ("block1", "block2", "block3"), tuple(f"block{k}" for k in range(1, 6))
          ),
        )
      },
      "aligned": lambda: {
        "aligned": (
          self.alignment_weight,
          objectives.weights(layers={r"^(blocks/\d/)": r"\g<1>0/"}),
        )
      },
    }
    extra: dict = {}
    for name in variant.split("."):
      extra |= terms[name]() if name in terms else {}
    return objectives.weighted(
      hard=(self.hard_weight, objectives.labels()),
      soft=(
        1 - self.hard_weight,
        objectives.logits(losses.kl_divergence, temperature=self.temperature),
      ),
      **extra,
    )

  def validate(self) -> None:
    super().validate()
    for name in ("at_weight", "afd_weight", "alignment_weight"):
      check(self, name, least=0)


def get_config():
  return Attentive()
