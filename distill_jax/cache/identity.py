"""Defines what a cache depends on, as plain values: a run that differs in one is rejected.

    teacher       fingerprint of the weights, outputs for artificial examples, the head where
                  hidden states are stored (`teacher.lm_head`), and the caller's description (its
                  config)
    data          name of the set, dtypes and shapes of the inputs that the teacher reads, digests
                  of the classes' names (a tokenizer's words), of the ids and of each of these
                  inputs; of streamed images also a digest of their files, the crop, and the crop of
                  an artificial image; of text its tokenizer
    augmentation  name, and views of artificial examples, which detect a changed random generator
    outputs       per output: its codec, shape and dtype

The device and the versions that computed a cache are its provenance, not its identity.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.cache.codecs import codec as codecs
from distill_jax.cache.codecs.codec import Codec, output_of
from distill_jax.cache.function_names import function_name
from distill_jax.cache.probes import (
  NUM_PROBES,
  probe_batch,
  probe_of,
  row_sums,
  same_output_sums,
  same_sums,
)
from distill_jax.cache.teacher.lm_head import head_identity, head_of
from distill_jax.data.crops import Crop, as_entries
from distill_jax.data.videos import Streamed
from distill_jax.models.batch_dependencies import entries_read
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.types import Batch, Model, Variables, input_names

Augment = Callable[[Batch], Batch]


def input_specs(arrays: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
  """Returns dtype and shape per example of the inputs of these names."""
  return {name: f"{arrays[name].dtype}{list(arrays[name].shape[1:])}" for name in sorted(names)}


def teacher_entries(
  model: Model,
  variables: Variables,
  outputs: Iterable[str],
  arrays: Mapping[str, Any],
  augment: Augment | None = None,
) -> list[str]:
  """Returns the names of the inputs that the stored outputs depend on.

  A run that changes labels, or another entry that the teacher does not read, reads the same cache.

  Args:
    model, variables: the teacher.
    outputs: names of the outputs to store.
    arrays: examples [N, ...]; only shapes and dtypes are used.
    augment: of the run.
  """
  output_fn = _output_fn(model, outputs)
  batch = probe_batch(arrays)
  read = entries_read(
    lambda variables, batch: output_fn(variables, augment(batch) if augment else batch),
    tuple(variables),
    batch,
  )
  return sorted(read.intersection(input_names(arrays)))


def array_shapes(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of each array."""
  return {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in arrays.items()}


def entry_checksums(values: np.ndarray) -> np.ndarray:
  """Returns the crc32 of each row of an array [N, ...], uint32 [N]."""
  rows = np.ascontiguousarray(values)
  row_bytes = rows.reshape(len(rows), -1).view(np.uint8)
  return np.array([zlib.crc32(row.data) for row in row_bytes], np.uint32)


