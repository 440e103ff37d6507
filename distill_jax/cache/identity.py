"""Defines what a cache depends on, as plain values: a run that differs in one is rejected.

    teacher       fingerprint of the weights, outputs for artificial examples, the head where
                  hidden states are stored (`teacher.lm_head`), and the caller's description (its
                  config)
    data          name of the set, dtypes and shapes of its inputs, digests of the classes' names
                  (a tokenizer's words) and of every example's id and checksum; of streamed images
                  also a digest of their files, the crop, and the crop of an artificial image; of
                  text its tokenizer
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
  input_names,
  probe_batch,
  probe_image,
  row_sums,
  same_output_sums,
  same_sums,
)
from distill_jax.cache.teacher.lm_head import head_identity, head_of
from distill_jax.data.crops import Crop
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.types import Batch, Model, Variables

Augment = Callable[[Batch], Batch]


def input_specs(arrays: Mapping[str, Any]) -> dict[str, str]:
  """Returns dtype and shape per example of each input.

  Labels are no inputs, so that a run which hides some of them reads the same cache.
  """
  return {
    name: f"{arrays[name].dtype}{list(arrays[name].shape[1:])}"
    for name in sorted(input_names(arrays))
  }


def array_shapes(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of each array."""
  return {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in arrays.items()}


def input_checksums(arrays: Mapping[str, Any], names: Iterable[str]) -> np.ndarray:
  """Returns the crc32 of each example's inputs of these names, uint32 [N], never 0."""
  checksums = [0] * len(arrays["id"])
  for name in sorted(names):
    rows = np.ascontiguousarray(arrays[name])
    row_bytes = rows.reshape(len(rows), -1).view(np.uint8)
    checksums = [zlib.crc32(row.data, value) for row, value in zip(row_bytes, checksums)]
  return np.maximum(np.array(checksums, np.uint32), 1)


def vocabulary(names: Sequence[str]) -> str:
  """Returns a digest of the classes' names, or a tokenizer's words, in their order.

  >>> vocabulary(["cat", "dog"]) == vocabulary(["dog", "cat"])
  False
  """
  return hashlib.blake2b("\0".join(names).encode(), digest_size=16).hexdigest()


def examples_digest(ids: np.ndarray, checksums: np.ndarray) -> str:
  """Returns a digest of a set of examples, whatever their order."""
  order = np.argsort(ids)
  pairs = np.stack([ids[order].astype("<i8"), checksums[order].astype("<i8")], 1)
  return hashlib.blake2b(pairs.tobytes(), digest_size=16).hexdigest()


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

  @jax.jit
  def probe_outputs(variables: Any, batch: Any) -> dict[str, jax.Array]:
    teacher_outputs = model.apply(*variables, batch, train=False, key=None)[0]
    # Hidden states are probed instead of lazy logits: the logits of all probes may not fit.
    names = {name if name in teacher_outputs else "hidden" for name in map(output_of, outputs)}
    return {name: teacher_outputs[name] for name in names if name in teacher_outputs}

  sums = row_sums({"id": batch["id"]} | probe_outputs(tuple(variables), batch))
  head = head_of(model, variables, outputs, arrays)
  return {
    "weights": fingerprint(tuple(variables)),
    "probe_outputs": sums,
    **({} if head is None else {"head": head_identity(head)}),
    **dict(description or {}),
  }


def augmentation_identity(augment: Augment | None, arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the `augmentation` part of an identity.

  Args:
    augment: `batch -> batch`, a function of 'id' and 'view'; None: none.
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    ValueError: a view cannot be repeated: `augment` is random at each call, or mixes rows.
  """
  if augment is None:
    return {"name": "none", "probes": []}
  batch = probe_batch(arrays)
  sums = row_sums(augment(batch))
  if not same_sums(sums, row_sums(augment(batch))):
    raise ValueError(
      "augment: expected a function of 'id' and 'view', got different views of one example in two "
      "calls: derive its random numbers from 'id' and 'view'"
    )
  # Compiled once, as in a train step: so many eager calls take longer.
  augment_row = jax.jit(augment)
  single_rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(NUM_PROBES)]
  if not same_sums(sums, [row_sums(augment_row(row))[0] for row in single_rows]):
    raise ValueError(
      "augment: expected a function of 'id' and 'view', got a view that depends on the other rows "
      "of the batch: use a live teacher for what mixes rows (mixup, CutMix)"
    )
  return {"name": function_name(augment), "probes": sums}


def crop_identity(crop: Crop, channels: int) -> dict[str, Any]:
  """Returns the `data.crop` part of an identity."""
  image = probe_image(channels)
  views = np.stack([crop(image, number, number) for number in range(NUM_PROBES)])
  sums = row_sums({"id": np.arange(NUM_PROBES), "image": views})
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
