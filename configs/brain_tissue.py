"""Gray and white matter in slices of ONE averaged brain: a U-Net teaches a smaller one.

pip install --no-deps nilearn
python -m distill_jax --config=configs/brain_tissue.py --seeds=0,1,2

Five U-Nets as one teacher, each trained without one of the five slabs of training slices:
--config.methods=folds,kd.folds --seeds=0, with a --workdir of its own.

The images are coronal slices of the MNI152 template, the average of 152 people, and the classes
the larger of its probability maps (`data.sets.mni152`). Training, validation and test are slabs of
the same brain with gaps of 4 mm: the scores compare the methods, and say nothing about the scan of
another person. Networks train on crops of 48 x 48 and segment full slices by sliding windows. Dice
is the mean of gray and white matter.

Weights are the papers', or those of the losses' docstrings, and no weight is tuned. The hard labels
have weight 1 in all methods, and `emkd` has the soft targets of `kd` next to its terms.

Measured on 2 CPU cores next to other jobs, with jax 0.10.2: 2 minutes for the teacher, and from 26
seconds on a free machine to 4 minutes for a student. Test Dice in % (24 slices of three slabs, 3
seeds), and the difference from the baseline with its 95 % interval; teacher 91.59, baseline 88.37
+- 0.51:

| kd | 88.58 +- 0.39 | +0.21 (-0.58 to +1.00) |
| cwd | 36.66 +- 4.12 | -51.71 (-60.91 to -42.51) |
| pearson | 58.56 +- 11.15 | -29.80 (-53.99 to -5.61) |
| emkd | 73.84 +- 23.91 | -14.53 (-72.80 to +43.75) |

Soft targets do not help here, and terms on maps harm students of 200 steps, which find white matter
last or not at all.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from distill_jax import data, losses, objectives, tasks
from distill_jax.data.sets import mni152
from distill_jax.jobs.config import Config, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx, sliding_window
from distill_jax.models.zoo.unet import UNet
from distill_jax.teachers import ensemble
from distill_jax.types import Model, Objective

CLASSES = len(mni152.CLASSES)
FOLDS = range(mni152.SLABS)
MAPS = ("encoder_0", "decoder_0")
METHODS = ("kd", "cwd", "pearson", "emkd")


@dataclasses.dataclass
class BrainTissue(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    methods: names of the methods to run, of `OBJECTIVES`.
    window: side of the crops in training, and of the windows in which full slices are segmented.
    teacher_widths, student_widths: channels of the levels of both U-Nets.
  """

  methods: tuple[str, ...] = METHODS
  window: int = 48
  teacher_widths: tuple[int, ...] = (16, 32, 64)
  student_widths: tuple[int, ...] = (4, 8)
  best: str = "dice"
  cache_batch_size: int = 8
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=300, batch_size=8, learning_rate=3e-3, weight_decay=1e-3)
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=200, batch_size=8, learning_rate=1e-2, weight_decay=1e-3)
  )
  eval_every: int = 100

  def data(self) -> Splits:
    sets = {name: with_folds(source) for name, source in mni152.load().items()}
    return Splits(sets["train"], sets["validation"], sets["test"])

  def task(self):
    return tasks.segmentation(
      class_names=mni152.CLASSES,
      include_background=False,
      cases=tasks.Cases("slab", position="slice", spacing=(1.0, 1.0, 1.0)),
    )

  def augment(self):
    kinds = {"image": "image", "label": "label_map"}
    return data.augmentation(data.random_crop(self.window), data.flip(), seed=0, entries=kinds)

  def network(self, widths) -> Model:
    return from_nnx(lambda rngs: UNet(1, widths, CLASSES, rngs=rngs))

  def in_windows(self, model: Model, outputs) -> Model:
    """Returns a network of crops that segments full slices."""
    return sliding_window(model, (self.window, self.window), outputs=outputs)

  def teacher(self):
    return self.in_windows(self.network(self.teacher_widths), ("logits", *MAPS))

  def student(self):
    return self.in_windows(self.network(self.student_widths), ("logits", *MAPS))

  def folds(self) -> Model:
    networks = [self.network(self.teacher_widths) for _ in FOLDS]
    names = [f"{fold}/logits" for fold in FOLDS]
    return self.in_windows(ensemble(networks, mean="probabilities"), ("logits", *names))

  def variants(self):
    return self.methods

  def recipe(self, variant):
    recipe = super().recipe(variant)
    match variant:
      case "folds":
        return recipe._replace(student=self.folds(), training=self.teacher_training, teacher="")
      case "kd.folds":
        return recipe._replace(teacher="folds")
    return recipe

  def variant_objective(self, variant, trained_teacher=None):
    return OBJECTIVES[variant]()

  def validate(self) -> None:
    check_names(self, "methods", OBJECTIVES)
    super().validate()
    check(self, "window", least=8, most=144)


def with_folds(source: data.Source) -> data.Source:
  """Returns the examples with an entry 'fold_{k}' for each fold: 0 in the slab that it leaves
  out."""
  slabs = source.arrays["slab"]
  folds = {f"fold_{fold}": (slabs != 2 * fold).astype(np.float32) for fold in FOLDS}
  return dataclasses.replace(source, arrays={**source.arrays, **folds})


def with_labels(**terms) -> Objective:
  """Returns the terms and the cross entropy with the labels."""
  return objectives.weighted(hard=(1.0, objectives.labels()), **terms)


def soft_targets() -> objectives.Term:
  return objectives.logits(losses.kl_divergence)


def compare(name: str, loss, **options) -> objectives.Term:
  """Returns the comparison of both networks' maps of a name."""
  return objectives.features(name, name, loss, **options)


def emkd() -> Objective:
  """Returns EMKD (Qin et al. 2021): soft targets, importance maps and region affinity."""
  regions = {"entries": {"labels": "label"}, "num_classes": CLASSES, "project": False}
  terms = {"soft": (1.0, soft_targets())}
  for name in MAPS:
    importance = compare(name, losses.importance_map, project=False)
    terms |= {
      f"importance_{name}": (0.9, importance),
      f"regions_{name}": (0.9, compare(name, losses.region_affinity, **regions)),
    }
  return with_labels(**terms)


def hard_labels_of_folds() -> Objective:
  return objectives.weighted(
    **{
      f"fold_{fold}": (
        1.0,
        objectives.labels(output=f"{fold}/logits", example_weights=f"fold_{fold}"),
      )
      for fold in FOLDS
    }
  )


OBJECTIVES: Mapping[str, Callable[[], Objective]] = {
  "kd": lambda: with_labels(soft=(1.0, soft_targets())),
  "cwd_logits": lambda: with_labels(
    soft=(5.0, objectives.logits(losses.cwd, temperature=1.0)),
  ),
  "cwd": lambda: with_labels(maps=(50.0, compare("decoder_0", losses.cwd, temperature=4.0))),
  "pearson": lambda: with_labels(maps=(6.0, compare("decoder_0", losses.pearson))),
  "emkd": emkd,
  "folds": hard_labels_of_folds,
  "kd.folds": lambda: with_labels(soft=(1.0, soft_targets())),
}


def get_config():
  return BrainTissue()
