"""Fashion-MNIST, pruned while distilled: channels, weights, or two of four weights become zero.

python -m distill_jax --config=configs/fashion_mnist_prune.py --seeds=0,1,2

All students are as in fashion_mnist_10k.py; kd is dense. The fraction of zeros grows from `begin`
to `end` along a cubic (Zhu & Gupta 2018).

- channels: half of each layer's channels, by the norm of their kernels; they are removed, so the
  student becomes smaller;
- channels.tuned: the small student, distilled further;
- weights: nine tenths of each kernel's weights, by magnitude;
- 2_of_4: two of four neighboring weights, all at once at `end`.

Measured on 2 CPU cores, next to another such job: 6 minutes. Test accuracy in %, 3 seeds: teacher
89.08; baseline 82.12 +- 0.10, kd 82.21 +- 0.20, channels 77.53 +- 0.40 (6,274 of 24,058
parameters), tuned 78.21 +- 0.39, weights 63.90 +- 3.78 (2,616), 2_of_4 80.90 +- 0.09 (12,218).
"""

import dataclasses

import optax
from fashion_mnist_10k import FashionMnist10k

from distill_jax.compression.pruning.channels import prune_channels
from distill_jax.compression.pruning.groups import groups_of, under
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.shrink import shrink
from distill_jax.compression.pruning.weights import prune, prune_n_by_m
from distill_jax.errors import suggest
from distill_jax.jobs.config import ConfigError, Training, error_prefix

KINDS = ("channels", "weights", "2_of_4")
WEIGHTS = r"^student/.*kernel$"


@dataclasses.dataclass
class PrunedTraining(Training):
  """As `Training`, with masks.

  Attributes:
    kind: what is pruned: 'channels', 'weights' or '2_of_4'.
    sparsity: fraction of zeros at `end`; '2_of_4' ignores it.
    distribution: how zeros are divided among layers: 'uniform' or 'global'; for weights also 'erk'.
    begin, end, every: first and last step at which masks are computed, and the steps between.
  """

  steps: int = 300
  batch_size: int = 128
  learning_rate: float = 5e-3
  weight_decay: float = 1e-3
  kind: str = "channels"
  sparsity: float = 0.5
  distribution: str = "uniform"
  begin: int = 60
  end: int = 200
  every: int = 20

  def optimizer(self) -> optax.GradientTransformation:
    inner, schedule = super().optimizer(), PolynomialSchedule(self.begin, self.end, self.every)
    if self.kind == "channels":
      return prune_channels(
        inner, _groups, schedule, sparsity=self.sparsity, distribution=self.distribution
      )
    if self.kind == "weights":
      return prune(
        inner, schedule, sparsity=self.sparsity, pattern=WEIGHTS, distribution=self.distribution
      )
    # The first convolution has one input channel: there are no four weights to choose from.
    return prune_n_by_m(inner, self.end, pattern=r"^student/(blocks/[1-9].*|head/)kernel$")

  def validate(self) -> None:
    super().validate()
    if self.kind not in KINDS:
      raise ConfigError(
        f"kind: expected one of {KINDS}, got {self.kind!r}{suggest(self.kind, KINDS)}"
      )
    if self.end >= self.steps:
      raise ConfigError(f"end: expected less than steps={self.steps}, got {self.end}")
    with error_prefix("sparsity, distribution, begin, end and every"):
      self.optimizer()


@dataclasses.dataclass
class Pruned(FashionMnist10k):
  """As `FashionMnist10k`, with students that are pruned.

  Attributes:
    channels, weights, two_of_four, tuning: training of the variants.
  """

  channels: PrunedTraining = dataclasses.field(default_factory=PrunedTraining)
  weights: PrunedTraining = dataclasses.field(
    default_factory=lambda: PrunedTraining(kind="weights", sparsity=0.9)
  )
  two_of_four: PrunedTraining = dataclasses.field(
    default_factory=lambda: PrunedTraining(kind="2_of_4")
  )
  tuning: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=150, batch_size=128, learning_rate=1e-3, weight_decay=1e-3
    )
  )

  def variants(self):
    return ("kd", "channels", "channels.tuned", "weights", "2_of_4")

  def recipe(self, variant):
    recipe = super().recipe(variant)
    match variant:
      case "channels":
        return recipe._replace(
          training=self.channels, export_fn=remove_channels, allow_shrunk=True, export_last=True
        )
      case "channels.tuned":
        return recipe._replace(training=self.tuning, init_from="channels", allow_shrunk=True)
      case "weights":
        return recipe._replace(training=self.weights, export_last=True)
      case "2_of_4":
        return recipe._replace(training=self.two_of_four, export_last=True)
    return recipe


def _groups(params):
  return under("student", groups_of(params["student"]))


def remove_channels(variables):
  """Returns the network without the channels that are zero."""
  return shrink(variables, groups_of(variables.params))


def get_config():
  return Pruned()
