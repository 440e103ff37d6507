"""An identity for a tree of arrays that does not depend on the order of its keys or on its sharding."""

import hashlib

import jax
import jax.numpy as jnp

from distill_jax.trees import named_leaves
from distill_jax.types import Tree


def fingerprint(tree: Tree) -> str:
  """A 32-digit hexadecimal identity of a tree: names, shapes, dtypes and every bit of every leaf.

  Each leaf is summed where it lies (`checksums`), so nothing but 4 bytes a leaf leaves the devices. The names
  are sorted, so dicts that were filled in another order agree; 0.0 and -0.0 differ. It notices accidents, and
  is no defense against somebody who wants two trees to agree.
  """
  digest = hashlib.sha256()
  sums = checksums(tree)
  shapes = dict(named_leaves(tree))
  for name in sorted(sums):
    leaf = shapes[name]
    digest.update(f"{name} {tuple(leaf.shape)} {leaf.dtype} {sums[name]:08x}\n".encode())
  return digest.hexdigest()[:32]


def checksums(tree: Tree) -> dict[str, int]:
  """Per leaf, the sum of its mixed 32-bit words modulo 2^32: a change of any one word changes it.

  Each word is offset by its position and passed through a bijection (MurmurHash3's finalizer), so a changed
  word always moves the sum, and changes of several words do not cancel as plain sums do (negating two
  numbers). Integer sums do not depend on their order, hence not on the sharding.
  """
  leaves = dict(named_leaves(tree))
  return {name: int(s) for name, s in jax.device_get(_checksums(leaves)).items()}


@jax.jit
def _checksums(leaves):
  return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(leaf) -> jax.Array:
  leaf = jnp.asarray(leaf)
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    leaf = jnp.stack([leaf.real, leaf.imag], -1)
  # 64-bit leaves become two 32-bit words each; 8 and 16-bit ones are one word each.
  target = jnp.uint32 if leaf.dtype.itemsize >= 4 else jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
  words = jax.lax.bitcast_convert_type(leaf, target).reshape(-1).astype(jnp.uint32)
  words = words + jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B1)
  words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
  return (words ^ (words >> 16)).sum(dtype=jnp.uint32)
