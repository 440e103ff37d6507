"""English to French: a Transformer teaches smaller ones by words, by sequences and by both.

apt-get install libreoffice-help-en-us libreoffice-help-fr libreoffice-l10n-fr
pip install sacrebleu
python -m distill_jax --config=configs/translate_en_fr.py --seeds=0,1,2

The text is the help and the interface of LibreOffice (MPL-2.0; `data.sets.libreoffice`): sentences
of at most 12 words, split by document, so that no sentence of the test stands in training. Where
the packages are not installed, unpack them (`dpkg-deb -x FILE.deb FOLDER`) and give
--config.packages=FOLDER. Both languages share a BPE of 2,000 tokens.

The baseline learns from the French of the documents. Students (Kim & Rush 2016):

- word: half cross entropy with it, half KL(teacher || student) at each token (section 3.1);
- sequence: cross entropy with the teacher's translations, of a beam of 4 (section 3.2);
- interpolation: the same with the translation of the beam that is nearest to the reference by
  sentence BLEU (section 3.3);
- both: as word, on the sequences of `sequence`;
- quarter, deep_shallow: as sequence, with a quarter of the teacher's width, and with 4 encoder
  blocks and 1 decoder block (Kasai et al. 2021). The baseline has the size of the others.

--config.methods=word,sequence,interpolation,both,quarter,deep_shallow --workdir=runs/translation
runs all. Every network writes greedily in the report.

Measured next to other jobs: 116 minutes in training, of which about 45 are processor time. BLEU of
1,658 test sentences, 3 seeds: teacher 23.98; baseline 10.31 +- 0.44; word 11.48 +- 0.02; sequence
11.98 +- 0.26. The 95 % intervals of the differences from the baseline are +0.39 to +1.95 and +0.63
to +2.71: both helped. Steps and rates are first guesses.
"""

import dataclasses
import functools

import jax
from flax import nnx
from sequence_job import HEAD, SequenceJob

from distill_jax import cache, tasks
from distill_jax.cache.sequence_level import nearest_to_reference
from distill_jax.data import text
from distill_jax.data.sets import libreoffice
from distill_jax.jobs.config import ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import decoding, from_nnx
from distill_jax.models.seq2seq.cached_steps import decoder_steps
from distill_jax.models.seq2seq.encoder_decoder import INPUTS, EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig

METHODS = ("word", "sequence", "interpolation", "both", "quarter", "deep_shallow")


@dataclasses.dataclass
class Translation(SequenceJob):
  """See `SequenceJob` and `Config` for the other fields.

  Attributes:
    text: file of sentence pairs (`libreoffice.load`), written from the packages where it is
      missing.
    packages: root of the files of the packages.
    methods: names of `METHODS` to run.
    max_words: number of words that neither side of a pair exceeds.
    vocab_size: number of BPE tokens.
    teacher_width, student_width: sizes of the hidden states.
    teacher_layers, student_layers: numbers of blocks of the encoder, and of the decoder.
    beam_size: number of the teacher's translations of a sentence.
  """

  text: str = "runs/libreoffice.tsv"
  packages: str = "/"
  methods: tuple[str, ...] = ("word", "sequence")
  max_words: int = 12
  vocab_size: int = 2000
  teacher_width: int = 128
  student_width: int = 64
  teacher_layers: int = 3
  student_layers: int = 2
  beam_size: int = 4
  eval_every: int = 500
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=2500, batch_size=64, learning_rate=1e-3, warmup_steps=200
    )
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=1000, batch_size=64, learning_rate=2e-3, warmup_steps=200
    )
  )

  def data(self) -> Splits:
    splits, tokenizer = self._read()

    def rows(split: str):
      english, french = ([getattr(pair, side) for pair in splits[split]] for side in SIDES)
      return text.pair_source(
        english,
        french,
        tokenizer,
        source_length=self.length,
        target_length=self.length,
        drop_longer=True,
        name=f"LibreOffice {split}",
      )

    return Splits(*map(rows, ("train", "validation", "test")))

  def task(self):
    tokenizer = self._read()[1]
    return tasks.translation(tokenizer.decode, end_token=tokenizer.end, decides="nll")

  def teacher(self):
    return self._network(self.teacher_width, self.teacher_layers, self.teacher_layers)

  def student(self):
    return self._network(self.student_width, self.student_layers, self.student_layers)

  def variants(self):
    return self.methods

  def recipe(self, variant):
    recipe = super().recipe(variant)
    if variant == "quarter":
      layers = (self.student_layers,) * 2
      recipe = recipe._replace(student=self._network(self.teacher_width // 4, *layers))
    if variant == "deep_shallow":
      recipe = recipe._replace(student=self._network(self.student_width, 4, 1))
    if variant == "word":
      return recipe
    return recipe._replace(relabel=functools.partial(self._translate, variant == "interpolation"))

  def validate(self) -> None:
    super().validate()
    check_names(self, "methods", METHODS)
    for name in ("max_words", "length", "teacher_layers", "student_layers", "beam_size"):
      check(self, name, least=1)
    for name, parts in (("teacher_width", 4), ("student_width", 1)):
      value = getattr(self, name)
      if value < 1 or value % (parts * HEAD):
        raise ConfigError(f"{name}: expected a multiple of {parts * HEAD}, got {value}")

  def _translate(self, interpolates, train, trained_teacher, folder):
    """Returns the training pairs with the teacher's translations."""
    tokenizer = self._read()[1]
    steps = self._steps(self.teacher_width, self.teacher_layers, self.teacher_layers)
    settings = {"beam_size": self.beam_size, "max_length": self.length}
    search = decoding.beam_search(steps, **settings)
    source = cache.seq_kd(
      folder / "beam",
      jax.jit(search),
      trained_teacher.variables,
      train,
      start_token=tokenizer.start,
      end_token=tokenizer.end,
      settings=settings,
      batch_size=64,
    )
    if not interpolates:
      return source
    return cache.pseudo_labels(folder / "beam", train, nearest_to_reference())

  def _network(self, width: int, encoder_layers: int, decoder_layers: int):
    sizes = (width, encoder_layers, decoder_layers)
    model = from_nnx(self._make(*sizes), inputs=INPUTS)
    sample = decoding.sampler(self._steps(*sizes), max_length=self.length)
    return model._replace(sample=sample)

  def _steps(self, width: int, encoder_layers: int, decoder_layers: int):
    tokenizer = self._read()[1]
    make = self._make(width, encoder_layers, decoder_layers)
    return decoder_steps(make, start_token=tokenizer.start, end_token=tokenizer.end)

  def _make(self, width: int, encoder_layers: int, decoder_layers: int):
    def make(rngs: nnx.Rngs):
      config = EncoderDecoderConfig(
        self.vocab_size,
        width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        num_heads=width // HEAD,
        max_length=self.length,
      )
      return EncoderDecoder(config, rngs=rngs)

    return make

  def _read(self):
    return _read(self.text, self.packages, self.max_words, self.vocab_size)


SIDES = ("english", "french")


@functools.lru_cache
def _read(path: str, packages: str, max_words: int, vocab_size: int):
  """Returns the pairs of each split, and the tokenizer."""
  try:
    pairs = libreoffice.load(path, packages)
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f"text: {error}") from error
  splits = libreoffice.split(pairs, max_words=max_words)
  texts = (getattr(pair, side) for pair in splits["train"] for side in SIDES)
  return splits, text.sequence_tokenizer(text.train_pair_bpe(texts, size=vocab_size))


def get_config():
  return Translation()
