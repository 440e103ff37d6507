"""Your images, a folder with a subfolder per class: a VGG-11 teaches a small convolutional network.

python -m distill_jax --config=configs/folder.py --config.train_dir=photos/train \
    --config.test_dir=photos/test

Images may have any size and number: they are read and decoded while training. Teacher and student
see the same random part of each, resized to a square (Inception's crop); evaluation uses the
center. Classes are the subfolders' names; those of the test folder must be the same. A tenth of the
training images chooses the weights.
"""

import dataclasses

from distill_jax import data, losses, objectives
from distill_jax.data.crops import center_crop, random_resized_crop
from distill_jax.data.sets import folder
from distill_jax.jobs.config import Config, ConfigError, Crops, Splits, Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.vgg import VGG
from distill_jax.storage import folders


@dataclasses.dataclass
class Folder(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    train_dir, test_dir: folders with a subfolder of images per class.
    size: side in pixels of the square that the networks see.
    least_area: smallest fraction of an image that a training crop may show.
    max_bad: largest fraction of images that cannot be decoded; they are left out.
    temperature: temperature of the soft targets.
    hard_weight: weight of the cross entropy with the labels; the soft targets have the rest of 1.
    teacher_width: width multiplier of the teacher's convolutions.
    student_widths: channels of the student's blocks.
  """

  train_dir: str = ""
  test_dir: str = ""
  size: int = 64
  least_area: float = 0.25
  max_bad: float = 0.01
  temperature: float = 4.0
  hard_weight: float = 0.1
  teacher_width: float = 0.5
  student_widths: tuple[int, ...] = (16, 32, 64, 128)
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=3000, batch_size=64, learning_rate=2e-3, weight_decay=1e-2
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=3000, batch_size=64, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def data(self) -> Splits:
    images = folder.images(self.train_dir, max_bad=self.max_bad)
    test = folder.images(self.test_dir, class_names=images.class_names, max_bad=self.max_bad)
    train, validation = data.split(images, 0.1)
    return Splits(train, validation, test)

  def crops(self) -> Crops:
    area = (self.least_area, 1.0)
    return Crops(random_resized_crop(self.size, seed=0, area=area), center_crop(self.size))

  def teacher(self):
    return from_nnx(lambda rngs: VGG(3, 11, self.classes(), width=self.teacher_width, rngs=rngs))

  def student(self):
    return from_nnx(lambda rngs: CNN(3, self.student_widths, self.classes(), rngs=rngs))

  def classes(self) -> int:
    """Returns the number of subfolders."""
    train_dir = folders.resolve(self.train_dir, "train_dir")
    return sum(path.is_dir() and not path.name.startswith(".") for path in train_dir.iterdir())

  def objective(self):
    return objectives.weighted(
      hard=(self.hard_weight, objectives.labels()),
      soft=(
        1 - self.hard_weight,
        objectives.logits(losses.kl_divergence, temperature=self.temperature),
      ),
    )

  def augment(self):
    return data.augmentation(data.flip(), seed=0)

  def validate(self) -> None:
    super().validate()
    for name in ("train_dir", "test_dir"):
      if not getattr(self, name):
        raise ConfigError(
          f"{name}: expected a folder with a subfolder of images per class, got nothing"
        )
    check(self, "size", least=8)
    check(self, "least_area", above=0, most=1)
    check(self, "max_bad", least=0, most=0.5)
    check(self, "temperature", above=0)
    check(self, "hard_weight", least=0, most=1)
    check(self, "teacher_width", above=0)


def get_config():
  return Folder()
