"""Voice or not, every 32 ms: the released silero-vad teaches a network of a fortieth of its size.

apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav
pip install soundfile soxr; pip install --no-deps silero-vad
python -m distill_jax --config=configs/voice_activity.py --seeds=0,1,2

Recorded prompts of one voice (CC-BY-SA-3.0; `data.sets.voice_prompts`), split by sentence, are put
into 2 s of colored noise at a random level. The true classes come from the level of the clean
recording: voice within 30 dB of its loudest chunk, silence below 45 dB, and neither in between,
which does not count. Where the packages are not installed, unpack them
(`dpkg-deb -x FILE.deb FOLDER`) and give --config.packages=FOLDER.

The teacher (MIT; 310,000 parameters) was trained on other sounds. The baseline learns from the
classes of `label_fraction` of the scenes. Students see no class:

- noisy: KL(teacher || student), where the teacher hears what the student hears;
- clean: the same, but the teacher hears the recording without noise.

Measured next to other jobs: 18 minutes. Accuracy of chunks in 500 test scenes, 3 seeds: teacher
96.62 %; baseline 95.09 +- 0.15; noisy 96.78 +- 0.10, clean 96.22 +- 0.13. The 95 % intervals of the
differences from the baseline are +1.11 to +2.27 and +0.48 to +1.79 points: both helped.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from packages import find_package

from distill_jax import data, losses, objectives, tasks
from distill_jax.data import audio
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.sets import voice_prompts
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.speech.silero_vad import CHUNK, RATE, load_silero_vad
from distill_jax.models.speech.voice_detector import VoiceDetector

METHODS = ("noisy", "clean")
CLASSES = ("silence", "voice")
WEIGHTS = Path("data", "silero_vad_16k.safetensors")
SAMPLES = 64 * CHUNK
BANDS, FRAMES = 40, 4
HOP = CHUNK // FRAMES
LOUD, QUIET = -30.0, -45.0
"""Levels of voice and of silence, in dB of the loudest chunk."""
FAINT = -45.0
"""Level of a recording's loudest chunk below which there is no voice, in dB of full scale."""
RATIOS = (3.0, 28.0)
"""Levels of the noise, in dB below the loudest chunk."""


@dataclasses.dataclass
class VoiceActivity(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    prompts: file of recordings at 16 kHz, written from the packages where it is missing.
    packages: root of the files of the packages.
    weights: silero_vad_16k.safetensors; empty: that of the package silero-vad.
    methods: names of `METHODS` to run.
    scenes: numbers of training, validation and test scenes.
    label_fraction: fraction of the training scenes whose classes the baseline knows.
    width: size of the student's states.
  """

  prompts: str = "runs/prompts_16k.npz"
  packages: str = "/"
  weights: str = ""
  methods: tuple[str, ...] = METHODS
  scenes: tuple[int, int, int] = (1000, 200, 500)
  label_fraction: float = 0.05
  width: int = 24
  eval_every: int = 100
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=600, batch_size=32, learning_rate=5e-3, warmup_steps=50)
  )

  def data(self) -> Splits:
    clips = _read(self.prompts, self.packages)
    return Splits(
      *(
        _scenes(clips[split], count, seed, f"scenes {split}")
        for seed, (split, count) in enumerate(zip(voice_prompts.SPLITS, self.scenes))
      )
    )

  def baseline_train(self, train):
    return train.take(slice(max(1, round(self.label_fraction * len(train)))))

  def task(self):
    return tasks.tagging(class_names=CLASSES)

  def teacher(self):
    folder = None if self.weights else find_package("weights", "a file", "silero_vad", "silero-vad")
    try:
      return load_silero_vad(folder / WEIGHTS if folder else self.weights)
    except (FileNotFoundError, ValueError) as error:
      raise ConfigError(f"weights: {error}") from error

  def student(self):
    return from_nnx(
      lambda rngs: VoiceDetector(BANDS, self.width, frames_per_decision=FRAMES, rngs=rngs),
      inputs="features",
    )

  def variants(self):
    return self.methods

  def recipe(self, variant):
    def hear_clean(train, trained_teacher, folder):
      # The teacher alone reads 'audio'.
      return dataclasses.replace(train, arrays={**train.arrays, "audio": train.arrays["clean"]})

    recipe = super().recipe(variant)
    return recipe._replace(relabel=hear_clean) if variant == "clean" else recipe

  def variant_objective(self, variant, trained_teacher=None):
    return objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))

  def validate(self) -> None:
    super().validate()
    check_names(self, "methods", METHODS)
    check(self, "label_fraction", above=0, most=1)
    check(self, "width", least=1)
    if min(self.scenes) < 1:
      raise ConfigError(f"scenes: expected three positive numbers, got {self.scenes}")


@functools.lru_cache
def _read(path: str, packages: str):
  """Returns the clips of each split."""
  try:
    return voice_prompts.split(voice_prompts.load(path, packages, rate=RATE))
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f"packages: {error}") from error


def _scenes(clips, count: int, seed: int, name: str) -> data.Source:
  """Returns scenes of noise, four of five with a recording."""
  rng = np.random.default_rng(seed)
  made = [_scene(clips[rng.integers(len(clips))].samples, rng) for _ in range(count)]
  noisy, clean, label = map(np.stack, zip(*made))
  arrays = {"audio": noisy, "clean": clean, "label": label}
  # As many frames as whole chunks have; the last one is centered on the scene's end.
  features = [audio.log_mel(x, RATE, bands=BANDS, hop=HOP / RATE)[:-1] for x in noisy]
  arrays["features"] = np.stack(features)
  return data.Source(arrays, len(CLASSES), CLASSES, name=name, ignore_label=UNLABELED)


def _scene(recording: np.ndarray, rng: np.random.Generator):
  """Returns noisy samples, clean ones and the class of each chunk."""
  clean = np.zeros(SAMPLES, np.float32)
  if rng.random() < 0.8:
    start = int(rng.integers(-len(recording) // 2, SAMPLES // 2))
    part = recording[max(0, -start) :][: SAMPLES - max(0, start)]
    clean[max(0, start) :][: len(part)] = part
  spectrum = np.fft.rfft(rng.normal(size=SAMPLES))
  spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0, 1)
  noise = np.fft.irfft(spectrum, SAMPLES)
  decibels = _decibels(clean)
  loudest = decibels.max()
  signal = max(loudest, FAINT)
  noise *= 10 ** ((signal - rng.uniform(*RATIOS)) / 20) / noise.std()
  relative = decibels - signal
  label = np.where(relative > LOUD, 1, np.where(relative < QUIET, 0, UNLABELED))
  if loudest < FAINT:
    label[:] = 0
  return clean + noise.astype(np.float32), clean, label.astype(np.int32)


def _decibels(samples: np.ndarray) -> np.ndarray:
  """Returns the level of each chunk, dB of full scale."""
  power = (samples.reshape(-1, CHUNK).astype(np.float64) ** 2).mean(1)
  return 10 * np.log10(power + 1e-12)


def get_config():
  return VoiceActivity()