def join_checksums(checksums: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
  """Returns one checksum of each example from those of its entries, uint32 [rows], never 0."""
  names = sorted(checksums)
  if not names:
    return np.ones(rows, np.uint32)
  columns = np.stack([checksums[name] for name in names], 1)
  return np.maximum(columns[:, 0] if len(names) == 1 else entry_checksums(columns), 1)


def input_checksums(arrays: Mapping[str, Any], names: Iterable[str]) -> np.ndarray:
  """Returns a checksum of each example's inputs of these names, uint32 [N], never 0."""
  checksums = {name: entry_checksums(arrays[name]) for name in names}
  return join_checksums(checksums, len(arrays["id"]))


def vocabulary(names: Sequence[str]) -> str:
  """Returns a digest of the classes' names, or a tokenizer's words, in their order.

  The names that classes have by default, '0', '1', ..., are none.

  >>> vocabulary(["cat", "dog"]) == vocabulary(["dog", "cat"])
  False
  """
  if list(names) == [str(number) for number in range(len(names))]:
    names = ()
  return hashlib.blake2b("\0".join(names).encode(), digest_size=16).hexdigest()


def examples_digests(ids: np.ndarray, checksums: Mapping[str, np.ndarray]) -> dict[str, str]:
  """Returns digests of a set's ids and of each entry, whatever the order of the examples."""
  order = np.argsort(ids)
  columns = {"id": np.zeros(len(ids), np.uint32), **checksums}
  return {
    name: hashlib.blake2b(
      np.stack([ids[order].astype("<i8"), values[order].astype("<i8")], 1).tobytes(),
      digest_size=16,
    ).hexdigest()
    for name, values in columns.items()
  }


def teacher_identity(
  model: Model,
  variables: Variables,
  outputs: Iterable[str],
  arrays: Mapping[str, Any],
  description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the `teacher` part of an identity.

  Args:
    model, variables: the teacher.
    outputs: names of the outputs to store.
    arrays: examples [N, ...]; only shapes and dtypes are used.
    description: plain JSON values, for what neither weights nor outputs show.
  """
  batch = probe_batch(arrays)
  probe_outputs = jax.jit(_output_fn(model, outputs))(tuple(variables), batch)
  sums = row_sums(probe_outputs, input_names(probe_outputs), NUM_PROBES)
  head = head_of(model, variables, outputs, arrays)
  return {
    "weights": fingerprint(tuple(variables)),
    "probe_outputs": sums,
    **({} if head is None else {"head": head_identity(head)}),
    **dict(description or {}),
  }


def _output_fn(model: Model, outputs: Iterable[str]) -> Callable[[Any, Any], dict[str, Any]]:
  """Returns `(variables, batch) -> the outputs that are stored`, before a codec reduces them."""

  def output_fn(variables: Any, batch: Any) -> dict[str, Any]:
    teacher_outputs = model.apply(*variables, batch, train=False, key=None)[0]
    # Hidden states are probed instead of lazy logits: the logits of all probes may not fit.
    names = {name if name in teacher_outputs else "hidden" for name in map(output_of, outputs)}
    return {name: teacher_outputs[name] for name in names if name in teacher_outputs}

  return output_fn


def augmentation_identity(
  augment: Augment | None, arrays: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
  """Returns the `augmentation` part of an identity.

  Args:
    augment: `batch -> batch`, a function of 'id' and 'view'; None: none.
    arrays: examples [N, ...]; only shapes and dtypes are used.
    names: the inputs that the teacher reads (`teacher_entries`).

  Raises:
    ValueError: a view cannot be repeated: `augment` is random at each call, or mixes rows.
  """
  if augment is None:
    return {"name": "none", "probes": []}
  batch = probe_batch(arrays)
  names = sorted(names)
  augmented = augment(batch)
  if all(augmented[name] is batch[name] for name in names if name in augmented):
    return {"name": "none", "probes": []}  # It changes what the student reads only.
  sums = row_sums(augmented, names, NUM_PROBES)
  if not same_sums(sums, row_sums(augment(batch), names, NUM_PROBES)):
    raise ValueError(
      "augment: expected a function of 'id' and 'view', got different views of one example in two "
      "calls: derive its random numbers from 'id' and 'view'"
    )
  # Compiled once, as in a train step: so many eager calls take longer.
  augment_row = jax.jit(augment)
  single_rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(NUM_PROBES)]
  if not same_sums(sums, [row_sums(augment_row(row), names, 1)[0] for row in single_rows]):
    raise ValueError(
      "augment: expected a function of 'id' and 'view', got a view that depends on the other rows "
      "of the batch: use a live teacher for what mixes rows (mixup, CutMix)"
    )
  return {"name": function_name(augment), "probes": sums}


def crop_identity(crop: Crop, source: Streamed) -> dict[str, Any]:
  """Returns the `data.crop` part of an identity."""
  probe = probe_of(source)
  views = [as_entries(crop(probe, number, number)) for number in range(NUM_PROBES)]
  entries = {name: np.stack([view[name] for view in views]) for name in views[0]}
  sums = row_sums(entries, entries, NUM_PROBES)
  return {"name": function_name(crop), "probes": sums}


def output_identity(codec: Codec, output: Any) -> dict[str, Any]:
  """Returns the `outputs` part of an identity for one output, or `ShapeDtypeStruct`, [B, ...]."""
  return {
    "codec": codecs.to_json(codec),
    "shape": list(output.shape[1:]),
    "dtype": str(output.dtype),
  }


def crop_varies(data: Mapping[str, Any]) -> bool:
  """Returns whether the crop of a `data` part makes different views of one image."""
  if "crop" not in data:
    return False
  sums = data["crop"]["probes"]
  return not np.allclose(sums, sums[0], atol=1e-3)


def has_views(identity: Mapping[str, Any]) -> bool:
  """Returns whether the views of an example differ: it is augmented or cropped at random."""
  return identity["augmentation"]["name"] != "none" or crop_varies(identity["data"])


def same_value(field: str, old: Any, new: Any) -> bool:
  """Returns whether two values of a field count as equal: probes may differ by rounding."""
  if field in ("augmentation.probes", "data.crop.probes"):
    return same_sums(old, new)
  if field == "teacher.probe_outputs":
    return same_output_sums(old, new)
  return bool(old == new)
