"""Fashion-MNIST, 60,000 real images, 28x28: a VGG-11 teaches a small convolutional network.

python -m distill_jax --config=configs/fashion_mnist.py --seeds=0,1,2

Where the download site cannot be reached, give the folder of the four IDX files (Debian's package
dataset-fashion-mnist): --config.source_files=/usr/share/datasets/fashion-mnist

Measured on 2 CPU cores: 15 minutes. Test accuracy, 3 seeds: teacher 91.59 %; baseline 89.56 +- 0.15
%, distilled 88.62 +- 0.24 %: soft targets of this weight and temperature do not help. With
--config.student_widths=16,32 (11 minutes) they harm more: baseline 81.71 +- 0.17 %, distilled 79.50
+- 0.50 %.
"""

import dataclasses

from distill_jax import data, losses, objectives
from distill_jax.data.sets import tfds
from distill_jax.jobs.config import Config, Splits, Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.vgg import VGG


@dataclasses.dataclass
class FashionMnist(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    temperature: temperature of the soft targets.
    hard_weight: weight of the cross entropy with the labels; the soft targets have the rest of 1.
    label_fraction: fraction of the training examples whose labels the student sees.
    shift: largest random shift in pixels, an augmentation next to mirroring; 0: neither.
    teacher_width: width multiplier of the teacher's convolutions.
    student_widths: channels of the student's blocks.
    source_files: folder with the data set's files, for machines that cannot reach the download
      site.
    data_dir: folder of prepared data sets; empty: TFDS's default.
  """

  temperature: float = 4.0
  hard_weight: float = 0.1
  label_fraction: float = 1.0
  shift: int = 2
  teacher_width: float = 0.25
  student_widths: tuple[int, ...] = (16, 32, 64)
  source_files: str = ""
  data_dir: str = ""
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=3000, batch_size=128, learning_rate=2e-3, weight_decay=1e-2
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=3000, batch_size=128, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def data(self) -> Splits:
    sets = tfds.load(
      "fashion_mnist", source_files=self.source_files or None, data_dir=self.data_dir or None
    )
    train, validation = data.split(sets["train"], 0.1)
    return Splits(train, validation, sets["test"])

  def student_train(self, train):
    return data.label_fraction(train, self.label_fraction)

  def teacher(self):
    return from_nnx(lambda rngs: VGG(1, 11, 10, width=self.teacher_width, rngs=rngs))

  def student(self):
    return from_nnx(lambda rngs: CNN(1, self.student_widths, 10, rngs=rngs))

  def objective(self):
    return objectives.weighted(
      hard=(self.hard_weight, objectives.labels()),
      soft=(
        1 - self.hard_weight,
        objectives.logits(losses.kl_divergence, temperature=self.temperature),
      ),
    )

  def augment(self):
    return (
      data.augmentation(data.shift_crop(self.shift), data.flip(), seed=0) if self.shift else None
    )

  def validate(self) -> None:
    super().validate()
    check(self, "temperature", above=0)
    check(self, "hard_weight", least=0, most=1)
    check(self, "label_fraction", above=0, most=1)
    check(self, "shift", least=0, most=14)
    check(self, "teacher_width", above=0)


def get_config():
  return FashionMnist()
