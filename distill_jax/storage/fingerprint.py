"""Hashes a tree of arrays, independent of the order of its keys and of its sharding."""

import hashlib

import jax
import jax.numpy as jnp

from distill_jax.trees import named_leaves
from distill_jax.types import Tree


def fingerprint(tree: Tree) -> str:
  """Returns 32 hexadecimal digits that depend on names, shapes, dtypes and every bit of every leaf.

  Each leaf is summed on its own devices (`checksums`), so only 4 bytes a leaf leave them. The names
  are sorted, so dicts that were filled in another order agree; 0.0 and -0.0 differ. It detects
  accidents, not attacks.
  """
  digest = hashlib.sha256()
  sums = checksums(tree)
  leaves = dict(named_leaves(tree))
  for name in sorted(sums):
    leaf = leaves[name]
    digest.update(f"{name} {tuple(leaf.shape)} {leaf.dtype} {sums[name]:08x}\n".encode())
  return digest.hexdigest()[:32]


def checksums(tree: Tree) -> dict[str, int]:
  """Returns for each leaf the sum of its mixed 32-bit words modulo 2^32.

  A change of any one word changes it: each word is offset by its position and passed through a
  bijection (MurmurHash3's finalizer), so a changed word always changes the sum, and changes of
  several words do not cancel as in plain sums (negating two values). Integer sums do not depend on
  their order, hence not on the sharding.
  """
  sums = jax.device_get(_checksums(dict(named_leaves(tree))))
  return {name: int(leaf_sum) for name, leaf_sum in sums.items()}


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
  # A 64-bit value becomes two 32-bit words; one of 8 or 16 bits is one word.
  target = jnp.uint32 if leaf.dtype.itemsize >= 4 else jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
  words = jax.lax.bitcast_convert_type(leaf, target).reshape(-1).astype(jnp.uint32)
  words = words + jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B1)
  words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
  return (words ^ (words >> 16)).sum(dtype=jnp.uint32)
