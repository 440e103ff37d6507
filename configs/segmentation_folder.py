"""Your images and masks: a U-Net teaches a light network with an encoder of inverted residuals.

python -m distill_jax --config=configs/segmentation_folder.py --config.train_dir=streets/train \
    --config.test_dir=streets/test --config.class_names=road,car,other

Both folders hold images and masks, files of the same name: `data.sets.segmentation_folder` says
what masks may be. The images of a folder have one size, or are padded to `pad_to`. Both networks
train on the same random crops, resized by a random factor, and segment full images by sliding
windows. A tenth of the training images chooses the weights: images of one scene that are on both
sides make the scores look better than they are.
"""

import dataclasses

from distill_jax import data, losses, objectives, tasks
from distill_jax.data import Source
from distill_jax.data.sets import segmentation_folder
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.models import from_nnx, sliding_window
from distill_jax.models.zoo.lraspp import LRASPP
from distill_jax.models.zoo.unet import UNet


@dataclasses.dataclass
class SegmentationFolder(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    train_dir, test_dir: folders with the folders images and masks.
    class_names: one name per class, in the order of the class numbers.
    pad_to: height and width to which images are padded; empty: all have one size.
    crop: side of the crops in training, and of the windows in which full images are segmented.
    scale: smallest and largest factor by which training images are resized.
    soft_weight: weight of the soft targets; the labels have 1.
    teacher_widths: channels of the levels of the U-Net.
    student_widths: channels of the levels of the light network.
  """

  train_dir: str = ""
  test_dir: str = ""
  class_names: tuple[str, ...] = ()
  pad_to: tuple[int, ...] = ()
  crop: int = 128
  scale: tuple[float, float] = (0.5, 2.0)
  soft_weight: float = 1.0
  teacher_widths: tuple[int, ...] = (32, 64, 128, 256)
  student_widths: tuple[int, ...] = (16, 24, 32, 64)
  cache_batch_size: int = 8
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=2000, batch_size=8, learning_rate=2e-3, weight_decay=1e-3
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=2000, batch_size=8, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def data(self) -> Splits:
    train, validation = data.split(self.load(self.train_dir), 0.1)
    return Splits(train, validation, self.load(self.test_dir))

  def load(self, folder: str) -> Source:
    pad_to = None
    if self.pad_to:
      height, width = self.pad_to
      pad_to = height, width
    return segmentation_folder.load(folder, class_names=self.class_names, pad_to=pad_to)

  def task(self):
    return tasks.segmentation(class_names=self.class_names)

  def augment(self):
    kinds = {"image": "image", "label": "label_map"}
    crop = data.random_crop(self.crop, scale=self.scale)
    return data.augmentation(crop, data.flip(), seed=0, entries=kinds)

  def teacher(self):
    classes = len(self.class_names)
    return self.in_windows(lambda rngs: UNet(3, self.teacher_widths, classes, rngs=rngs))

  def student(self):
    classes = len(self.class_names)
    return self.in_windows(lambda rngs: LRASPP(3, self.student_widths, classes, rngs=rngs))

  def in_windows(self, make):
    """Returns a network of crops that segments full images."""
    return sliding_window(from_nnx(make), (self.crop, self.crop))

  def objective(self):
    soft = objectives.logits(losses.kl_divergence)
    return objectives.weighted(hard=(1.0, objectives.labels()), soft=(self.soft_weight, soft))

  def validate(self) -> None:
    super().validate()
    for name in ("train_dir", "test_dir"):
      if not getattr(self, name):
        raise ConfigError(
          f"{name}: expected a folder with the folders images and masks, got nothing"
        )
    if len(self.class_names) < 2:
      raise ConfigError(
        f"class_names: expected one name per class, at least 2, got {self.class_names}: write "
        "--config.class_names=background,object"
      )
    if len(self.pad_to) not in (0, 2):
      raise ConfigError(f"pad_to: expected (height, width) or nothing, got {self.pad_to}")
    check(self, "soft_weight", least=0)
    side = 2 ** (len(self.teacher_widths) - 1)
    if self.crop < side or self.crop % side:
      raise ConfigError(
        f"crop: expected a multiple of {side} for {len(self.teacher_widths)} teacher_widths, got "
        f"{self.crop}: write {max(1, round(self.crop / side)) * side}"
      )


def get_config():
  return SegmentationFolder()
