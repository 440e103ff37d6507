"""Fashion-MNIST in stages: by way of an assistant, features before logits, and everything together.

python -m distill_jax --config=configs/fashion_mnist_assistant.py --seeds=0,1,2

All students are as in fashion_mnist_10k.py.

- assistant: a network of a size between teacher and student, distilled (Mirzadeh et al. 2020);
- via.assistant: the student, taught by the assistant;
- hints: only the student's middle map is trained, on the teacher's (FitNets' first stage, Romero et
  al. 2015);
- hints.then.kd: starts from `hints` and is distilled (the second stage);
- together: convolutions initialized from the teacher, attention transfer and soft targets at once;
- together.pruned: that student, half of whose channels are pruned while it is distilled further;
- together.tuned: that smaller one, fine-tuned with the labels and the teacher.

Measured on 2 CPU cores, next to another such job: 8 minutes. Test accuracy in %, 3 seeds: teacher
89.08; baseline 82.12 +- 0.10, kd 82.21 +- 0.20, assistant 86.07 +- 0.34 (98,682 parameters),
via.assistant 81.99 +- 0.10, hints.then.kd 82.60 +- 0.51 (the head of `hints` is not trained),
together 83.07 +- 0.23, pruned 76.24 +- 0.60 (6,274), tuned 77.94 +- 0.22.
"""

import dataclasses

from fashion_mnist_10k import FashionMnist10k
from fashion_mnist_prune import PrunedTraining, remove_channels
from fashion_mnist_teacher_init import init_convolutions

from distill_jax import losses, objectives
from distill_jax.jobs.config import Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN


@dataclasses.dataclass
class Staged(FashionMnist10k):
  """As `FashionMnist10k`.

  Attributes:
    assistant_widths: channels of the assistant's blocks.
    hint_training, pruned_training, tuning: training of `hints`, `together.pruned` and
      `together.tuned`.
    attention_weight: weight of attention transfer; those of labels and soft targets sum to 1.
  """

  assistant_widths: tuple[int, ...] = (16, 32, 64, 128)
  hint_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=150, batch_size=128, learning_rate=5e-3, weight_decay=1e-3
    )
  )
  pruned_training: PrunedTraining = dataclasses.field(
    default_factory=lambda: PrunedTraining(
      steps=150, learning_rate=2.5e-3, begin=20, end=100, every=20
    )
  )
  tuning: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=150, batch_size=128, learning_rate=1e-3, weight_decay=1e-3
    )
  )
  attention_weight: float = 250.0

  def variants(self):
    return (
      "kd",
      "assistant",
      "via.assistant",
      "hints",
      "hints.then.kd",
      "together",
      "together.pruned",
      "together.tuned",
    )

  def recipe(self, variant):
    recipe = super().recipe(variant)
    match variant:
      case "assistant":
        return recipe._replace(
          student=from_nnx(lambda rngs: CNN(1, self.assistant_widths, 10, rngs=rngs))
        )
      case "via.assistant":
        return recipe._replace(teacher="assistant")
      case "hints":
        return recipe._replace(training=self.hint_training, export_last=True)
      case "hints.then.kd":
        return recipe._replace(init_from="hints")
      case "together":
        return recipe._replace(init_from_teacher=init_convolutions)
      case "together.pruned":
        return recipe._replace(
          init_from="together",
          training=self.pruned_training,
          export_fn=remove_channels,
          allow_shrunk=True,
          export_last=True,
        )
      case "together.tuned":
        return recipe._replace(init_from="together.pruned", training=self.tuning, allow_shrunk=True)
    return recipe

  def variant_objective(self, variant, trained_teacher=None):
    if variant == "hints":
      return objectives.weighted(hint=(1.0, objectives.features("block2", "block2", losses.hint)))
    if not variant.startswith("together"):
      return self.objective()
    attention = [
      objectives.features(f"block{k}", f"block{k}", losses.attention_transfer, project=False)
      for k in (1, 2)
    ]
    return objectives.weighted(
      hard=(self.hard_weight, objectives.labels()),
      soft=(
        1 - self.hard_weight,
        objectives.logits(losses.kl_divergence, temperature=self.temperature),
      ),
      **{f"attention{k}": (self.attention_weight, term) for k, term in enumerate(attention, 1)},
    )

  def validate(self) -> None:
    super().validate()
    check(self, "attention_weight", least=0)


def get_config():
  return Staged()
