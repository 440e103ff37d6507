"""How large a sparse network is: numbers that are not zero, layer by layer, and bytes on disk."""

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax

from distill_jax.trees import named_leaves
from distill_jax.types import Tree

_CHUNK = 1 << 22


class Layer(NamedTuple):
  """One array of a network.

  Attributes:
    name: its path.
    parameters: numbers in it.
    zeros: those of them that are zero.
  """

  name: str
  parameters: int
  zeros: int

  @property
  def share(self) -> float:
    """Of zeros; 0 of an array that is empty."""
    return self.zeros / max(1, self.parameters)


class Disk(NamedTuple):
  """Bytes of a network in the format of `export_student`.

  Attributes:
    dense: as it is written; zeros take as much as other numbers.
    compressed: by DEFLATE at its default level, as gzip does: what single zeros save.
  """

  dense: int
  compressed: int


def layer_zeros(params: Tree) -> list[Layer]:
  """The arrays of a network in their order, a row each of the table of layer-wise sparsity.

  Args:
    params: arrays, wherever they lie; they are counted there.
  """
  leaves = named_leaves(params)
  zeros = jax.device_get(_zeros([leaf for _, leaf in leaves]))
  return [
    Layer(name, leaf.size, int(count)) for (name, leaf), count in zip(leaves, zeros, strict=True)
  ]


def nonzeros(params: Tree) -> int:
  """The numbers of a network that are not zero."""
  return sum(layer.parameters - layer.zeros for layer in layer_zeros(params))


def disk_bytes(network: str | os.PathLike | Tree) -> Disk:
  """What a network takes on disk.

  Args:
    network: the folder of an exported student, its safetensors file, or a tree of arrays, such as `Variables`.

  Raises:
    FileNotFoundError: there is no such file, or no `model.safetensors` in the folder.
  """
  if not isinstance(network, (str, os.PathLike)):
    data = safetensors.flax.save({name: jnp.asarray(leaf) for name, leaf in named_leaves(network)})
    return Disk(len(data), len(zlib.compress(data)))
  path = Path(network)
  path = path / "model.safetensors" if path.is_dir() else path
  compressor, size = zlib.compressobj(), 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      size += len(compressor.compress(chunk))
  return Disk(path.stat().st_size, size + len(compressor.flush()))


@jax.jit
def _zeros(leaves):
  return [jnp.sum(leaf == 0, dtype=np.int32) for leaf in leaves]
