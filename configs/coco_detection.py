"""Your images and boxes in COCO's format: a YOLO teaches one of a quarter of its width.

pip install faster-coco-eval
python -m distill_jax --config=configs/coco_detection.py \
    --config.train_annotations=street/train.json --config.train_images=street/train \
    --config.test_annotations=street/test.json --config.test_images=street/test \
    --config.class_names=car,person --config.pad_to=480,640

`data.sets.coco` says what is read. All images are padded to one size and held in memory. Networks
train on random crops, resized by a random factor, and find boxes in whole images. A tenth of the
training images chooses the weights: images of one scene that are on both sides make the scores look
better than they are.

No small set in this format comes with a package: the test of this job trains on a generated one.
"""

import dataclasses

from distill_jax import data, losses, objectives, tasks
from distill_jax.data import Source
from distill_jax.data.sets import coco
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.models import from_nnx
from distill_jax.models.zoo.detector import Detector
from distill_jax.models.zoo.yolo import YOLO


@dataclasses.dataclass
class CocoDetection(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    train_annotations, test_annotations: JSON files like COCO's instances_train2017.json.
    train_images, test_images: folders of their images.
    class_names: names of the categories that are classes; boxes of others are background.
    pad_to: height and width to which images are padded, multiples of 2 for each backbone level.
    crop: side of the crops in training, likewise a multiple.
    scale: smallest and largest factor by which training images are resized.
    soft_weight, edges_weight, neck_weight: weights of the comparisons of classes, of the
      distributions of edges, and of the neck's maps; the boxes have 1.
    teacher_widths, student_widths: channels of the backbone's levels, as many for both.
  """

  train_annotations: str = ""
  train_images: str = ""
  test_annotations: str = ""
  test_images: str = ""
  class_names: tuple[str, ...] = ()
  pad_to: tuple[int, ...] = ()
  crop: int = 256
  scale: tuple[float, float] = (0.5, 1.5)
  soft_weight: float = 1.0
  edges_weight: float = 0.25
  neck_weight: float = 6.0
  teacher_widths: tuple[int, ...] = (32, 64, 128, 256, 256)
  student_widths: tuple[int, ...] = (8, 16, 32, 64, 64)
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=5000, batch_size=16, learning_rate=2e-3, warmup_steps=200, weight_decay=1e-3
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=5000, batch_size=16, learning_rate=5e-3, warmup_steps=200, weight_decay=1e-3
    )
  )

  def data(self) -> Splits:
    train, validation = data.split(self.load(self.train_annotations, self.train_images), 0.1)
    return Splits(train, validation, self.load(self.test_annotations, self.test_images))

  def load(self, annotations: str, images: str) -> Source:
    height, width = self.pad_to
    return coco.load(annotations, images, class_names=self.class_names, pad_to=(height, width))

  def head(self) -> YOLO:
    return YOLO(len(self.class_names))

  def task(self):
    return tasks.detection(self.head().decode, class_names=self.class_names)

  def augment(self):
    kinds = {"image": "image", "boxes": "boxes"}
    crop = data.random_crop(self.crop, scale=self.scale)
    return data.augmentation(crop, data.flip(), seed=0, entries=kinds)

  def teacher(self):
    return self.network(self.teacher_widths)

  def student(self):
    return self.network(self.student_widths)

  def network(self, widths: tuple[int, ...]):
    """Returns a detector whose neck is a quarter as wide as its backbone's end."""
    neck_width = max(widths[-1] // 4, 8)
    return from_nnx(
      lambda rngs: Detector(3, widths, self.head(), neck_width=neck_width, rngs=rngs),
      inputs="image",
    )

  def baseline_objective(self):
    return objectives.weighted(boxes=(1.0, objectives.student_loss(self.head().loss)))

  def objective(self):
    levels = [f"p{k}" for k in range(2, len(self.student_widths) + 1)]
    maps = [objectives.features(level, level, losses.pearson) for level in levels]
    return objectives.weighted(
      boxes=(1.0, objectives.student_loss(self.head().loss)),
      soft=(
        self.soft_weight,
        objectives.locations(losses.binary_kl, output="class_logits"),
      ),
      edges=(self.edges_weight, objectives.locations(losses.localization, output="box_bins")),
      neck=(self.neck_weight, objectives.summed(*maps)),
    )

  def validate(self) -> None:
    super().validate()
    for part in ("train", "test"):
      for kind, what in (("annotations", "a JSON file of COCO's format"), ("images", "a folder")):
        if not getattr(self, f"{part}_{kind}"):
          raise ConfigError(f"{part}_{kind}: expected {what}, got nothing")
    if not self.class_names:
      raise ConfigError(
        "class_names: expected the name of each class, got none: write --config.class_names=car,dog"
      )
    if len(self.teacher_widths) != len(self.student_widths):
      raise ConfigError(
        f"student_widths: expected {len(self.teacher_widths)} numbers, as many as teacher_widths, "
        f"got {self.student_widths}: heads are compared location by location"
      )
    self._validate_sides()
    for name in ("soft_weight", "edges_weight", "neck_weight"):
      check(self, name, least=0)

  def _validate_sides(self) -> None:
    divisor = 2 ** len(self.student_widths)
    if len(self.pad_to) != 2:
      raise ConfigError(f"pad_to: expected (height, width), got {self.pad_to}")
    for name, side in (("pad_to", self.pad_to[0]), ("pad_to", self.pad_to[1]), ("crop", self.crop)):
      if side < divisor or side % divisor:
        raise ConfigError(
          f"{name}: expected multiples of {divisor} for {len(self.student_widths)} widths, got "
          f"{side}: write {max(1, -(-side // divisor)) * divisor}"
        )


def get_config():
  return CocoDetection()
