"""What a cache was made from, as plain values that can be compared and shown: a run that differs is refused.

    teacher       fingerprint of the weights, its answers to made-up examples, its head where hidden states are kept
                  (`heads`), what the caller says of it (its config)
    data          name of the set, dtypes and shapes of its inputs, digests over the classes' names (a tokenizer's
                  words) and over every example's id and checksum; of streamed images also what their files are, how
                  they are cropped, and what that makes of a made-up image; of text its tokenizer
    augmentation  what it is, and what it makes of made-up examples: a changed random generator is noticed
    outputs       per output: its codec, shape and dtype

Where and with which versions it was computed is recorded beside it, and is no part of it.
"""

import hashlib
import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image

from distill_jax.cache.codecs.dense import output_of
from distill_jax.cache.teacher import heads
from distill_jax.data.crops import Crop
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.teachers import CACHED
from distill_jax.types import Batch, Model, Variables

PROBES = 32
NOT_INPUTS = ("id", "label", "view", "where")

Augment = Callable[[Batch], Batch]


def inputs(arrays: Mapping[str, Any]) -> dict[str, str]:
  """Dtype and shape per example of each input: of all arrays but ids, labels and teacher outputs.

  Labels are left out, so that a run which hides some of them reads the same cache.
  """
  return {
    name: f"{arrays[name].dtype}{list(arrays[name].shape[1:])}" for name in sorted(_inputs(arrays))
  }


