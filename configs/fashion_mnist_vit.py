"""Fashion-MNIST, a vision transformer teaches a smaller one: by a token, attention, relations, or layers it chooses.

python -m distill_jax --config=configs/fashion_mnist_vit.py --seeds=0,1,2

As fashion_mnist_10k.py, with a teacher of 6 blocks, 96 wide, and students of 3, 48 wide. Patches are 7 x 7. The student
alone and the others have no distillation token.

- kd: labels and soft targets;
- deit: a distillation token, which learns the teacher's class (Touvron et al. 2021);
- attention: beside kd, every second layer's attention (MobileBERT's loss, TinyBERT's map);
- relations: beside kd, queries, keys and values of the last layers (MiniLMv2);
- afd: beside kd, attention that learns which layer follows which (Ji et al. 2021).

Measured on 2 CPU cores, beside another such job: 10 minutes. Test accuracy in %, 3 seeds: teacher 80.54; student
alone 73.84 +- 0.91, kd 74.90 +- 0.67, deit 74.57 +- 0.21, attention 74.12 +- 0.62, relations 74.68 +- 0.55,
afd 74.24 +- 0.33.
"""

import dataclasses

from fashion_mnist_10k import FashionMnist10k

from distill_jax import losses, objectives
from distill_jax.jobs.config import Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vit import ViT
from distill_jax.objectives import layer_map

PATCHES = 16  # of an image; the student's other tokens are not the teacher's


@dataclasses.dataclass
class Transformers(FashionMnist10k):
  """As `FashionMnist10k`; the fields of its networks are not used.

  Attributes:
    teacher_vit_width, teacher_depth, student_width, student_depth: of the networks; heads are 24 and 12 wide.
    attention_weight, relation_weight, afd_weight: beside the labels and soft targets, whose weights sum to 1.
  """

  teacher_vit_width: int = 96
  teacher_depth: int = 6
  student_width: int = 48
  student_depth: int = 3
  attention_weight: float = 0.25
  relation_weight: float = 0.25
  afd_weight: float = 50.0
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=1000, batch_size=128, learning_rate=1e-3, weight_decay=5e-2, warmup_steps=100
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=300, batch_size=128, learning_rate=2e-3, weight_decay=5e-2, warmup_steps=40
    )
  )

  def teacher(self):
    return self._vit(self.teacher_vit_width, self.teacher_depth)

  def student(self):
    return self._vit(self.student_width, self.student_depth)

  def variants(self):
    return ("kd", "deit", "attention", "relations", "afd")

  def recipe(self, variant):
    made = super().recipe(variant)
    if variant != "deit":
      return made
    return made._replace(student=self._vit(self.student_width, self.student_depth, distilled=True))

  def variant_objective(self, variant, trained_teacher=None):
    pairs = layer_map(self.student_depth, self.teacher_depth)
    if variant == "deit":
      own = objectives.features("distillation", "logits", losses.hard_distillation, project=False)
      return objectives.weighted(hard=(0.5, objectives.labels()), soft=(0.5, own))
    beside = {
      "attention": lambda: (self.attention_weight, objectives.attention(pairs, last=PATCHES)),
      "relations": lambda: (
        self.relation_weight,
        objectives.relations(pairs[-1:], relation_heads=4, last=PATCHES),
      ),
      "afd": lambda: (
        self.afd_weight,
        objectives.layer_attention(
          tuple(f"map{k}" for k in range(1, self.student_depth + 1)),
          tuple(f"map{k}" for k in range(1, self.teacher_depth + 1)),
        ),
      ),
    }
    more = {variant: beside[variant]()} if variant in beside else {}
    return objectives.weighted(
      hard=(self.hard_weight, objectives.labels()),
      soft=(
        1 - self.hard_weight,
        objectives.logits(losses.kl_divergence, temperature=self.temperature),
      ),
      **more,
    )

  def validate(self) -> None:
    super().validate()
    for name in ("teacher_vit_width", "teacher_depth", "student_width", "student_depth"):
      check(self, name, least=1)
    for name in ("attention_weight", "relation_weight", "afd_weight"):
      check(self, name, least=0)

  def _vit(self, width: int, depth: int, distilled: bool = False):
    return from_nnx(
      lambda rngs: ViT(1, 28, 10, width, depth, 4, patch=7, distilled=distilled, rngs=rngs)
    )


def get_config():
  return Transformers()
