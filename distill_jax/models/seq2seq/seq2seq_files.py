"""Reads and writes T5 and Marian as released: a folder with config.json and model.safetensors.

config = read_seq2seq_config("opus-mt-en-fr")
teacher = load_seq2seq("opus-mt-en-fr")
student_config = dataclasses.replace(config, decoder_layers=2)
...
save_seq2seq("student", result.variables, student_config)  # transformers reads it
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from distill_jax.models.adapters.nnx import from_nnx
from distill_jax.models.released_folder import (
  WEIGHTS,
  check_same_shapes,
  entries_of,
  read_settings,
  weights_path,
)
from distill_jax.models.save_weights import save_weights
from distill_jax.models.seq2seq.encoder_decoder import INPUTS, EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.seq2seq.seq2seq_names import seq2seq_names, written_names
from distill_jax.models.seq2seq.seq2seq_settings import config_of_settings, released_settings
from distill_jax.models.weights import pretrained
from distill_jax.storage import files, folders
from distill_jax.types import Model, Variables

_IGNORED = (
  "*.embed_positions.weight",  # Sines are computed.
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # T5 never reads it.
)
_COPIES = ("*.embed_tokens.weight", "lm_head.weight")
"""Older files have shared embeddings several times."""


def read_seq2seq_config(folder: str | os.PathLike) -> EncoderDecoderConfig:
  """Returns the `EncoderDecoderConfig` of a released folder, with its start and end token.

  Raises:
    FileNotFoundError: config.json does not exist.
    ValueError: it is corrupt, of another family, or has a setting that `EncoderDecoder` does not
      have: its outputs would be wrong.
    KeyError: a size is missing.
  """
  return config_of_settings(read_settings(folders.resolve(folder, "folder")))


def load_seq2seq(
  folder: str | os.PathLike,
  config: EncoderDecoderConfig | None = None,
  *,
  inputs: Sequence[str] = INPUTS,
  ignore: Sequence[str] = (),
  dtype: Any = None,
  remat: str = "",
) -> Model:
  """Returns a released T5 or Marian as a Model: a teacher, or a student that starts from it.

  Args:
    folder: has config.json and model.safetensors, or the index of a checkpoint in several files.
    config: None: the folder's. Another one may have other values that no parameter shows, such as
      `max_length` of T5.
    inputs: entries of the batch that it reads, in the order of `EncoderDecoder`.
    ignore: patterns of entries of the file that need not be used.
    dtype, remat: as in `EncoderDecoder`.

  Raises:
    FileNotFoundError: config.json or the weights do not exist.
    ValueError: as `read_seq2seq_config`; or entries that are missing, unexpected or of another
      shape: a line for each.
  """
  folder = folders.resolve(folder, "folder")
  config = read_seq2seq_config(folder) if config is None else config
  path = weights_path(folder)
  names = seq2seq_names(config, frozenset(entries_of(path)))
  model = _model(config, inputs, dtype=dtype, remat=remat)
  copies = _COPIES if config.tie_embeddings and not config.source_vocab_size else _COPIES[:1]
  if config.source_vocab_size:
    copies = ("model.shared.weight",)
  return pretrained(model, path, {}, names=names, ignore=(*_IGNORED, *copies, *ignore), cast=True)


def save_seq2seq(
  folder: str | os.PathLike, variables: Variables, config: EncoderDecoderConfig
) -> Path:
  """Writes config.json and model.safetensors as Hugging Face's `transformers` has them.

  `AutoModelForSeq2SeqLM.from_pretrained(folder)` reads them, and so does `load_seq2seq`. Copy the
  tokenizer's files next to them.

  Args:
    folder: created if it is missing.
    variables: of an `EncoderDecoder`, such as `result.variables`.
    config: its sizes, with the family 't5' or 'marian' and its start and end token.

  Returns:
    The folder, absolute.

  Raises:
    ValueError: the variables are of another network than `config` describes, or transformers does
      not have such networks.
    OSError: the files cannot be written.

  >>> import tempfile
  >>> config = EncoderDecoderConfig(9, 8, 1, 1, 2, family="t5", start_token=0, end_token=1)
  >>> model = from_nnx(lambda rngs: EncoderDecoder(config, rngs=rngs), inputs=INPUTS)
  >>> folder = save_seq2seq(tempfile.mkdtemp(), model.init(jax.random.key(0), {}), config)
  >>> sorted(path.name for path in folder.iterdir())
  ['config.json', 'model.safetensors']
  >>> read_seq2seq_config(folder) == config, sorted(load_seq2seq(folder).variables.params)
  (True, ['decoder', 'embed', 'encoder'])
  """
  folder = folders.resolve(folder, "folder")
  settings = released_settings(config)
  expected = jax.eval_shape(_model(config, INPUTS).init, jax.random.key(0), {}).params
  check_same_shapes(variables.params, expected)
  folder.mkdir(parents=True, exist_ok=True)
  save_weights(folder / WEIGHTS, Variables(variables.params, {}), names=written_names(config))
  files.write(folder / "config.json", settings)
  return folder


def _model(config: EncoderDecoderConfig, inputs: Sequence[str], **options: Any) -> Model:
  return from_nnx(lambda rngs: EncoderDecoder(config, **options, rngs=rngs), inputs=inputs)
