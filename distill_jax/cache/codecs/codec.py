"""Names codecs: their union, their JSON form, and the mapping from outputs to codecs."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from distill_jax.cache.codecs.codes import Codes
from distill_jax.cache.codecs.dense_codec import Dense
from distill_jax.cache.codecs.random_sampling import RandomSampling
from distill_jax.cache.codecs.top_k import TopK
from distill_jax.errors import suggest

Codec = Dense | TopK | RandomSampling | Codes


def output_of(name: str) -> str:
  """Returns the teacher's output that a name stores: the part before '@'.

  One output may thus be stored in several ways.

  >>> output_of("logits@top8")
  'logits'
  """
  return name.partition("@")[0]


def to_json(codec: Codec) -> dict[str, Any]:
  """Returns the codec as plain values, for a cache's identity."""
  fields = dataclasses.asdict(codec)
  # JSON has no tuple, and a cache's identity is compared with the one that it has read.
  lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
  return {"name": type(codec).__name__} | fields | lists


def from_json(values: Mapping[str, Any]) -> Codec:
  """Returns the codec of `to_json`.

  Raises:
    ValueError: an unknown codec, an unknown or missing field, or a value outside its range.
  """
  codecs = {codec.__name__: codec for codec in (Dense, TopK, RandomSampling, Codes)}
  name = values.get("name")
  if name not in codecs:
    raise ValueError(f"codec: expected a known name, got {name!r}{suggest(str(name), codecs)}")
  fields = {field: value for field, value in values.items() if field != "name"}
  expected = [field.name for field in dataclasses.fields(codecs[name])]
  if set(fields) != set(expected):
    raise ValueError(f"codec {name}: expected the fields {expected}, got {sorted(fields)}")
  return codecs[name](**fields)


def check_outputs(outputs: Any) -> dict[str, Codec]:
  """Returns the outputs to store, at least one, each with its codec; of `Dense` ones it is decided
  by name whether they are logits.

  Args:
    outputs: mapping from output to codec; None: float16 logits.

  Raises:
    ValueError: an empty or another argument, a value that is no codec, or an unusable name.
  """
  if outputs is None:
    return {"logits": Dense(logits=True)}
  example = "such as {'logits': Dense('float16')}"
  if not isinstance(outputs, Mapping):
    raise ValueError(
      f"outputs: expected a mapping from output to codec, {example}; got {type(outputs).__name__}"
    )
  if not outputs:
    raise ValueError(f"outputs: expected at least one, {example}; got none")
  for name, codec in outputs.items():
    if not isinstance(codec, Codec):
      raise ValueError(
        f"outputs[{name!r}]: expected Dense, TopK, RandomSampling or Codes, got {codec!r}"
      )
    if "@" in name and not re.fullmatch(r"[^@]+@[\w-]+", name):
      raise ValueError(
        f"outputs[{name!r}]: expected letters, digits, '_' or '-' after the one '@', as in "
        "'logits@top8'"
      )
  return {name: _named(name, codec) for name, codec in outputs.items()}


def _named(name: str, codec: Codec) -> Codec:
  if not isinstance(codec, Dense) or codec.logits is not None:
    return codec
  return dataclasses.replace(codec, logits=output_of(name).split("/")[-1] == "logits")
