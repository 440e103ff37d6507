"""Reads and writes Whisper as released: a folder with config.json and model.safetensors.

config = read_whisper_config("whisper-tiny.en")
teacher = load_whisper("whisper-tiny.en")
...
save_whisper("student", result.variables, student_config)  # transformers reads it
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.models.adapters.nnx import from_nnx
from distill_jax.models.released_folder import (
  GENERATION,
  WEIGHTS,
  check_same_shapes,
  read_settings,
  weights_path,
)
from distill_jax.models.save_weights import Target, save_weights
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.models.seq2seq.seq2seq_names import seq2seq_names
from distill_jax.models.speech.whisper import INPUTS, Whisper
from distill_jax.models.speech.whisper_config import WhisperConfig
from distill_jax.models.weights import Origin, pretrained, torch_kernel
from distill_jax.storage import files, folders
from distill_jax.types import Model, Variables

_SIZES = {  # An argument of WhisperConfig, and its name in config.json.
  "vocab_size": "vocab_size",
  "embed_dim": "d_model",
  "encoder_layers": "encoder_layers",
  "decoder_layers": "decoder_layers",
  "num_heads": "encoder_attention_heads",
  "mlp_dim": "encoder_ffn_dim",
  "num_features": "num_mel_bins",
  "source_length": "max_source_positions",
  "max_length": "max_target_positions",
}
_FIXED = {"activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True}
_SUPPRESSED = {  # Of config.json, or of generation_config.json, which prevails.
  "suppressed_tokens": "suppress_tokens",
  "begin_suppressed_tokens": "begin_suppress_tokens",
}
_TIED = "proj_out.weight"  # Older files have the embeddings twice.
_OUTER = {
  "params/embed/embedding": "model.decoder.embed_tokens.weight",
  "params/positions": "model.decoder.embed_positions.weight",
  "params/encoder/positions": "model.encoder.embed_positions.weight",
}


def read_whisper_config(folder: str | os.PathLike) -> WhisperConfig:
  """Returns the `WhisperConfig` of a released folder.

  The suppressed tokens are those of generation_config.json, or of config.json where it has none.

  Raises:
    FileNotFoundError: config.json does not exist.
    ValueError: one is corrupt, of another family, or has a setting that `Whisper` does not have.
    KeyError: a size is missing.
  """
  folder = folders.resolve(folder, "folder")
  settings = read_settings(folder)
  if settings.get("model_type") != "whisper":
    raise ValueError(f"model_type: expected 'whisper', got {settings.get('model_type')!r}")
  for name, value in _FIXED.items():
    if settings.get(name, value) != value:
      raise ValueError(f"{name}: expected {value!r} in a Whisper, got {settings[name]!r}")
  for size in ("attention_heads", "ffn_dim"):
    encoder, decoder = (settings[f"{side}_{size}"] for side in ("encoder", "decoder"))
    if encoder != decoder:
      raise ValueError(f"decoder_{size}: expected {encoder}, that of the encoder, got {decoder}")
  sizes = {field: settings[name] for field, name in _SIZES.items()}
  generation = settings
  if (folder / GENERATION).exists():
    generation = settings | read_settings(folder, GENERATION)
  suppressed: dict[str, Any] = {  # Defaults of transformers may lie outside a small vocabulary.
    field: tuple(token for token in generation.get(name) or () if token < sizes["vocab_size"])
    for field, name in _SUPPRESSED.items()
  }
  return WhisperConfig(
    **sizes,
    start_token=settings.get("decoder_start_token_id"),
    end_token=settings.get("eos_token_id"),
    **suppressed,
  )


def load_whisper(
  folder: str | os.PathLike,
  config: WhisperConfig | None = None,
  *,
  inputs: Sequence[str] = INPUTS,
  ignore: Sequence[str] = (),
  dtype: Any = None,
  remat: str = "",
) -> Model:
  """Returns a released Whisper as a Model: a teacher, or a student that starts from it.

  Args:
    folder: has config.json and model.safetensors, or the index of a checkpoint in several files.
    config: None: the folder's.
    inputs: entries of the batch that it reads, in the order of `Whisper`.
    ignore: patterns of entries of the file that need not be used.
    dtype, remat: as in `Whisper`.

  Raises:
    FileNotFoundError, ValueError, KeyError: as `load_seq2seq`.

  Example in `save_whisper`.
  """
  folder = folders.resolve(folder, "folder")
  config = read_whisper_config(folder) if config is None else config
  model = from_nnx(lambda rngs: Whisper(config, dtype=dtype, remat=remat, rngs=rngs), inputs=inputs)
  names = whisper_names(config)
  return pretrained(
    model, weights_path(folder), {}, names=names, ignore=(_TIED, *ignore), cast=True
  )


def save_whisper(folder: str | os.PathLike, variables: Variables, config: WhisperConfig) -> Path:
  """Writes two files of settings and model.safetensors as Hugging Face's `transformers` has them.

  `WhisperForConditionalGeneration.from_pretrained(folder)` reads them, and so does `load_whisper`.
  Copy the files of the tokenizer and the feature extractor next to them.

  Args:
    folder: created if it is missing.
    variables: of a `Whisper`, such as `models.whole_variables(result.variables)`.
    config: its sizes, with its start and end token.

  Returns:
    The folder, absolute.

  Raises:
    ValueError: the variables are of another network than `config` describes, or it has no tokens.
    OSError: the files cannot be written.

  >>> import tempfile
  >>> config = WhisperConfig(9, 8, 1, 1, 2, source_length=5, start_token=0, end_token=1)
  >>> model = from_nnx(lambda rngs: Whisper(config, rngs=rngs), inputs=INPUTS)
  >>> folder = save_whisper(tempfile.mkdtemp(), model.init(jax.random.key(0), {}), config)
  >>> read_whisper_config(folder) == config, sorted(load_whisper(folder).variables.params)
  (True, ['decoder', 'embed', 'encoder', 'positions'])
  """
  folder = folders.resolve(folder, "folder")
  for field in ("start_token", "end_token"):
    if getattr(config, field) is None:
      raise ValueError(f"{field}: expected a token in the config, got None")
  model = from_nnx(lambda rngs: Whisper(config, rngs=rngs), inputs=INPUTS)
  check_same_shapes(variables.params, jax.eval_shape(model.init, jax.random.key(0), {}).params)
  names = whisper_names(config)

  def targets(leaf: str) -> Target:
    origin = names(leaf)
    return origin if isinstance(origin, str) else (origin[0], _torch_weight)

  folder.mkdir(parents=True, exist_ok=True)
  save_weights(folder / WEIGHTS, Variables(variables.params, {}), names=targets)
  # A folder copied from a release tells languages and tasks, too.
  others = read_settings(folder, GENERATION) if (folder / GENERATION).exists() else {}
  generation = {name: x for name, x in others.items() if name not in _SUPPRESSED.values()}
  generation |= _generation(config)
  for name, settings in (("config.json", _settings(config)), (GENERATION, generation)):
    files.write(folder / name, json.dumps(settings, indent=2) + "\n")
  return folder


def whisper_names(config: WhisperConfig) -> Callable[[str], Origin]:
  """Returns where a released file has a parameter: `names=` of `load_weights`.

  >>> names = whisper_names(WhisperConfig(9, 8, 1, 1, num_heads=2))
  >>> names("params/encoder/stack/blocks/0/inner_norm/scale")
  'model.encoder.layers.0.final_layer_norm.weight'
  """
  # Blocks have the same names as those of Marian.
  sizes = config.embed_dim, config.encoder_layers, config.decoder_layers, config.num_heads
  blocks = seq2seq_names(EncoderDecoderConfig(config.vocab_size, *sizes, family="marian"))

  def name(leaf: str) -> Origin:
    if leaf in _OUTER:
      return _OUTER[leaf]
    parts = leaf.replace("/encoder/stack/", "/encoder/").split("/")
    end = "bias" if parts[-1] == "bias" else "weight"
    if parts[2] == "norm":
      return f"model.{parts[1]}.layer_norm.{end}"
    if parts[2] == "convs":
      entry = f"model.encoder.conv{int(parts[3]) + 1}.{end}"
      return entry if end == "bias" else (entry, torch_kernel)
    return blocks("/".join(parts))

  return name


def _torch_weight(kernel: np.ndarray) -> np.ndarray:
  """Returns PyTorch's weight [outputs, inputs, *window] of a kernel [*window, inputs, outputs]."""
  return kernel.transpose(-1, -2, *range(kernel.ndim - 2))


def _settings(config: WhisperConfig) -> Mapping[str, Any]:
  """Returns the members of config.json."""
  # The network has no dropout: who trains it further chooses.
  return {name: getattr(config, field) for field, name in _SIZES.items()} | {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "torch_dtype": "float32",
    "is_encoder_decoder": True,
    **_FIXED,
    "num_hidden_layers": config.encoder_layers,
    "decoder_attention_heads": config.num_heads,
    "decoder_ffn_dim": config.mlp_dim,
    "decoder_start_token_id": config.start_token,
    "bos_token_id": config.end_token,
    "eos_token_id": config.end_token,
    "pad_token_id": config.end_token,
    "dropout": 0.0,
  }


def _generation(config: WhisperConfig) -> Mapping[str, Any]:
  """Returns the members of generation_config.json, which older versions read in config.json."""
  tokens = {name: list(getattr(config, field)) for field, name in _SUPPRESSED.items()}
  return {name: value for name, value in tokens.items() if value} | {
    "decoder_start_token_id": config.start_token,
    "bos_token_id": config.end_token,
    "eos_token_id": config.end_token,
    "pad_token_id": config.end_token,
    "max_length": config.max_length,
  }
