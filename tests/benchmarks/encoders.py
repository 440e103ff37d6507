"""Times the distillation of an encoder's embeddings on batches of sentences of several lengths."""

import dataclasses
import itertools
import pathlib
import re
import tempfile

import jax
from cases import run_steps
from problems import with_weights
from timing import Ratio, compare

from distill_jax import data, losses, objectives, teachers
from distill_jax.data import text
from distill_jax.models import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.types import Model, Outputs

GUIDES = pathlib.Path(__file__).parents[2] / "distill_jax" / "docs" / "guides"
INPUTS = ("tokens", "segments", "token_types")
DISTILLED = objectives.weighted(
  embedding=(1.0, objectives.features("embedding", "embedding", losses.cosine))
)


def to_given(outputs: Outputs, batch) -> jax.Array:
  """Returns the same loss, of a student that is not distilled: to an entry of the batch."""
  return losses.cosine(outputs["embedding"], batch["given"])


SUPERVISED = objectives.weighted(embedding=(1.0, objectives.student_loss(to_given)))


def live_to_parts(quick: bool, pairs: int) -> Ratio:
  """Times distillation steps / the student's steps and the teacher's inference, in two jits."""
  student, teacher, batches = _problem(quick)
  infer = _inference(teacher)
  own = run_steps(student, None, SUPERVISED, _with(batches, "given", infer(batches)))

  def separate(calls):
    return [(own(1), infer(batches)) for _ in range(calls)][-1]

  return compare(run_steps(student, teacher, DISTILLED, batches), separate, pairs=pairs, calls=1)


def cached_to_own(quick: bool, pairs: int) -> Ratio:
  """Times steps whose batches hold the teacher's embeddings / the student's own steps."""
  student, teacher, batches = _problem(quick)
  embeddings = _inference(teacher)(batches)
  cached = _with(batches, "teacher/embedding", embeddings)
  ours = run_steps(student, teachers.cached(), DISTILLED, cached)
  own = run_steps(student, None, SUPERVISED, _with(batches, "given", embeddings))
  return compare(ours, own, pairs=pairs, calls=1)


def _problem(quick: bool) -> tuple[Model, Model, list[dict[str, jax.Array]]]:
  """Returns 2 layers, 6 layers of MiniLM's widths, and a batch of 32 sentences of each length."""
  lengths = (64,) if quick else (16, 32, 64)
  batch_size, width, layers = (4, 24, (1, 1)) if quick else (32, 384, (2, 6))
  with tempfile.TemporaryDirectory() as folder:
    tokenizer, sentences = _tokenizer(pathlib.Path(folder) / "vocab.txt")
  rows = tokenizer.rows(sentences, length=lengths[-1])
  source = data.Source({name: rows[name] for name in INPUTS}, name="guides")
  buckets = text.LengthBuckets(source, batch_size, seed=0, lengths=lengths)
  by_length: dict[int, dict[str, jax.Array]] = {}
  for batch in itertools.islice(buckets(0), buckets.steps_per_epoch):
    by_length.setdefault(batch["tokens"].shape[1], jax.device_put(batch))
  config = EncoderConfig(
    tokenizer.size,
    width,
    num_layers=max(layers),
    num_heads=12,
    max_length=lengths[-1],
    pooler=False,
  )
  student, teacher = (_encoder(dataclasses.replace(config, num_layers=n)) for n in layers)
  return student, with_weights(teacher), list(by_length.values())


def _tokenizer(vocabulary: pathlib.Path) -> tuple[text.SentenceTokenizer, list[str]]:
  """Returns a tokenizer of the guides' words, and their sentences."""
  pages = [page.read_text() for page in sorted(GUIDES.glob("*.md"))]
  words = sorted({word for page in pages for word in re.findall(r"\w+|[^\w\s]", page.lower())})
  vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
  sentences = [s for page in pages for s in re.split(r"(?<=[.:])\s+", page) if len(s.split()) > 3]
  return text.sentence_tokenizer(vocabulary), sentences


def _encoder(config: EncoderConfig) -> Model:
  return from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs=INPUTS)


def _with(batches, name: str, values) -> list[dict[str, jax.Array]]:
  return [{**batch, name: value} for batch, value in zip(batches, values, strict=True)]


def _inference(teacher: Model):
  def embedding(variables, batch):
    return teacher.apply(*variables, batch, train=False, key=None)[0]["embedding"]

  compiled = jax.jit(embedding)
  return lambda batches: [compiled(teacher.variables, batch) for batch in batches]
