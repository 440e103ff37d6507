"""Fashion-MNIST, pruned while distilled: half of the student's channels or weights, or two weights of four, are zero.

python -m distill_jax --config=configs/fashion_mnist_prune.py --seeds=0,1,2
python -m distill_jax --config=configs/fashion_mnist_prune.py --config.student_training.kind=weights \
    --config.student_training.sparsity=0.9

The student trained alone is pruned as well. The zeros grow from `begin` to `end` along a cubic (Zhu & Gupta 2018), and
no weights from before `end` are evaluated, or the best ones would be dense.

Not yet run.
"""

import dataclasses

import optax
from fashion_mnist import FashionMnist

from distill_jax.compression.channels import prune_channels
from distill_jax.compression.groups import groups_of, under
from distill_jax.compression.masks import PolynomialSchedule
from distill_jax.compression.prune import prune, prune_n_by_m
from distill_jax.config import ConfigError, Training, check, prefixed
from distill_jax.errors import suggest

KINDS = ("channels", "weights", "2:4")
WEIGHTS = r"^student/.*kernel$"


@dataclasses.dataclass
class PrunedTraining(Training):
  """As `Training`, with masks.

  Attributes:
    kind: what is pruned: 'channels', by the norm of their kernels; 'weights', by magnitude; '2:4', at `end`.
    sparsity: the share of zeros at `end`; 2:4 needs none.
    distribution: of the zeros over the layers, 'uniform' or 'global', of weights 'erk' too.
    begin, end, every: steps at which masks are made.
  """

  kind: str = "channels"
  sparsity: float = 0.5
  distribution: str = "uniform"
  begin: int = 300
  end: int = 1400
  every: int = 100

  def optimizer(self) -> optax.GradientTransformation:
    inner, schedule = super().optimizer(), PolynomialSchedule(self.begin, self.end, self.every)
    if self.kind == "channels":
      return prune_channels(inner, _groups, schedule, sparsity=self.sparsity, distribution=self.distribution)
    if self.kind == "weights":
      return prune(inner, schedule, sparsity=self.sparsity, pattern=WEIGHTS, distribution=self.distribution)
    # The first convolution has one input channel, and no four to choose from.
    return prune_n_by_m(inner, self.end, pattern=r"^student/(blocks/[1-9].*|head/)kernel$")

  def validate(self) -> None:
    super().validate()
    if self.kind not in KINDS:
      raise ConfigError(f"kind: expected one of {KINDS}, got {self.kind!r}{suggest(self.kind, KINDS)}")
    with prefixed("sparsity, distribution, begin, end and every"):
      self.optimizer()


@dataclasses.dataclass
class Pruned(FashionMnist):
  """As `FashionMnist`, with a student that is pruned."""

  eval_every: int = 1500
  student_training: PrunedTraining = dataclasses.field(
    default_factory=lambda: PrunedTraining(steps=3000, batch_size=128, learning_rate=5e-3, weight_decay=1e-3)
  )

  def validate(self) -> None:
    super().validate()
    check(self, "eval_every", above=self.student_training.end)


def _groups(params):
  return under("student", groups_of(params["student"]))


def get_config():
  return Pruned()
