"""Fashion-MNIST, a vision transformer teaches a smaller one by token, attention or relations.

python -m distill_jax --config=configs/fashion_mnist_vit.py --seeds=0,1,2

As fashion_mnist_10k.py, with a teacher of 6 blocks and 96 channels, and students of 3 blocks and 48
channels. Patches are 7 x 7. Only deit has a distillation token.

- kd: labels and soft targets;
- deit: a distillation token, which learns the teacher's class (Touvron et al. 2021);
- attention: kd and every second layer's attention (MobileBERT's loss, TinyBERT's map);
- relations: kd and the relations of queries, keys and values of the last layers (MiniLMv2);
- afd: kd and attention that learns which layers match (Ji et al. 2021).

Measured on 2 CPU cores, next to another such job: 10 minutes. Test accuracy in %, 3 seeds: teacher
80.54; baseline 73.84 +- 0.91, kd 74.90 +- 0.67, deit 74.57 +- 0.21, attention 74.12 +- 0.62,
relations 74.68 +- 0.55, afd 74.24 +- 0.33.
"""

import dataclasses

from fashion_mnist_10k import FashionMnist10k

from distill_jax import losses, objectives
from distill_jax.jobs.config import Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.vit import ViT
from distill_jax.objectives import layer_map

PATCHES = 16
"""Patches of an image. Only their tokens are compared: the others differ between the networks."""
NUM_HEADS = 4


@dataclasses.dataclass
class Transformers(FashionMnist10k):
  """As `FashionMnist10k`; the fields of its networks are not used.

  Attributes:
    teacher_embed_dim, teacher_num_layers, student_embed_dim, student_num_layers: sizes of the
      networks; both have 4 heads.
    attention_weight, relation_weight, afd_weight: weights of the variants' terms; those of labels
      and soft targets sum to 1.
  """

  teacher_embed_dim: int = 96
  teacher_num_layers: int = 6
  student_embed_dim: int = 48
  student_num_layers: int = 3
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
    return self._vit(self.teacher_embed_dim, self.teacher_num_layers)

  def student(self):
    return self._vit(self.student_embed_dim, self.student_num_layers)

  def variants(self):
    return ("kd", "deit", "attention", "relations", "afd")

  def recipe(self, variant):
    recipe = super().recipe(variant)
    if variant != "deit":
      return recipe
    sizes = (self.student_embed_dim, self.student_num_layers)
    return recipe._replace(student=self._vit(*sizes, distilled=True))

  def variant_objective(self, variant, trained_teacher=None):
    pairs = layer_map(self.student_num_layers, self.teacher_num_layers)
    if variant == "deit":
      token = objectives.features("distillation", "logits", losses.hard_distillation, project=False)
      return objectives.weighted(hard=(0.5, objectives.labels()), soft=(0.5, token))
    terms = {
      "attention": lambda: (self.attention_weight, objectives.attention(pairs, last=PATCHES)),
      "relations": lambda: (
        self.relation_weight,
        objectives.relations(pairs[-1:], relation_heads=4, last=PATCHES),
      ),
      "afd": lambda: (
        self.afd_weight,
        objectives.layer_attention(
          tuple(f"map{k}" for k in range(1, self.student_num_layers + 1)),
          tuple(f"map{k}" for k in range(1, self.teacher_num_layers + 1)),
        ),
      ),
    }
    extra = {variant: terms[variant]()} if variant in terms else {}
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
    for role in ("teacher", "student"):
      check(self, f"{role}_embed_dim", least=1)
      check(self, f"{role}_num_layers", least=1)
    for name in ("attention_weight", "relation_weight", "afd_weight"):
      check(self, name, least=0)

  def _vit(self, embed_dim: int, num_layers: int, distilled: bool = False):
    sizes = (embed_dim, num_layers, NUM_HEADS)
    return from_nnx(lambda rngs: ViT(1, 28, 10, *sizes, patch=7, distilled=distilled, rngs=rngs))


def get_config():
  return Transformers()