def shapes(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of each."""
  return {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in arrays.items()}


def source_checksums(arrays: Mapping[str, Any], names: Iterable[str]) -> np.ndarray:
  """crc32 of each example's inputs of these names, uint32 [N], never 0."""
  crc = [0] * len(arrays["id"])
  for name in sorted(names):
    rows = np.ascontiguousarray(arrays[name])
    crc = [
      zlib.crc32(row.data, value)
      for row, value in zip(rows.reshape(len(rows), -1).view(np.uint8), crc)
    ]
  return np.maximum(np.array(crc, np.uint32), 1)


def vocabulary(names: Sequence[str]) -> str:
  """A digest of the classes' names, or a tokenizer's words, in their order: other words of the same number differ.

  >>> vocabulary(["cat", "dog"]) == vocabulary(["dog", "cat"])
  False
  """
  return hashlib.blake2b("\0".join(names).encode(), digest_size=16).hexdigest()


def digest(ids: np.ndarray, checksums: np.ndarray) -> str:
  """Of a set of examples, whatever their order."""
  order = np.argsort(ids)
  pairs = np.stack([ids[order].astype("<i8"), checksums[order].astype("<i8")], 1)
  return hashlib.blake2b(pairs.tobytes(), digest_size=16).hexdigest()


def teacher(
  model: Model,
  variables: Variables,
  outputs: Iterable[str],
  arrays: Mapping[str, Any],
  description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The part of an identity that tells one teacher from another.

  Args:
    model, variables: the teacher.
    outputs: names of what is kept.
    arrays: examples [N, ...]; only shapes and dtypes are used.
    description: plain values that json can hold, for what neither weights nor answers show.
  """
  batch = _probe_batch(arrays)

  @jax.jit
  def answer(variables, batch):
    said = model.apply(*variables, batch, train=False, key=None)[0]
    # Hidden states stand for logits that are not given: those of all probes may not fit.
    chosen = {name if name in said else "hidden" for name in map(output_of, outputs)}
    return {name: said[name] for name in chosen if name in said}

  answers = _numbers({"id": batch["id"]} | answer(tuple(variables), batch))
  head = heads.head_of(model, variables, outputs, arrays)
  known = {} if head is None else {"head": heads.about(head)}
  return {
    "weights": fingerprint(tuple(variables)),
    "answers": answers,
    **known,
    **dict(description or {}),
  }


def augmentation(augment: Augment | None, arrays: Mapping[str, Any]) -> dict[str, Any]:
  """What an augmentation is called, and one number for each of some views of made-up examples.

  Args:
    augment: `batch -> batch`, a function of 'id' and 'view'; None: none.
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    ValueError: a view cannot be made again: it draws anew at each call, or mixes rows.
  """
  if augment is None:
    return {"name": "none", "probes": []}
  batch = _probe_batch(arrays)
  probes = _numbers(augment(batch))
  if not same_probes(probes, _numbers(augment(batch))):
    raise ValueError(
      "augment: two calls gave different views of one example: draw from 'id' and 'view' alone"
    )
  alone = [
    _numbers(augment({name: x[i : i + 1] for name, x in batch.items()}))[0] for i in range(PROBES)
  ]
  if not same_probes(probes, alone):
    raise ValueError(
      "augment: a view of an example came out otherwise alone than in a batch, so it cannot be made again: it must "
      "follow from 'id' and 'view' (what mixes rows, mixup or cutmix, needs a live teacher)"
    )
  return {"name": name_of(augment), "probes": probes}


def cropping(crop: Crop, channels: int) -> dict[str, Any]:
  """What a crop is called, and one number for each of some views of a made-up image."""
  image = probe_image(channels)
  views = np.stack([crop(image, i, i) for i in range(PROBES)])
  return {"name": name_of(crop), "probes": _numbers({"id": np.arange(PROBES), "image": views})}


def varies(data: Mapping[str, Any]) -> bool:
  """Whether a crop, by the `data` part of an identity, makes different views of one image."""
  return "crop" in data and not np.allclose(
    data["crop"]["probes"], data["crop"]["probes"][0], atol=1e-3
  )


def probe_image(channels: int) -> PIL.Image.Image:
  """Random pixels."""
  values = np.random.Generator(np.random.Philox(1)).integers(0, 256, (48, 64, channels), np.uint8)
  return PIL.Image.fromarray(values if channels == 3 else values[..., 0])


def same(field: str, old: Any, new: Any) -> bool:
  """Whether two values of a field stand for the same: probes may differ by rounding."""
  if field in ("augmentation.probes", "data.crop.probes"):
    return same_probes(old, new)
  if field == "teacher.answers":  # low precision differs from device to device
    return len(old) == len(new) and bool(
      np.allclose(old, new, rtol=0.03, atol=0.03 * max(map(abs, old), default=0))
    )
  return bool(old == new)


def same_probes(a: list[float], b: list[float]) -> bool:
  """Equal but for rounding, which differs from device to device."""
  return len(a) == len(b) and bool(np.allclose(a, b, rtol=1e-3, atol=1e-3))


def name_of(function: Any) -> str:
  """A function with what it closes over: `augmentation(seed=0, transforms=(shift_crop(padding=2), flip()))`."""
  if isinstance(function, tuple | list):
    return f"({', '.join(map(name_of, function))})"
  if not callable(function):
    plain = function is None or isinstance(function, bool | int | float | str)
    return repr(function) if plain else type(function).__qualname__  # a repr may hold an address
  name = getattr(function, "__qualname__", type(function).__qualname__).partition(".<locals>")[0]
  if not inspect.isfunction(function):
    return name
  held = _held(function)
  return f"{name}({', '.join(f'{key}={name_of(held[key])}' for key in sorted(held))})"


def _held(function) -> dict[str, Any]:
  """What a function closes over; functions beside it stand for what they close over."""
  scope = function.__qualname__.rpartition(".")[0]
  held: dict[str, Any] = {}
  for name, value in inspect.getclosurevars(function).nonlocals.items():
    beside = (
      inspect.isfunction(value)
      and value.__qualname__.rpartition(".")[0] == scope
      and value is not function
    )
    held.update(_held(value) if beside and scope else {name: value})
  return held


def _inputs(arrays) -> list[str]:
  return [name for name in arrays if name not in NOT_INPUTS and not name.startswith(CACHED)]


def _probe_batch(arrays) -> dict[str, np.ndarray]:
  random = np.random.Generator(np.random.Philox(0))
  batch = {"id": np.arange(PROBES, dtype=np.int32), "view": np.arange(PROBES, dtype=np.int32)}
  for name in sorted(_inputs(arrays)):
    shape, dtype = (PROBES, *arrays[name].shape[1:]), arrays[name].dtype
    highest = (
      256 if dtype == np.uint8 else 2
    )  # pixels; others may be words, of a vocabulary of any size
    floating = np.issubdtype(dtype, np.floating)
    batch[name] = (random.random(shape) if floating else random.integers(0, highest, shape)).astype(
      dtype
    )
  return {**batch, "label": np.zeros(PROBES, np.int32)}


def _numbers(batch: Batch) -> list[float]:
  """One number per row that tells its contents, and their order, from others."""
  total = np.zeros(PROBES if len(batch["id"]) == PROBES else len(batch["id"]))
  for name in sorted(_inputs(batch)):
    rows = np.asarray(jax.device_get(batch[name]), np.float64).reshape(len(total), -1)
    rows = np.where(np.isfinite(rows), rows, 0)
    total += rows @ np.cos(np.arange(rows.shape[1])) / np.sqrt(rows.shape[1])
  return [round(float(x), 4) for x in total]
