"""Measures a sparse network: values that are not zero, layer by layer, and bytes on disk."""

import os
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax

from distill_jax.storage import folders
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

_CHUNK = 1 << 22


class Layer(NamedTuple):
  """The size of one array of a network.

  Attributes:
    name: its path.
    parameters: number of values in it.
    zeros: number of those that are zero.
  """

  name: str
  parameters: int
  zeros: int

  @property
  def sparsity(self) -> float:
    """The fraction of zeros; 0 for an empty array."""
    return self.zeros / max(1, self.parameters)


class DiskSize(NamedTuple):
  """The bytes of a network in the format of `export_student`.

  Attributes:
    dense: size of the file; zeros take as much as other values.
    compressed: size after DEFLATE at its default level, as of gzip: it shows what zeros save.
  """

  dense: int
  compressed: int


def layer_zeros(params: Tree) -> list[Layer]:
  """Returns the arrays of a network in their order, the rows of a table of layer-wise sparsity.

  Args:
    params: tree of arrays, counted on their devices.
  """
  leaves = named_leaves(params)
  zeros = jax.device_get(_zeros([leaf for _, leaf in leaves]))
  return [
    Layer(name, leaf.size, int(count)) for (name, leaf), count in zip(leaves, zeros, strict=True)
  ]


def disk_bytes(network: str | os.PathLike | Tree) -> DiskSize:
  """Returns the bytes that a network takes on disk.

  Args:
    network: the folder of an exported student, its safetensors file, or a tree of arrays, such as
      `Variables`.

  Raises:
    FileNotFoundError: there is no such file, or no `model.safetensors` in the folder.
  """
  if not isinstance(network, (str, os.PathLike)):
    data = safetensors.flax.save({name: jnp.asarray(leaf) for name, leaf in named_leaves(network)})
    return DiskSize(len(data), len(zlib.compress(data)))
  path = folders.resolve(network, "network")
  path = path / "model.safetensors" if path.is_dir() else path
  compressor = zlib.compressobj()
  compressed = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      compressed += len(compressor.compress(chunk))
  compressed += len(compressor.flush())
  return DiskSize(path.stat().st_size, compressed)


@jax.jit
def _zeros(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.sum(leaf == 0, dtype=np.int32) for leaf in leaves]
