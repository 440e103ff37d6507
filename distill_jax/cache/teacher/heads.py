"""The head of a language model whose hidden states are kept: once for the whole cache, beside the manifest.

`head-DIGEST` holds the bytes of the kernel [W, V] in the teacher's dtype, row by row, little-endian, then those of the
bias [V] if there is one. The digest is the first 32 hexadecimal digits of their sha256; it, the shapes, the dtypes and
the soft-cap are a part of the cache's identity, `teacher.head`.

With float32 hidden states nothing is lost. Bytes per token, of a vocabulary of 128,256 and hidden states of 4,096:

    Dense("float16") of the logits    256,512
    Dense("float32") of 'hidden'       16,384
    Dense("float16") of 'hidden'        8,192    bfloat16 the same
    Dense("int8") of 'hidden'           4,100
    TopK(64) of the logits                208    biased, see `losses.sparse_kl`
    RandomSampling(50) of the logits             108

and the head once: 1,050,673,152 bytes in bfloat16.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.cache.codecs.dense import output_of
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.shards import Incomplete, mapped
from distill_jax.types import Model, Variables

PREFIX, DIGITS = "head-", 32


class Head(NamedTuple):
  """logits = cap(hidden @ kernel + bias); host arrays [W, V] and [V] or None, a number or None."""

  kernel: np.ndarray
  bias: np.ndarray | None
  softcap: float | None

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """Those that there are."""
    return {"kernel": self.kernel} | ({} if self.bias is None else {"bias": self.bias})


def head_of(
  model: Model, variables: Variables, outputs: Iterable[str], arrays: Mapping[str, Any]
) -> Head | None:
  """The teacher's head; None where it gives none, or none of its hidden states are among the outputs to keep.

  Args:
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    ValueError: kernel or bias have another rank, or do not fit one another.
  """
  if "hidden" not in map(output_of, outputs):
    return None
  example = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in arrays.items()}

  @jax.jit  # which leaves out all of the network that the head does not need
  def given(variables, batch):
    head = model.apply(*variables, batch, train=False, key=None)[0].get("head")
    if head is None:
      return None
    kernel, bias, softcap = head
    return kernel, bias, None if softcap is None else jnp.asarray(softcap, jnp.result_type(float))

  found = jax.device_get(given(tuple(variables), example | {"view": np.zeros(1, np.int32)}))
  if found is None:
    return None
  kernel, bias, softcap = found
  if kernel.ndim != 2 or (bias is not None and bias.shape != kernel.shape[1:]):
    raise ValueError(
      f"the teacher's 'head' has a kernel {kernel.shape} and a bias {getattr(bias, 'shape', None)}: expected [W, V] "
      "and [V] or None"
    )
  return Head(kernel, bias, None if softcap is None else float(softcap))


def about(head: Head) -> dict[str, Any]:
  """The head as plain values, for a cache's identity."""
  arrays = {
    name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in head.arrays.items()
  }
  whole = hashlib.sha256()
  for part in _bytes(head):
    whole.update(part)
  return arrays | {"softcap": head.softcap, "sha256": whole.hexdigest()[:DIGITS]}


def write(store: Store, head: Head, described: Mapping[str, Any]) -> None:
  """Writes the head; `described` is what `about` gave.

  Raises:
    StoreError: it cannot be written.
  """
  store.put(_key(described), b"".join(_bytes(head)))


def is_there(store: Store, described: Mapping[str, Any]) -> bool:
  """Whether it was written.

  Raises:
    StoreError: the store cannot be listed.
  """
  return _key(described) in store.keys(PREFIX)


def check_there(store: Store, described: Mapping[str, Any]) -> None:
  """Raises Incomplete where it was not."""
  if not is_there(store, described):
    raise _missing(store, described)


def read(store: Store, described: Mapping[str, Any]) -> Head:
  """The head, every bit compared with its checksum; a local file is mapped into memory.

  Raises:
    Incomplete: it is not there.
    CorruptCache: it was changed.
    StoreError: it cannot be read.
  """
  key = _key(described)
  path = store.path(key)
  data = store.read(key) if path is None else mapped(path)
  if data is None:
    raise _missing(store, described)
  if hashlib.sha256(data).hexdigest()[:DIGITS] != described["sha256"]:
    raise CorruptCache(f"{store.url}/{key}", "is damaged: it is not the head that was written")
  arrays, start = {}, 0
  for name, dtype, shape in _layout(described):
    end = start + dtype.itemsize * math.prod(shape)
    arrays[name] = np.frombuffer(data, np.uint8)[start:end].view(dtype).reshape(shape)
    start = end
  return Head(arrays["kernel"], arrays.get("bias"), described["softcap"])


def size(described: Mapping[str, Any]) -> int:
  """How many bytes it has."""
  return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in _layout(described))


def _missing(store: Store, described: Mapping[str, Any]) -> Incomplete:
  return Incomplete(
    f"{store.url}/{_key(described)}, the teacher's head, is missing. Run the cache stage again: it writes what is "
    "missing."
  )


def _layout(described: Mapping[str, Any]) -> list[tuple[str, np.dtype, list[int]]]:
  names = [name for name in ("kernel", "bias") if name in described]
  return [(name, jnp.dtype(described[name]["dtype"]), described[name]["shape"]) for name in names]


def _key(described: Mapping[str, Any]) -> str:
  return PREFIX + described["sha256"]


def _bytes(head: Head) -> list[memoryview]:
  """Of one array after the other; bfloat16 itself is no buffer."""
  return [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in head.arrays.values()]
