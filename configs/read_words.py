"""Pictures of words to letters: a recurrent recognizer teaches a small one, by CTC.

apt-get install bible-kjv
pip install jiwer
python -m distill_jax --config=configs/read_words.py --seeds=0,1,2

The words are those of the King James Bible (public domain), rendered in the DejaVu fonts that come
with matplotlib (`data.sets.rendered_words`): words and faces of the test are new to the networks.
The baseline learns from the letters. Students learn from both:

- frames: CTC with the letters, and KL(teacher || student) at frames where the teacher's most
  probable class is not the blank;
- mean: CTC, and KL of the distributions averaged over time, as PP-OCRv4 does.

Measured next to other jobs, with both: 38 minutes. Word error rate of 1,279 test words, 3 seeds:
teacher 18.2 %; baseline 38.7 +- 1.9; frames 37.0 +- 1.7 (difference -3.5 to +0.1), mean 42.3 +-
4.1 (-3.9 to +11.0): no gain shown. Character error rate: frames helped, 7.2 against 7.7 % (-1.1 to
-0.1).

pip install --no-deps rapidocr-onnxruntime onnxruntime
python -m distill_jax --config=configs/read_words.py --config.released=True --seeds=0,1,2 \
  --config.cache=runs/ppocr --workdir=runs/read_released

has the released PP-OCRv4 (Apache-2; 2.7 million parameters, 6,625 classes) as teacher, whose
outputs over these letters are stored once. Nothing else is known of the words: `frames` learns
from all pictures without their letters, the baseline from the letters of `label_fraction`. Measured
alike, 9 minutes of training: word error rate of the teacher 1.0 %, baseline 97.0 +- 1.6, frames
56.6 +- 4.2, a difference of -50.5 to -30.4: helped.
"""

import dataclasses
import functools
from pathlib import Path

import corpora
import numpy as np
from packages import find_package

from distill_jax import cache, losses, objectives, tasks, teachers
from distill_jax.data import text
from distill_jax.data.sets import rendered_words
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.speech.frame_config import FrameEncoderConfig
from distill_jax.models.speech.text_line import TextLineEncoder
from distill_jax.storage import files

METHODS = ("frames", "mean")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS = text.character_tokenizer(CHARACTERS)
HEIGHT, COLUMNS = 32, 4
RELEASED = Path("models", "ch_PP-OCRv4_rec_infer.onnx")


@dataclasses.dataclass
class ReadWords(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    text: file with the words, written by the program `bible` where it is missing.
    pictures: file of pictures, written where it is missing.
    methods: names of `METHODS` to run.
    released: whether the teacher is PP-OCRv4.
    label_fraction: fraction of the training words whose letters the baseline knows next to the
      released teacher.
    width: columns of a row; wider pictures are left out.
    buckets: numbers of columns of a batch, next to `width`; not with a cache.
    soft_weight: weight of what compares with the teacher.
    teacher_widths, student_widths: channels of the convolutions.
    teacher_width, student_width: sizes of the recurrent layers, half for each direction.
  """

  text: str = "runs/kjv.txt"
  pictures: str = "runs/words.npz"
  methods: tuple[str, ...] = ("frames",)
  released: bool = False
  label_fraction: float = 0.05
  width: int = 160
  buckets: tuple[int, ...] = (64, 96, 128)
  soft_weight: float = 1.0
  teacher_widths: tuple[int, ...] = (16, 32, 64, 64)
  student_widths: tuple[int, ...] = (8, 16, 16, 32)
  teacher_width: int = 128
  student_width: int = 48
  eval_every: int = 500
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=2500, batch_size=32, learning_rate=2e-3, warmup_steps=100
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=2500, batch_size=32, learning_rate=4e-3, warmup_steps=100
    )
  )

  def data(self) -> Splits:
    pictures = _read(self.text, self.pictures)

    def rows(split: str):
      return text.line_source(
        [picture.image for picture in pictures[split]],
        [picture.text for picture in pictures[split]],
        LETTERS,
        width=self.width,
        label_length=24,
        columns_per_step=COLUMNS,
        drop_longer=True,
        name=f"words {split}",
      )

    return Splits(*map(rows, ("train", "validation", "test")))

  def lengths(self):
    if self.cache:
      return ()
    return (*(n for n in self.buckets if n < self.width), self.width)

  def baseline_train(self, train):
    if not self.released:
      return train
    order = np.random.default_rng(0).permutation(len(train))
    return train.take(np.sort(order[: max(1, round(self.label_fraction * len(train)))]))

  def task(self):
    return tasks.transcription(LETTERS.decode, normalizer=None, decides="nll")

  def teacher(self):
    if not self.released:
      return self._network(self.teacher_widths, self.teacher_width)
    folder = find_package("released", "False", "rapidocr_onnxruntime", "rapidocr-onnxruntime")
    # Twice the columns: as many frames as the student has.
    return teachers.ppocr(folder / RELEASED, CHARACTERS, width=2 * self.width)

  def student(self):
    return self._network(self.student_widths, self.student_width)

  def cached_outputs(self):
    return {"logits": cache.Dense("float16")}

  def variants(self):
    return self.methods

  def variant_objective(self, variant, trained_teacher=None):
    soft = objectives.ctc_mean()
    if variant == "frames":
      # Without letters, blank frames tell where there are none.
      mode = "all" if self.released else "nonblank"
      soft = objectives.frames(losses.ctc_frames, mode=mode)
    if self.released:
      return objectives.weighted(soft=(self.soft_weight, soft))
    return objectives.weighted(ctc=(1.0, objectives.ctc()), soft=(self.soft_weight, soft))

  def baseline_objective(self):
    return objectives.weighted(ctc=(1.0, objectives.ctc()))

  def validate(self) -> None:
    super().validate()
    check_names(self, "methods", METHODS)
    check(self, "label_fraction", above=0, most=1)
    check(self, "soft_weight", above=0)
    for name in ("teacher_width", "student_width"):
      if getattr(self, name) < 2 or getattr(self, name) % 2:
        raise ConfigError(f"{name}: expected a positive even number, got {getattr(self, name)}")
    if self.width < COLUMNS or self.width % COLUMNS:
      raise ConfigError(f"width: expected a positive multiple of {COLUMNS}, got {self.width}")
    if self.released and not self.cache:
      raise ConfigError("cache: expected a folder for the released teacher's outputs, got none")

  def _network(self, widths: tuple[int, ...], width: int):
    config = FrameEncoderConfig(LETTERS.size, width, 1, layer="gru")
    return from_nnx(
      lambda rngs: TextLineEncoder(config, widths=widths, height=HEIGHT, rngs=rngs),
      inputs=("image", "widths"),
    )


@functools.lru_cache
def _read(path: str, pictures: str):
  """Returns the pictures of each split."""
  try:
    file = Path(path)
    if not file.exists():
      chapters = corpora.king_james()
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write(file, corpora.SEPARATOR.join(chapters))
    words = rendered_words.words_of(file.read_text())
    return rendered_words.load(pictures, words, height=HEIGHT)
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f"text: {error}") from error


def get_config():
  return ReadWords()
