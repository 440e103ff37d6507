"""Stores the head of a language model once for a cache of hidden states, next to the manifest.

`head-DIGEST` holds the bytes of the kernel [W, V] in the teacher's dtype, row by row,
little-endian, then those of the bias [V] if there is one. The digest is the first 32 hexadecimal
digits of their sha256. Digest, shapes, dtypes and soft-cap are a part of the cache's identity,
`teacher.head`.

With float32 hidden states nothing is lost. Bytes per token, of a vocabulary of 128,256 and hidden
states of 4,096:

    Dense("float16") of the logits    256,512
    Dense("float32") of 'hidden'       16,384
    Dense("float16") of 'hidden'        8,192    the same with bfloat16
    Dense("int8") of 'hidden'           4,100
    TopK(64) of the logits                208    biased, see `losses.sparse_kl`
    RandomSampling(50) of the logits      108

and the head once: 1,050,673,152 bytes in bfloat16.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.codec import output_of
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.shards import Incomplete, map_file
from distill_jax.types import Model, Variables

PREFIX = "head-"
DIGITS = 32


class LMHead(NamedTuple):
  """The layer logits = cap(hidden @ kernel + bias), host arrays.

  Attributes:
    kernel: [W, V].
    bias: [V] or None.
    softcap: a number or None.
  """

  kernel: np.ndarray
  bias: np.ndarray | None
  softcap: float | None

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The kernel, and the bias if there is one."""
    return {"kernel": self.kernel} | ({} if self.bias is None else {"bias": self.bias})


def head_of(
  model: Model, variables: Variables, outputs: Iterable[str], arrays: Mapping[str, Any]
) -> LMHead | None:
  """Returns the teacher's head; None without a head, or where no hidden states are stored.

  Args:
    model, variables: the teacher.
    outputs: names of the outputs to store.
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    ValueError: kernel or bias have another rank, or do not fit one another.
  """
  if "hidden" not in map(output_of, outputs):
    return None
  batch = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in arrays.items()}
  batch["view"] = np.zeros(1, np.int32)

  # The compiler leaves out all of the network that the head does not need.
  @jax.jit
  def head(variables: Any, batch: Any):
    output = model.apply(*variables, batch, train=False, key=None)[0].get("head")
    if output is None:
      return None
    kernel, bias, softcap = output
    return kernel, bias, None if softcap is None else jnp.asarray(softcap, jnp.result_type(float))

  values = jax.device_get(head(tuple(variables), batch))
  if values is None:
    return None
  kernel, bias, softcap = values
  if kernel.ndim != 2 or (bias is not None and bias.shape != kernel.shape[1:]):
    raise ValueError(
      "head: expected a kernel [W, V] and a bias [V] or None, "
      f"got {kernel.shape} and {getattr(bias, 'shape', None)}"
    )
  return LMHead(kernel, bias, None if softcap is None else float(softcap))


def head_identity(head: LMHead) -> dict[str, Any]:
  """Returns the head as plain values, for a cache's identity."""
  arrays = {
    name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in head.arrays.items()
  }
  sha256 = hashlib.sha256()
  for data in _buffers(head):
    sha256.update(data)
  return arrays | {"softcap": head.softcap, "sha256": sha256.hexdigest()[:DIGITS]}


def write_head(store: Store, head: LMHead, identity: Mapping[str, Any]) -> None:
  """Writes the head; `identity` is its `head_identity`.

  Raises:
    StoreError: it cannot be written.
  """
  store.put(_key(identity), b"".join(_buffers(head)))


def has_head(store: Store, identity: Mapping[str, Any]) -> bool:
  """Returns whether the head is stored.

  Raises:
    StoreError: the store cannot be listed.
  """
  return _key(identity) in store.keys(PREFIX)


def check_has_head(store: Store, identity: Mapping[str, Any]) -> None:
  """Raises Incomplete unless the head is stored."""
  if not has_head(store, identity):
    raise _missing_head(store, identity)


def read_head(store: Store, identity: Mapping[str, Any]) -> LMHead:
  """Returns the head after a comparison of its checksum; a local file is memory-mapped.

  Raises:
    Incomplete: it is missing.
    CorruptCache: it was changed.
    StoreError: it cannot be read.
  """
  key = _key(identity)
  path = store.path(key)
  data = store.read(key) if path is None else map_file(path)
  if data is None:
    raise _missing_head(store, identity)
  if hashlib.sha256(data).hexdigest()[:DIGITS] != identity["sha256"]:
    raise CorruptCache(f"{store.url}/{key}", "is corrupt: it is not the head that was written")
  arrays = {}
  start = 0
  for name, dtype, shape in _layout(identity):
    end = start + dtype.itemsize * math.prod(shape)
    arrays[name] = np.frombuffer(data, np.uint8)[start:end].view(dtype).reshape(shape)
    start = end
  return LMHead(arrays["kernel"], arrays.get("bias"), identity["softcap"])


def head_bytes(identity: Mapping[str, Any]) -> int:
  """Returns the number of bytes of the head with this `head_identity`."""
  return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in _layout(identity))


def _missing_head(store: Store, identity: Mapping[str, Any]) -> Incomplete:
  return Incomplete(
    f"{store.url}/{_key(identity)}, the teacher's head, is missing. Run the cache stage again: it "
    "writes what is missing."
  )


def _layout(identity: Mapping[str, Any]) -> list[tuple[str, np.dtype, list[int]]]:
  names = [name for name in ("kernel", "bias") if name in identity]
  return [(name, jnp.dtype(identity[name]["dtype"]), identity[name]["shape"]) for name in names]


def _key(identity: Mapping[str, Any]) -> str:
  return PREFIX + identity["sha256"]


def _buffers(head: LMHead) -> list[memoryview]:
  # As bytes, because bfloat16 has no buffer of its own.
  return [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in head.arrays.values()]
