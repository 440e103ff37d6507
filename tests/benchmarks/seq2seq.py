"""Times the word-level distillation of an encoder-decoder on random pairs of sentences."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from cases import run_steps
from problems import with_weights
from timing import Ratio, compare

from distill_jax import data, losses, objectives
from distill_jax.cache import TopK, write_cache
from distill_jax.models import from_nnx
from distill_jax.models.seq2seq.encoder_decoder import INPUTS, EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.types import Model, Variables

LIVE = objectives.weighted(word=(1.0, objectives.tokens(losses.kl_divergence, label_weight=0.5)))
CACHED = objectives.weighted(word=(1.0, objectives.tokens(losses.sparse_kl, label_weight=0.5)))
SUPERVISED = objectives.weighted(word=(1.0, objectives.next_tokens()))


def live_to_parts(quick: bool, pairs: int) -> Ratio:
  """Times distillation steps / the student's steps on given hidden states and the teacher's
  inference, in two jits."""
  student, teacher, source = _problem(quick)
  batch = jax.device_put(dict(source.arrays))

  @jax.jit
  def infer(variables, batch):
    outputs = teacher.apply(*variables, batch, train=False, key=None)[0]
    return {name: outputs[name] for name in ("hidden", "head")}

  outputs = infer(teacher.variables, batch)
  given = batch | {"given": outputs["hidden"]}
  own = run_steps(student, _stored(outputs["head"]), LIVE, [given])

  def separate(calls):
    return [(own(1), infer(teacher.variables, batch)) for _ in range(calls)][-1]

  return compare(run_steps(student, teacher, LIVE, [batch]), separate, pairs=pairs, calls=2)


def cached_to_supervised(quick: bool, pairs: int) -> Ratio:
  """Times steps with the top 16 words of a cached teacher / steps with the labels only."""
  student, teacher, source = _problem(quick)
  batch = dict(source.arrays)
  with tempfile.TemporaryDirectory() as folder:
    cached = write_cache(
      pathlib.Path(folder) / "cache",
      teacher,
      source,
      {"logits": TopK(16)},
      batch_size=len(source),
      progress=False,
    )
    columns = cached.add_columns(batch | {"id": source.ids})
    ours = run_steps(student, cached.model, CACHED, [columns])
    own = run_steps(student, None, SUPERVISED, [batch])
    return compare(ours, own, pairs=pairs, calls=2)


def _stored(head: Any) -> Model:
  """Returns a teacher whose hidden states are an entry of the batch."""

  def apply(params, state, batch, *, train, key):
    return {"hidden": batch["given"], "head": params}, state

  return Model(lambda key, batch: Variables(head, {}), apply, Variables(head, {}))


def _problem(quick: bool) -> tuple[Model, Model, data.Source]:
  """Returns 2+2 layers of 64, 3+3 of 128, and 32 pairs of up to 16 tokens, of 2,000."""
  rows, length, width = (4, 6, 16) if quick else (32, 16, 64)
  config = EncoderDecoderConfig(
    100 if quick else 2000, width, encoder_layers=2, decoder_layers=2, num_heads=4
  )
  layers = {"encoder_layers": 3, "decoder_layers": 3, "embed_dim": 2 * width, "head_dim": 0}
  student, teacher = (
    from_nnx(lambda rngs, c=c: EncoderDecoder(c, rngs=rngs), inputs=INPUTS)
    for c in (config, dataclasses.replace(config, mlp_dim=0, **layers))
  )
  return student, with_weights(teacher), _pairs(rows, length, config.vocab_size)


def _pairs(rows: int, length: int, vocab_size: int) -> data.Source:
  """Returns random pairs, of which the second half of the positions is padding in some rows."""
  rng = np.random.default_rng(0)
  counts = rng.integers(length // 2, length + 1, (2, rows, 1))
  source, tokens, label = rng.integers(0, vocab_size, (3, rows, length)).astype(np.int32)
  exists = np.arange(length) < counts
  arrays = {
    "source": source,
    "source_segments": np.where(exists[0], 0, -1).astype(np.int32),
    "tokens": tokens,
    "label": np.where(exists[1], label, -1).astype(np.int32),
  }
  return data.Source(arrays, vocab_size, ignore_label=-1, name="pairs")
