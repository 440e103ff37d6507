"""Fashion-MNIST, every image method: one VGG-11 teaches the same small convolutional network in many ways.

python -m distill_jax --config=configs/fashion_mnist_methods.py --seeds=0,1,2

Where the download site cannot be reached, give the folder of the four IDX files (Debian's package
dataset-fashion-mnist): --config.source_files=/usr/share/datasets/fashion-mnist
A part of the methods: --config.methods=kd_t4,dkd,crd (with a --workdir of its own).

The teacher is that of fashion_mnist.py, trained on all training images. Every student sees 10,000 of them for 5 epochs,
with the same augmentation (shifts and mirroring), optimizer, first weights and order of images, and its last weights
count: nothing is tuned or chosen here. Weights, temperatures and companions are the papers', or where a paper gives
none for this case those of the losses' docstrings. Warm-ups keep their share of the training (20 of 240 epochs).

What is not as in the papers:
- Student and teacher are paired where their maps have one size, block1 to block3, of equally many channels, so that
  `hint`, `cwd`, `pearson`, `mgd` and `inter_channel` learn no projection; methods on a single map take block3 (`hint`
  the middle one), those that relate examples the embeddings (`similarity_preserving` block3).
- `hint` and `fsp` stand beside the labels all the time, as in RepDistiller, not in a stage of their own before them.
  `activation_boundary` has the first epoch for itself, and so has the paraphraser of `factor_transfer`.
- `queue_similarity` stands beside the labels (alone it would teach no classes), with a queue of 1,024; `crd` has 1,024
  negatives, not 16,384 of 50,000 examples.
- `correlation_congruence` has weight 1: its paper's is not for a mean over the batch.
- The branches of `ofa` are one linear layer each.

Not here: `soft_cross_entropy` (the gradient of KD), `uld` (for other vocabularies) and `sparse` (stored teachers), what
is made for transformers, boxes or sequences, `dino` (views), and `mutual` (digits_mutual.py).

Measured on 2 CPU cores that others used too: 63 minutes with the teacher, 10 more for the times of the steps; the table
is in the README. Student alone 83.09 +- 0.21 %, KD at T = 4 81.81 +- 0.17 %, KD at T = 1 83.59 +- 0.06 %, DIST, the
best, 83.80 +- 0.11 %. Nothing diverged. What loses much, and why (accuracy on validation of seed 0, alone 83.8 %):
- Methods on block3 ask the last map of the student, which one linear layer must read, to be one of the teacher's
  middle, which two more blocks read. On block2 `cwd` has 83.9 % (76.4 % on block3), `pearson` 84.3 (80.6),
  `attention_transfer` on block1 and block2 84.2 (80.1); `hint` on block3 falls from 83.8 to 74.8. Here the choice of
  layers weighs more than that of the method.
- `mlkd`: entries of the class Gram matrix grow with batch / classes, 12.8 here and 0.64 where its weight was chosen.
  With its part of the loss divided by 400 it has 82.7 % (76.0), as the rest of its terms has.
- `standardized_kd` and `dist` leave the scale of the logits free: 45 and 25 % calibration error.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from fashion_mnist import FashionMnist

from distill_jax import losses, objectives
from distill_jax.distributed import sharding
from distill_jax.errors import suggest
from distill_jax.jobs.config import ConfigError, TrainedTeacher, Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.pooling import max_pool
from distill_jax.models.zoo.vgg import VGG
from distill_jax.train import fit
from distill_jax.types import Objective, Variables

BLOCKS = ("block1", "block2", "block3")
TEACHER_BLOCKS = (*BLOCKS, "block4", "block5")
TEACHER_NORMS = {
  "before1": "blocks/0/0/norm",
  "before2": "blocks/1/0/norm",
  "before3": "blocks/2/1/norm",
}
STUDENT_NORMS = {"before1": "blocks/0/norm", "before2": "blocks/1/norm", "before3": "blocks/2/norm"}


@dataclasses.dataclass
class Methods(FashionMnist):
  """As `FashionMnist`; `temperature` and `hard_weight` are not used.

  Attributes:
    methods: which ones are run; empty: all.
    images: training images that the students see.
  """

  methods: tuple[str, ...] = ()
  images: int = 10_000
  eval_every: int = 390
  reference: str = "kd_t4"
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=390, batch_size=128, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def student_train(self, train):
    return super().student_train(train.take(slice(self.images)))

  def teacher(self):
    """The teacher of `FashionMnist`, with its maps before the last ReLU of each block."""
    return from_nnx(
      lambda rngs: VGG(1, 11, 10, width=self.teacher_width, rngs=rngs), features=TEACHER_NORMS
    )

  def student(self):
    return from_nnx(lambda rngs: CNN(1, self.student_widths, 10, rngs=rngs), features=STUDENT_NORMS)

  def variants(self):
    return self.methods or tuple(makers(self, None))

  def variant_objective(self, variant, trained_teacher=None):
    return makers(self, trained_teacher)[variant]()

  def validate(self) -> None:
    known = makers(self, None)
    for name in self.methods:
      if name not in known:
        raise ConfigError(f"methods: there is no method {name!r}{suggest(name, known)}")
    super().validate()
    check(self, "images", least=1)
    if len(self.student_widths) != 3:
      raise ConfigError(
        f"student_widths: expected 3, one per block that is compared, got {self.student_widths}"
      )


def makers(
  config: Methods, trained_teacher: TrainedTeacher | None
) -> Mapping[str, Callable[[], Objective]]:
  """What makes the objective of each method."""
  steps, batch = config.student_training.steps, config.student_training.batch_size
  epoch = steps // 5

  def warm(weight: float):
    return optax.linear_schedule(0.0, weight, max(1, steps // 12))

  def logits(loss, **hyperparameters):
    return objectives.logits(loss, **hyperparameters)

  def same(block: str, loss, **hyperparameters):
    return objectives.features(block, block, loss, **hyperparameters)

  def embeddings(loss):
    return objectives.features("embedding", "embedding", loss, project=False)

  def each(weight: float, term) -> dict:
    return {block: (weight, term(block)) for block in BLOCKS}

  kd = logits(losses.kl_divergence, temperature=4.0)
  return {
    "kd_t4": lambda: beside_labels(0.1, soft=(0.9, kd)),
    "kd_t1": lambda: beside_labels(soft=(3.0, logits(losses.kl_divergence))),
    # Logits.
    "reverse_kl": lambda: beside_labels(soft=(1.0, logits(losses.reverse_kl))),
    "jensen_shannon": lambda: beside_labels(soft=(1.0, logits(losses.jensen_shannon))),
    "skew_kl": lambda: beside_labels(soft=(1.0, logits(losses.skew_kl))),
    "skew_reverse_kl": lambda: beside_labels(soft=(1.0, logits(losses.skew_reverse_kl))),
    "total_variation": lambda: beside_labels(soft=(1.0, logits(losses.total_variation))),
    "logit_mse": lambda: objectives.weighted(soft=(1.0, logits(losses.logit_mse))),
    "hard_distillation": lambda: beside_labels(0.5, soft=(0.5, logits(losses.hard_distillation))),
    "binary_kl": lambda: beside_labels(soft=(1.0, logits(losses.binary_kl))),
    "standardized_kd": lambda: beside_labels(
      0.1, soft=(9.0, logits(standardized, temperature=2.0))
    ),
    "dkd": lambda: beside_labels(soft=(warm(1.0), logits(losses.dkd))),
    "nkd": lambda: beside_labels(soft=(1.0, logits(losses.nkd))),
    "wsld": lambda: beside_labels(soft=(2.5, logits(losses.wsld))),
    "ofa": lambda: beside_labels(soft=(1.0, logits(losses.ofa, eps=1.5)), **each(1.0, ofa_branch)),
    "dist": lambda: beside_labels(
      soft=(1.0, logits(losses.dist, beta=2.0, gamma=2.0, temperature=4.0))
    ),
    "mlkd": lambda: beside_labels(
      soft=(1.0, logits(instances)), rows=(1.0, logits(rows)), classes=(1.0, logits(classes))
    ),
    # Maps.
    "hint": lambda: beside_labels(maps=(100.0, same("block2", losses.hint))),
    "attention_transfer": lambda: beside_labels(
      **each(1000.0, lambda block: same(block, losses.attention_transfer, project=False))
    ),
    "layer_attention": lambda: beside_labels(
      maps=(200.0, objectives.layer_attention(BLOCKS, TEACHER_BLOCKS))
    ),
    "nst": lambda: beside_labels(maps=(50.0, same("block3", losses.nst, project=False))),
    "fsp": lambda: beside_labels(maps=(50.0, objectives.features(BLOCKS[1:], BLOCKS[1:], flow))),
    "factor_transfer": lambda: beside_labels(
      maps=(
        200.0,
        objectives.factor_transfer("block3", "block3", paraphraser(config, trained_teacher, epoch)),
      )
    ),
    "activation_boundary": lambda: boundaries(epoch),
    "ofd": lambda: beside_labels(**overhaul(config, trained_teacher)),
    "review_kd": lambda: beside_labels(maps=(warm(5.0), objectives.review_kd(BLOCKS, BLOCKS))),
    "inter_channel": lambda: beside_labels(
      maps=(500 / batch, same("block3", losses.inter_channel))
    ),
    "cwd": lambda: beside_labels(maps=(50.0, same("block3", losses.cwd))),
    "pearson": lambda: beside_labels(maps=(6.0, same("block3", losses.pearson))),
    "mgd": lambda: beside_labels(
      maps=(7e-5, objectives.mgd("block3", "block3", share=0.15, over="channels"))
    ),
    "vid": lambda: beside_labels(**each(1.0, lambda block: objectives.vid(block, block))),
    # Embeddings.
    "srd": lambda: beside_labels(
      soft=(1.0, kd), embedding=(1.0, objectives.srd("embedding", "embedding"))
    ),
    "vkd": lambda: beside_labels(embedding=(1.0, objectives.vkd("embedding", "embedding"))),
    # Relations between examples.
    "similarity_preserving": lambda: beside_labels(
      maps=(3000.0, same("block3", losses.similarity_preserving, project=False))
    ),
    "rkd": lambda: beside_labels(
      distance=(25.0, embeddings(losses.rkd_distance)),
      angle=(50.0, embeddings(losses.rkd_angle)),
    ),
    "pkt": lambda: beside_labels(embedding=(3e4, embeddings(losses.pkt))),
    "correlation_congruence": lambda: beside_labels(
      0.1, soft=(0.9, kd), embedding=(1.0, embeddings(losses.correlation_congruence))
    ),
    "crd": lambda: beside_labels(
      embedding=(
        0.8,
        objectives.crd("embedding", "embedding", ids(config, trained_teacher), negatives=1024),
      )
    ),
    "info_nce": lambda: beside_labels(
      embedding=(1.0, objectives.features("embedding", "embedding", losses.info_nce))
    ),
    "queue_similarity": lambda: beside_labels(
      embedding=(1.0, objectives.queue_similarity("embedding", "embedding", size=1024))
    ),
  }


def beside_labels(weight: float = 1.0, **terms) -> Objective:
  return objectives.weighted(hard=(weight, objectives.labels()), **terms)


def standardized(student, teacher, *, temperature):
  """Logit standardization in front of KD (Sun et al. 2024)."""
  return losses.kl_divergence(
    losses.standardize(student), losses.standardize(teacher), temperature=temperature
  )


def instances(student, teacher):
  """KD, summed over MLKD's temperatures."""
  return sum(losses.kl_divergence(student, teacher, temperature=float(t)) for t in range(2, 7))


