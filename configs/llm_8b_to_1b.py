"""Llama 3 8B teaches a student of the shape of Llama 3.2 1B, on sequences of 8,192 tokens.

python -m distill_jax --config=configs/llm_8b_to_1b.py --stages=student,report \
    --config.teacher_folder=Llama-3.1-8B --config.text=corpus

The student starts from random weights and minimizes the divergence from the teacher's next-token
probabilities, without ever storing the logits. With --config.cache=gs://bucket/cache and the stage
`cache` before `student`, the 64 most probable of 128,256 tokens are stored once, 208 bytes a token,
and the student learns from them with all others as one more class. The teacher's weights are those
that Meta released, as `safetensors` with their config.json and tokenizer.json. Steps and learning
rates are a starting point for a search: this has never been trained, and never run on a TPU.

The cost of a step, without a TPU (`pip install '.[tpu]'`; 3 minutes on two cores, 5 GB of
memory); with --config.cache=gs://bucket/cache it is that of a step from the cache, which need not
exist:

python -m distill_jax --config=configs/llm_8b_to_1b.py --compile_for=v5p:2x2x2 \
    --config.student_training.batch_size=8

Compiled by libtpu 0.0.42, one sequence a chip (products: FLOPs of a chip's matrix products, counted
before compilation; bound: lower bound of a step's time, at the peak; sent: bytes of the full
arrays):

                      memory of a chip   products      bound   at the bound           sent
    live teacher    33.21 of 95.74 GiB   2.785e14   606.8 ms   13,500 tokens/s/chip   42 GB
    from the cache  31.25 of 95.74 GiB   1.118e14   243.5 ms   33,641 tokens/s/chip   12 GB

About 25 GiB of each are attention scores [32, 8192, 8192] of one block in float32, which XLA stores
while it computes that block; it stores those of no other (`remat`). They cross the HBM several
times: including that, a step would take 1,067 and 682 ms if nothing stayed on chip. Eight chips
share a copy of weights and optimizer (`mesh.fsdp`), and each has the full heads. On 512 chips
(fsdp=512 on v5p:8x8x8), XLA sums activations instead of gathering weights: it sends 8.2 TB and
takes 71.28 GiB.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import TopK
from distill_jax.data import text
from distill_jax.errors import suggest
from distill_jax.jobs.config import Config, ConfigError, MeshSizes, Splits, Training, check
from distill_jax.models import cast, from_nnx, pretrained
from distill_jax.models.llm.decoder import Decoder, DecoderOptions
from distill_jax.models.llm.huggingface import decoder_arguments, decoder_name
from distill_jax.models.llm.rope import RopeScaling
from distill_jax.models.remat import POLICIES
from distill_jax.types import Model

STRETCHED = RopeScaling(32.0, 1.0, 4.0, 8192)
LLAMA = DecoderOptions(rope_theta=500_000.0, norm_eps=1e-5)


@dataclasses.dataclass
class Shape:
  """Sizes of a Llama: arguments of `models.llm.decoder.Decoder`."""

  embed_dim: int
  num_layers: int
  mlp_dim: int
  num_heads: int = 32
  num_kv_heads: int = 8


@dataclasses.dataclass
class Llama(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    teacher_folder: folder of a released checkpoint: config.json, and model.safetensors or its parts
      with their index. Training needs it, --compile_for does not.
    text: folder of .txt files, each a document. Memory holds it, 16 bytes a token.
    tokenizer: path of the checkpoint's tokenizer.json; empty: the one in teacher_folder.
    end: token between documents.
    length: number of tokens in a sequence.
    k: number of classes of a token that the cache stores.
    vocab_size: number of tokens, where there is no teacher_folder.
    teacher_shape, student_shape: sizes of the networks; the teacher's counts where there is no
      teacher_folder.
    remat: policy for what a block of the student stores for the backward pass (`models.remat`).
  """

  teacher_folder: str = ""
  text: str = ""
  tokenizer: str = ""
  end: str = "<|end_of_text|>"
  length: int = 8192
  k: int = 64
  vocab_size: int = 128_256
  teacher_shape: Shape = dataclasses.field(default_factory=lambda: Shape(4096, 32, 14_336))
  student_shape: Shape = dataclasses.field(default_factory=lambda: Shape(2048, 16, 8192))
  remat: str = "nothing_saveable"
  teacher_dtype: str = "bfloat16"
  mesh: MeshSizes = dataclasses.field(default_factory=lambda: MeshSizes(data=-1, fsdp=8))
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(
      steps=2500, batch_size=512, learning_rate=3e-4, warmup_steps=250, weight_decay=0.1
    )
  )

  def task(self):
    return tasks.language_modeling()

  def data(self) -> Splits:
    if not self.text or not self.teacher_folder:
      raise ConfigError(
        "teacher_folder, text: expected the folders of a checkpoint and of .txt files, got "
        f"{self.teacher_folder!r} and {self.text!r}; without them there is --compile_for"
      )
    tokenizer = self.tokenizer or Path(self.teacher_folder, "tokenizer.json")
    rows = text.load(self.text, length=self.length, tokenizer=text.bpe(tokenizer, end=self.end))
    train, held_out = data.split(rows, 0.02)
    return Splits(train, *data.split(held_out, 0.5, seed=1))

  def abstract_batch(self, rows: int):
    """Returns the shapes of a batch, which do not depend on the data."""
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, self.length), jnp.int32)
    return {"id": number, "view": number} | dict.fromkeys(
      ("tokens", "label", "segments", "positions"), tokens
    )

  def teacher(self):
    if not self.teacher_folder:
      return self._network(self._arguments(self.teacher_shape))
    folder = Path(self.teacher_folder)
    model = self._network(decoder_arguments(json.loads((folder / "config.json").read_text())))
    shapes = cast(
      jax.eval_shape(model.init, jax.random.key(0), self.abstract_batch(1)), jnp.bfloat16
    )
    path = folder / "model.safetensors"
    if not path.exists():
      path = folder / "model.safetensors.index.json"
    return pretrained(model._replace(variables=shapes), path, names=decoder_name, cast=True)

  def student(self):
    options = dataclasses.replace(LLAMA, rope_scaling=STRETCHED)
    arguments = self._arguments(self.student_shape) | {"tie_embeddings": True, "options": options}
    return self._network(arguments | {"remat": self.remat})

  def objective(self):
    return objectives.weighted(
      soft=(1.0, objectives.tokens(losses.sparse_kl if self.cache else losses.kl_divergence))
    )

  def baseline_objective(self):
    return objectives.weighted(hard=(1.0, objectives.next_tokens()))

  def cached_outputs(self):
    return {"logits": TopK(self.k)}

  # Every chip has the full heads: the losses read some classes at a time, and would gather them
  # each time.
  def rules(self, role):
    return [("params/.*head$" if role == "teacher" else "embed/embedding$", PartitionSpec())]

  def teacher_rules(self):
    return () if self.cache else self.rules("teacher")

  def validate(self) -> None:
    super().validate()
    check(self, "length", least=2)
    check(self, "k", least=1, most=self.vocab_size)
    if self.remat not in ("", *POLICIES):
      raise ConfigError(
        f"remat: expected a policy, got {self.remat!r}{suggest(self.remat, POLICIES)}"
      )

  def _arguments(self, shape: Shape) -> dict:
    return {"vocab_size": self.vocab_size, "options": LLAMA} | dataclasses.asdict(shape)

  def _network(self, arguments: dict) -> Model:
    options = dataclasses.replace(arguments["options"], max_length=self.length)
    arguments = arguments | {"options": options, "dtype": jnp.bfloat16}
    inputs = ("tokens", "segments", "positions")
    return from_nnx(lambda rngs: Decoder(**arguments, rngs=rngs), inputs=inputs)


def get_config():
  return Llama()
