"""Spoken prompts to letters: a recurrent network teaches one of a tenth of its size, by CTC.

apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav espeak-ng
pip install jiwer soundfile soxr
python -m distill_jax --config=configs/speech_words.py --seeds=0,1,2

The real part is Debian's recorded prompts (CC-BY-SA-3.0; `data.sets.voice_prompts`): 24 minutes of
one voice. The same sentences, and for training random strings of their words, are spoken by voices
of espeak-ng (`data.sets.synthetic_voices`): these are synthetic. Both are split by sentence, the
synthetic part by voice, too; test holds the prompts' voice and synthetic ones that training has
not. Where the packages cannot be installed, unpack those of the prompts (`dpkg-deb -x FILE.deb
FOLDER`) and give --config.packages=FOLDER, and --config.library=True: PyPI's espeakng-loader speaks
(`pip install --no-deps espeakng-loader`).

All networks read log-mel features at 8 kHz, masked in training (SpecAugment), and write letters.
While it teaches, the teacher hears clean recordings (noisy student, Park et al. 2020). The baseline
learns from the transcripts. Students:

- frames: CTC with the transcripts, and KL(teacher || student) at frames where the teacher's most
  probable class is not the blank;
- all_frames: the same at all frames;
- mean: CTC, and KL of the distributions averaged over time, as PP-OCRv4 does;
- pseudo: CTC with what the teacher hears, found by a beam, where its word error rate against the
  transcript is below `most_errors` (Gandhi et al. 2023).

--config.methods=frames,all_frames,mean,pseudo --workdir=runs/speech_all runs all. With
--config.label_fraction=0.1 --config.methods=frames,pseudo --workdir=runs/speech_few the baseline
knows a tenth of the transcripts, and the students learn from all clips: `frames` has CTC where
there is a transcript, and `pseudo` learns all that the teacher hears. The report decodes greedily.

Measured next to other jobs: 33 minutes, and 45 with few transcripts. Word error rate of 127 test
clips, 3 seeds: teacher 59.2; baseline 85.6 +- 1.2, frames 84.9 +- 2.7 %: no gain shown (-5.0 to
+3.7). With a tenth of the transcripts: baseline 98.7 +- 1.8, frames 99.4 +- 0.3, pseudo 83.3 +- 0.9
%: -15.4 (-20.7 to -10.0).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from distill_jax import cache, losses, objectives, tasks, teachers
from distill_jax.cache.sequence_level import below, nth_best, word_error_rate
from distill_jax.data import UNLABELED, audio, split, text
from distill_jax.data.sets import synthetic_voices, voice_prompts
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check, error_prefix
from distill_jax.jobs.recipes import check_names
from distill_jax.models import decoding, from_nnx
from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.speech.speech_encoder import INPUTS, SpeechEncoder

METHODS = ("frames", "all_frames", "mean", "pseudo")
LETTERS = text.character_tokenizer(voice_prompts.CHARACTERS)
RATE, BANDS, SUBSAMPLING, HEADS = 8000, 40, 4, 4
LABEL_LENGTH, BEAM = 120, 4
MASKED = {"features": "masked"}
"""Where training has the masked features; evaluation has none."""


@dataclasses.dataclass
class SpeechWords(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    prompts, voices: files of recordings, written from the packages where they are missing; that of
      the strings is next to `voices`.
    packages: root of the files of the packages.
    library: whether PyPI's espeakng-loader speaks, in place of the packages' program.
    strings: number of strings of random words, of which four of five are spoken for training.
    methods: names of `METHODS` to run.
    frames: longest recording, in frames of 10 ms; longer ones are left out.
    buckets: numbers of frames of a batch, next to `frames`; not with a cache.
    label_fraction: fraction of the training clips whose transcripts the students know.
    soft_weight: weight of what compares with the teacher; CTC has 1.
    most_errors: word error rate from which on the teacher's transcript is not learned from.
    layer: 'gru', or 'conformer', which takes five times as long on a CPU.
    teacher_width, student_width: sizes of the hidden states.
    teacher_layers, student_layers: numbers of blocks.
  """

  prompts: str = "runs/prompts.npz"
  voices: str = "runs/voices.npz"
  packages: str = "/"
  library: bool = False
  strings: int = 400
  methods: tuple[str, ...] = ("frames",)
  frames: int = 600
  buckets: tuple[int, ...] = (120, 200, 320)
  label_fraction: float = 1.0
  soft_weight: float = 1.0
  most_errors: float = 0.3
  layer: str = "gru"
  teacher_width: int = 192
  student_width: int = 64
  teacher_layers: int = 3
  student_layers: int = 2
  eval_every: int = 500
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=8000, batch_size=16, learning_rate=2e-3, warmup_steps=150, weight_decay=1e-2
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=5000, batch_size=16, learning_rate=3e-3, warmup_steps=150, weight_decay=1e-2
    )
  )

  def data(self) -> Splits:
    clips = _read(self.prompts, self.voices, self.packages, self.library, self.strings)

    def rows(split: str):
      return text.speech_source(
        [audio.log_mel(clip.samples, clip.rate, bands=BANDS) for clip in clips[split]],
        [voice_prompts.plain_text(clip.text) for clip in clips[split]],
        LETTERS,
        frames=self.frames,
        label_length=LABEL_LENGTH,
        frames_per_step=SUBSAMPLING,
        drop_longer=True,
        name=f"prompts {split}",
      )

    train, validation, test = map(rows, voice_prompts.SPLITS)
    sounds = np.zeros((len(test), self.frames * RATE // 100), np.float32)
    for row, number in enumerate(test.ids):
      samples = clips["test"][number].samples
      sounds[row, : len(samples)] = samples[: sounds.shape[1]]
    # For the players of the report; networks do not read it.
    test = dataclasses.replace(test, arrays={**test.arrays, "audio": sounds})
    return Splits(train, validation, test)

  def lengths(self):
    if self.cache:
      return ()
    return (*(n for n in self.buckets if n < self.frames), self.frames)

  def student_train(self, train):
    known = np.isin(train.ids, self.baseline_train(train).ids)
    label = np.where(known[:, None], train.arrays["label"], UNLABELED)
    return dataclasses.replace(train, arrays={**train.arrays, "label": label})

  def baseline_train(self, train):
    if self.label_fraction == 1:
      return train
    with error_prefix("label_fraction"):
      return split(train, self.label_fraction)[1]

  def task(self):
    return tasks.transcription(LETTERS.decode, normalizer=None, audio_rate=RATE, decides="nll")

  def augment(self):
    return audio.spec_augment(seed=0, band_width=6, time_width=20, into="masked")

  def teacher(self):
    network = self._network(self.teacher_width, self.teacher_layers)
    masked = teachers.read_entries(network, MASKED)

    def apply(params, state, batch, *, train, key):
      model = masked if train else network
      return model.apply(params, state, batch, train=train, key=key)

    return network._replace(apply=apply)

  def student(self):
    return teachers.read_entries(self._network(self.student_width, self.student_layers), MASKED)

  def cached_outputs(self):
    return {"logits": cache.Dense("float16")}

  def variants(self):
    return self.methods

  def recipe(self, variant):
    recipe = super().recipe(variant)
    if variant != "pseudo":
      return recipe
    return recipe._replace(relabel=self._transcribe, cached=False)

  def variant_objective(self, variant, trained_teacher=None):
    if variant == "pseudo":
      return self.baseline_objective()
    soft = {
      "all_frames": objectives.frames(losses.ctc_frames),
      "mean": objectives.ctc_mean(),
    }.get(variant, objectives.frames(losses.ctc_frames, mode="nonblank"))
    return objectives.weighted(ctc=(1.0, objectives.ctc()), soft=(self.soft_weight, soft))

  def baseline_objective(self):
    return objectives.weighted(ctc=(1.0, objectives.ctc()))

  def validate(self) -> None:
    super().validate()
    check_names(self, "methods", METHODS)
    for name in ("frames", "teacher_layers", "student_layers"):
      check(self, name, least=1)
    check(self, "strings", least=0)
    check(self, "soft_weight", least=0)
    check(self, "most_errors", above=0)
    check(self, "label_fraction", above=0, most=1)
    for name in ("teacher_width", "student_width"):
      value = getattr(self, name)
      if value < 1 or value % HEADS:
        raise ConfigError(f"{name}: expected a multiple of {HEADS}, got {value}")

  def _network(self, width: int, layers: int):
    config = FrameEncoderConfig(
      LETTERS.size, width, layers, layer=self.layer, num_heads=HEADS, dropout=0.1
    )
    return from_nnx(
      lambda rngs: SpeechEncoder(config, num_features=BANDS, subsampling=SUBSAMPLING, rngs=rngs),
      inputs=INPUTS,
    )

  def _transcribe(self, train, trained_teacher, folder):
    """Returns the recordings with the teacher's transcripts that are near to the true ones, or all
    of them where few have one.
    """
    near = below(word_error_rate(LETTERS.decode), self.most_errors)
    return cache.seq_kd(
      folder / "heard",
      jax.jit(decoding.ctc_nbest(trained_teacher.teacher, beam_size=BEAM)),
      trained_teacher.variables,
      train,
      start_token=None,
      end_token=None,
      settings={"beam_size": BEAM},
      keep=[nth_best(0), *([near] if self.label_fraction == 1 else [])],
      inputs=INPUTS,
      batch_size=32,
    )


@functools.lru_cache
def _read(prompts: str, voices: str, packages: str, library: bool, strings: int):
  """Returns the clips of each split."""
  program = None if library else packages
  try:
    real = voice_prompts.load(prompts, packages, rate=RATE)
    splits = voice_prompts.split(real)
    texts = [clip.text for clip in real]
    spoken = synthetic_voices.load(voices, texts, program, rate=RATE)
    splits = {split: [*clips, *spoken[split]] for split, clips in splits.items()}
    if strings:
      path = Path(voices).with_suffix(".strings.npz")
      texts = _strings(splits["train"], strings)
      splits["train"] += synthetic_voices.load(path, texts, program, rate=RATE)["train"]
  except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
    raise ConfigError(f"packages: {error}") from error
  return splits


def _strings(clips, count: int) -> list[str]:
  """Returns strings of two to six random words of the clips."""
  words = sorted({word for clip in clips for word in voice_prompts.plain_text(clip.text).split()})
  rng = np.random.default_rng(0)
  return [" ".join(rng.choice(words, rng.integers(2, 7))) for _ in range(count)]


def get_config():
  return SpeechWords()
