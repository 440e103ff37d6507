"""Shoulder exercises seen by a smartwatch: a wide network of series teaches a narrow one.

pip install --no-deps seglearn==1.2.5
python -m distill_jax --config=configs/watch_activity.py --seeds=0,1,2

140 recordings of 10 people with 6 channels, acceleration and rotation at 50 Hz, of 7 exercises
(Burns et al. 2018, arXiv:1802.01489; BSD). They are split by person. Networks see windows of 100
steps, 2 seconds: in training every 50 steps, in evaluation every 100. Channels are standardized by
the training split.

Measured on 2 busy CPU cores: 31 minutes (4 minutes of processor time; jax 0.10.2, Python 3.11).
Test accuracy, 806 windows of three people, 3 seeds: teacher 77.05 %, baseline 73.49 +- 2.62 %, kd
71.42 +- 2.35 %, hint 70.84 +- 4.41 %. The 95 % intervals of the differences from the baseline are
-4.98 to +0.85 and -6.41 to +1.11 points: neither helps. kd has the lower negative log-likelihood
(0.68 against 0.77), within its interval.
"""

import dataclasses
import importlib.util
import pickle
from pathlib import Path

import numpy as np

from distill_jax import data, losses, objectives
from distill_jax.data.clips import random_clip
from distill_jax.data.videos import Videos
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.zoo.sequence import SequenceCNN

# All that the file of numpy arrays and lists needs; anything else could run code.
ALLOWED = {
  ("_codecs", "encode"),
  ("numpy", "dtype"),
  ("numpy", "ndarray"),
  ("numpy.core.multiarray", "_reconstruct"),
}


@dataclasses.dataclass
class WatchActivity(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    methods: names of the methods to run: 'kd' and 'hint'.
    window: number of steps of a window.
    teacher_widths, student_widths: channels of the networks' blocks.
    temperature: temperature of the soft targets.
    hard_weight: weight of the cross entropy with the labels next to the soft targets.
    hint_weight: weight of the squared error of the middle blocks' features, next to the labels.
  """

  methods: tuple[str, ...] = ("kd", "hint")
  window: int = 100
  teacher_widths: tuple[int, ...] = (32, 48, 48, 48)
  student_widths: tuple[int, ...] = (8, 8, 8)
  temperature: float = 4.0
  hard_weight: float = 0.1
  hint_weight: float = 1.0
  eval_every: int = 100
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=300, batch_size=64, learning_rate=2e-3, weight_decay=1e-2
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=800, batch_size=64, learning_rate=5e-3, weight_decay=1e-3
    )
  )

  def data(self) -> Splits:
    rest, test = data.split(recordings(), 0.3, stratify="label")
    train, validation = data.split(rest, 0.3, stratify="label")
    values = np.concatenate(train.frames)
    steps = (self.window // 2, self.window, self.window)
    return Splits(
      *(
        windows(part, self.window, step, values.mean(0), values.std(0))
        for part, step in zip((train, validation, test), steps)
      )
    )

  def teacher(self):
    return self._network(self.teacher_widths)

  def student(self):
    return self._network(self.student_widths)

  def variants(self):
    return self.methods

  def variant_objective(self, variant, trained_teacher=None):
    if variant == "kd":
      soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
      return objectives.weighted(
        hard=(self.hard_weight, objectives.labels()), soft=(1 - self.hard_weight, soft)
      )
    widths = self.student_widths, self.teacher_widths
    student, teacher = (f"block{(len(sizes) + 1) // 2}" for sizes in widths)
    hint = objectives.features(student, teacher, losses.hint)
    return objectives.weighted(hard=(1.0, objectives.labels()), hint=(self.hint_weight, hint))

  def validate(self) -> None:
    super().validate()
    check(self, "window", least=2)
    check(self, "temperature", above=0)
    check(self, "hard_weight", least=0, most=1)
    check(self, "hint_weight", least=0)
    check_names(self, "methods", ("kd", "hint"))

  def _network(self, widths):
    return from_nnx(lambda rngs: SequenceCNN(6, widths, 7, rngs=rngs), inputs="x")


def recordings() -> Videos:
  """Returns seglearn's recordings, float32 [steps, 6], with 'label' and 'person', their group.

  Raises:
    ConfigError: seglearn is not installed.
    ValueError: a recording has a number that is not finite; the message has its id.
  """
  found = importlib.util.find_spec("seglearn")
  if found is None or found.origin is None:
    raise ConfigError(
      "data: expected the package seglearn, got none: write pip install --no-deps seglearn==1.2.5"
    )
  folder = Path(found.origin).parent / "data"
  values = read_arrays(folder / "watch_dataset.npy").item()
  arrays = {"label": values["y"], "person": values["subject"]}
  names = tuple(values["y_labels"])
  examples = data.Source(arrays, len(names), names, name="watch", groups="person")
  return Videos([np.asarray(series, np.float32) for series in values["X"]], examples)


class _Unpickler(pickle.Unpickler):
  """Reads arrays, and raises for everything else that a pickle can name."""

  def find_class(self, module, name):
    if (module, name) not in ALLOWED:
      raise ValueError(f"file: expected numpy arrays, got {module}.{name}: get the file again")
    return super().find_class(module, name)


def read_arrays(path: Path) -> np.ndarray:
  """Returns the array of objects in an .npy file that holds numpy arrays, lists and numbers.

  Raises:
    ValueError: it holds anything else.
  """
  with path.open("rb") as file:
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return _Unpickler(file, encoding="latin1").load()


def windows(
  series: Videos, length: int, step: int, mean: np.ndarray, std: np.ndarray
) -> data.Source:
  """Returns windows of recordings as examples 'x' [N, length, channels].

  Args:
    series: the recordings.
    length: number of steps of a window.
    step: steps between the starts of two windows.
    mean, std: of each channel.

  Raises:
    ValueError: a recording is shorter than a window; the message has its id.
  """
  series.check_crop(random_clip(length, seed=0))
  starts = [np.arange(0, len(x) - length + 1, step) for x in series.frames]
  cut = [x[s : s + length] for x, first in zip(series.frames, starts) for s in first]
  rows = np.repeat(np.arange(len(series)), [len(first) for first in starts])
  arrays = {name: series.examples.arrays[name][rows] for name in ("label", "person")}
  # Ids are unique over all splits: a recording has fewer than 1,000 windows.
  arrays["id"] = 1000 * series.ids[rows] + np.concatenate([np.arange(len(s)) for s in starts])
  arrays["x"] = (np.stack(cut) - mean) / std
  return dataclasses.replace(series.examples, arrays=arrays)


def get_config():
  return WatchActivity()