def rows(student, teacher, *, where=None, axis_name=None):
  options = {"where": where, "axis_name": axis_name}
  return sum(
    losses.batch_gram(student, teacher, temperature=float(t), **options) for t in range(2, 7)
  )


def classes(student, teacher, *, where=None, axis_name=None):
  options = {"where": where, "axis_name": axis_name}
  return sum(
    losses.class_gram(student, teacher, temperature=float(t), **options) for t in range(2, 7)
  )


def ofa_branch(block: str) -> objectives.Term:
  """The logits of a linear layer on the mean of a map, taught as the student's own are."""

  def init(key, s, t):
    return Variables(
      {"kernel": jax.nn.initializers.lecun_normal()(key, (s.shape[-1], t.shape[-1]))}, {}
    )

  def apply(params, state, s, t, *, labels):
    return losses.ofa(s.mean((1, 2)) @ params["kernel"], t, labels, eps=1.5), state

  return objectives.learned(block, "logits", init, apply, entries={"labels": "label"})


def flow(student, teacher):
  """`fsp` from a block's input, the pooled map of the block before, to its output."""
  s, t = ((max_pool(first), last) for first, last in (student, teacher))
  return losses.fsp(s, t)


def boundaries(epoch: int) -> Objective:
  """One epoch of activation boundaries alone, halved for each earlier block; then labels alone."""
  one, zero = map(optax.constant_schedule, (1.0, 0.0))
  before, after = (optax.join_schedules(parts, [epoch]) for parts in ((one, zero), (zero, one)))
  terms = {
    name: (
      lambda step, share=2.0**-i: share * before(step) / 1000,
      objectives.activation_boundary(name, name),
    )
    for i, name in enumerate(reversed(STUDENT_NORMS))
  }
  return objectives.weighted(hard=(after, objectives.labels()), **terms)


