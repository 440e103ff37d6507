"""Examples in host memory with ids that survive splitting, shuffling and caching."""

import dataclasses
import types
from collections.abc import Mapping

import jax
import numpy as np

from distill_jax.data.checks import UNLABELED, check_labels, check_lengths, check_numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Examples in host memory, checked once, when they are put here.

  Attributes:
    arrays: name -> array [N, ...], read-only. 'id': unique integers, the example's row in the full named
      set (a subset keeps them); without it the rows here are the ids, 0 to N - 1. 'label': class numbers;
      and the inputs, e.g. 'image' float32 [N, height, width, channels] in 0..1. 64-bit numbers become
      32-bit ones, as on the device.
    classes: number of classes.
    class_names: one name per class; '0', '1', ... if not given.
    name: what the ids index, e.g. 'digits'.
    ignore_label: the label that marks examples without one, None if all have one. Whatever was declared
      (-100, 255), labels hold `UNLABELED` afterward, and so does this field.
    vocabulary: of text, the identity of the tokenizer whose words the classes are.

  Raises:
    ValueError: 'label' is missing; an array is empty or of another length; ids are not integers 0 to 2^31 - 1 or
      repeat; a label is not a class; a number is not finite. The example's id is named.
  """

  arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
  classes: int
  class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)
  name: str = "custom"
  ignore_label: int | None = None
  vocabulary: str = ""

  def __post_init__(self):
    arrays = {name: np.asarray(values) for name, values in self.arrays.items()}
    if "label" not in arrays:
      raise ValueError(f"{self.name}: no array 'label' among {sorted(arrays)}")
    for name in ("view", "where"):
      if name in arrays:
        raise ValueError(
          f"{self.name}: {name!r} belongs to a batch, not to the examples: leave it out"
        )
    rows = check_lengths(arrays)
    arrays = {"id": np.arange(rows)} | arrays
    if self.classes < 1:
      raise ValueError(f"{self.name}: classes must be at least 1, got {self.classes}")
    _check_ids(arrays["id"], self.name)
    check_labels(arrays["label"], self.classes, arrays["id"], self.ignore_label)
    if self.ignore_label is not None:
      arrays["label"] = np.where(
        arrays["label"] == self.ignore_label, UNLABELED, arrays["label"].astype(np.int64)
      )
      self._set("ignore_label", UNLABELED)
    names = tuple(self.class_names) or tuple(map(str, range(self.classes)))
    if len(names) != self.classes:
      raise ValueError(f"{self.name}: {len(names)} class_names for {self.classes} classes")
    self._set("class_names", names)
    frozen = {name: _freeze(name, values, arrays["id"]) for name, values in arrays.items()}
    self._set("arrays", types.MappingProxyType(frozen))

  def __len__(self) -> int:
    return len(self.arrays["id"])

  @property
  def ids(self) -> np.ndarray:
    return self.arrays["id"]

  def take(self, rows) -> "Source":
    """The examples at these rows (numbers, a mask or a slice), with the ids they have here."""
    return dataclasses.replace(
      self, arrays={name: values[rows] for name, values in self.arrays.items()}
    )

  def _set(self, field, value):
    object.__setattr__(self, field, value)  # the class is frozen for everybody else


def _check_ids(ids: np.ndarray, source: str) -> None:
  limit = np.iinfo(np.int32).max
  if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"{source}: id must be one integer per example, got {ids.dtype} {list(ids.shape)}"
    )
  if ids.min() < 0 or ids.max() > limit:
    raise ValueError(f"{source}: ids must be 0 to {limit} (int32), got {ids.min()} to {ids.max()}")
  values, counts = np.unique(ids, return_counts=True)
  if len(values) < len(ids):
    repeated = values[counts > 1]
    raise ValueError(
      f"{source}: ids must be unique, {len(repeated)} repeat, the first is {repeated[0]}"
    )


def _freeze(name, values, ids) -> np.ndarray:
  """Checked, as wide as on the device, and read-only."""
  check_numbers(name, values, ids)
  dtype = np.int32 if name in ("id", "label") else jax.dtypes.canonicalize_dtype(values.dtype)
  if values.dtype != dtype:
    with np.errstate(over="ignore"):
      values = values.astype(dtype)
    check_numbers(name, values, ids)  # 1e300 is finite only in float64
  values = values.view()
  values.flags.writeable = False
  return values
