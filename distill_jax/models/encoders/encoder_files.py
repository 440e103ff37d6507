"""Reads and writes encoders as released: a folder with config.json and model.safetensors.

config = read_encoder_config("all-MiniLM-L6-v2")
teacher = load_encoder("all-MiniLM-L6-v2")
student_config = dataclasses.replace(config, num_layers=2)
...
save_encoder("student", result.variables, student_config)  # transformers and others read it
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.adapters.nnx import from_nnx
from distill_jax.models.encoders.encoder import Encoder
from distill_jax.models.encoders.encoder_config import EncoderConfig
from distill_jax.models.encoders.encoder_names import encoder_names, family_prefix, released_names
from distill_jax.models.encoders.released_config import config_of_settings, released_settings
from distill_jax.models.released_folder import (
  WEIGHTS,
  check_same_shapes,
  entries_of,
  read_settings,
  weights_path,
)
from distill_jax.models.save_weights import save_weights
from distill_jax.models.weights import load_weights, pretrained
from distill_jax.storage import files, folders
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Variables

INPUTS = ("tokens", "segments", "token_types")
"""The entries of a batch that a loaded encoder reads; the first two where all types are one."""
# Heads of masked tokens, and positions that are no parameters.
_IGNORED = ("*position_ids", "cls.*", "lm_head.*", "vocab_*", "decoder.*")
_NEW = ("pooler", "pooler_norm", "head", "head_bias")
"""Layers that a file may lack: they start from random weights."""
_HEADS = ("head.", "pre_classifier.")
_POOLERS = ("pooler.dense.weight", "pre_classifier.weight", "classifier.dense.weight")


def read_encoder_config(folder: str | os.PathLike) -> EncoderConfig:
  """Returns the `EncoderConfig` of a released folder.

  Its head is the one that config.json names; that of a pretraining task is left out:
  `dataclasses.replace(config, head="masked")` keeps the one of masked tokens.

  Raises:
    FileNotFoundError: config.json or the weights do not exist.
    ValueError: another family, or a setting that `Encoder` does not have: its outputs would be
      wrong.
    KeyError: a size is missing.
  """
  folder = folders.resolve(folder, "folder")
  settings = read_settings(folder)
  names = entries_of(weights_path(folder))
  return config_of_settings(settings, pooler=any(name.endswith(_POOLERS) for name in names))


def load_encoder(
  folder: str | os.PathLike,
  config: EncoderConfig | None = None,
  *,
  inputs: Sequence[str] | None = None,
  ignore: Sequence[str] = (),
  dtype: Any = None,
  remat: str = "",
) -> Model:
  """Returns a released encoder as a Model: a teacher, or a student that starts from it.

  Args:
    folder: has config.json and model.safetensors, or the index of a checkpoint in several files.
    config: None: the folder's. Another one may add a head to it,
      `dataclasses.replace(read_encoder_config(folder), head="sequence", num_labels=3)`: where the
      file has no head, or no pooler, it starts from random weights, and the Model has no
      `variables`, so train it first.
    inputs: entries of the batch that it reads, in the order of `Encoder`; None: `INPUTS`.
    ignore: patterns of further entries of the file that need not be used, such as 'classifier.*'.
    dtype, remat: as in `Encoder`.

  Raises:
    FileNotFoundError: config.json or the weights do not exist.
    ValueError: as `read_encoder_config`; or entries that are missing, unexpected or of another
      shape: a line for each.
  """
  folder = folders.resolve(folder, "folder")
  config = read_encoder_config(folder) if config is None else config
  inputs = INPUTS[: 3 if (config.token_types or 0) > 1 else 2] if inputs is None else inputs
  model = from_nnx(lambda rngs: Encoder(config, dtype=dtype, remat=remat, rngs=rngs), inputs=inputs)
  path = weights_path(folder)
  entries = entries_of(path)
  names = _names_in_file(config, entries)
  like = jax.eval_shape(model.init, jax.random.key(0), {})
  new = [
    leaf
    for leaf, _ in named_leaves(like)
    if leaf.split("/")[1] in _NEW and _entry(names, leaf) not in entries
  ]
  used = {_entry(names, leaf) for leaf, _ in named_leaves(like)}
  # The heads of tokens read no pooler, RoBERTa's 'sequence' has a layer of its own, and the head of
  # ModernBERT may be that of masked tokens.
  unused = [e for e in entries - used if ".pooler." in f".{e}" or e.startswith(_HEADS)]
  options = {"names": names, "ignore": (*_IGNORED, *ignore, *unused), "cast": True}
  if not new:
    return pretrained(model, path, {}, **options)
  return _with_new_layers(model, path, like, new, options)


def save_encoder(folder: str | os.PathLike, variables: Variables, config: EncoderConfig) -> Path:
  """Writes config.json and model.safetensors as Hugging Face's `transformers` has them.

  `AutoModel.from_pretrained(folder)` reads them, and so does `load_encoder`. Copy the tokenizer's
  files next to them.

  Args:
    folder: created if it is missing.
    variables: of an `Encoder`, such as `result.variables`.
    config: its sizes and head.

  Returns:
    The folder, absolute.

  Raises:
    ValueError: the variables are of another network than `config` describes.
    OSError: the files cannot be written.

  >>> import tempfile
  >>> config = EncoderConfig(9, 8, num_layers=1, num_heads=2)
  >>> model = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs="tokens")
  >>> variables = model.init(jax.random.key(0), {})
  >>> folder = save_encoder(tempfile.mkdtemp(), variables, config)
  >>> sorted(path.name for path in folder.iterdir())
  ['config.json', 'model.safetensors']
  >>> read_encoder_config(folder) == config, sorted(load_encoder(folder).variables.params)[:2]
  (True, ['blocks', 'embed'])
  """
  folder = folders.resolve(folder, "folder")
  model = from_nnx(lambda rngs: Encoder(config, rngs=rngs), inputs="tokens")
  expected = jax.eval_shape(model.init, jax.random.key(0), {}).params
  check_same_shapes(variables.params, expected)
  folder.mkdir(parents=True, exist_ok=True)
  save_weights(folder / WEIGHTS, Variables(variables.params, {}), names=released_names(config))
  files.write(folder / "config.json", released_settings(config))
  return folder


def _with_new_layers(model: Model, path: Path, like: Variables, new: list[str], options) -> Model:
  """Returns a Model whose `init` has the file's weights, and random ones in the leaves `new`."""
  stored = {name: leaf for name, leaf in named_leaves(like) if name not in new}
  loaded = load_weights(path, stored, **options)

  def init(key: jax.Array, batch: Batch) -> Variables:
    variables = model.init(key, batch)
    leaves = [jnp.copy(loaded.get(name, leaf)) for name, leaf in named_leaves(variables)]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)

  return model._replace(init=init)


def _names_in_file(config: EncoderConfig, entries: set[str]):
  """Returns the names of parameters in a file, which may have the prefix and old names of norms."""
  names = encoder_names(config, prefix=any(e.startswith(family_prefix(config)) for e in entries))

  def name(leaf):
    origin = names(leaf)
    if not isinstance(origin, str):
      return origin
    old = origin.replace("LayerNorm.weight", "LayerNorm.gamma")
    old = old.replace("LayerNorm.bias", "LayerNorm.beta")
    return old if old in entries else origin

  return name


def _entry(names, leaf: str) -> str:
  origin = names(leaf)
  return origin if isinstance(origin, str) else origin[0]