def overhaul(config: Methods, trained_teacher: TrainedTeacher | None) -> dict:
  """OFD of each block, halved for each earlier one, with the margins of the teacher's batch norms."""
  params = teacher_params(config, trained_teacher)
  return {
    name: (
      1e-3 * 2.0**-i,
      objectives.ofd(name, name, objectives.ofd_margin_at(params, TEACHER_NORMS[name])),
    )
    for i, name in enumerate(reversed(STUDENT_NORMS))
  }


def teacher_params(config: Methods, trained_teacher: TrainedTeacher | None):
  """The teacher's, or zeros."""
  if trained_teacher is not None:
    return trained_teacher.variables.params
  shapes = jax.eval_shape(config.teacher().init, jax.random.key(0), {})
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.params)


def paraphraser(config: Methods, trained_teacher: TrainedTeacher | None, steps: int):
  """Trained on the student's images; untrained without a teacher."""
  term = objectives.paraphraser("block3")
  if trained_teacher is None:
    channels = len(objectives.ofd_margin_at(teacher_params(config, None), TEACHER_NORMS["before3"]))
    shape = jax.ShapeDtypeStruct((1, 7, 7, channels), jnp.float32)
    return term.init(jax.random.key(0), {}, {"block3": shape}).params
  fitted = fit(
    config.student(),
    trained_teacher.teacher,
    objectives.weighted(paraphraser=(1.0, term)),
    optax.adam(1e-3),
    trained_teacher.train,
    steps=max(1, steps),
    batch_size=config.student_training.batch_size,
    teacher_variables=trained_teacher.variables,
    augment=config.augment(),
    mesh=sharding.data_mesh(config.devices or None),
    progress=False,
  )
  return jax.device_get(fitted.state.params["objective"]["paraphraser"])


def ids(config: Methods, trained_teacher: TrainedTeacher | None) -> int:
  """One more than the largest id that the student meets; a guess before its images are known."""
  return 2 * config.images if trained_teacher is None else int(trained_teacher.train.ids.max()) + 1


def get_config():
  return Methods()
