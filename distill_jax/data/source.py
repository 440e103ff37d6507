"""Holds examples in host memory with ids that survive splitting, shuffling and caching."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data.arrays import to_array
from distill_jax.data.box_checks import check_boxes
from distill_jax.data.checks import check_values, count_rows
from distill_jax.data.groups import check_groups
from distill_jax.data.label_checks import UNLABELED, check_label_entry, mark_unlabeled
from distill_jax.errors import check_integer
from distill_jax.objectives.class_labels import check_ignore_label


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Examples in host memory, checked once, when the source is made.

  Attributes:
    arrays: name -> array [N, ...], read-only. 'id': unique integers, the example's row in the full
      named set (a subset keeps them); without it the rows here are the ids, 0 to N - 1. 'label':
      class numbers [N, ...]; rows of probabilities [N, classes], of zeros for no label; or of 2
      classes the probability of class 1 [N]. Without `classes` any finite numbers. The other
      entries are inputs, e.g. 'image' float32 [N, height, width, channels] in 0..1. 64-bit numbers
      become 32-bit ones, as on the device. For detection, 'boxes' [N, M, 4] are (left, top, right,
      bottom) in pixels of 'image', next to 'label' [N, M], negative for padding, and maybe 'crowd',
      bool [N, M].
    classes: number of classes. None: labels are no class numbers, but e.g. regression targets float
      [N] or multi-hot rows [N, C], and 'label' may be missing.
    class_names: one name per class, by default '0', '1', ...; () without classes.
    name: what the ids index, e.g. 'digits'.
    ignore_label: the class number that marks examples without a label; None if all have one.
      Whatever was declared (-100, 255), labels hold `UNLABELED` afterward, and so does this field.
    vocabulary: for text, the identity of the tokenizer whose tokens are the classes.
    groups: the entry that says which examples must not be on both sides of a split: integers [N],
      e.g. a person's number, by which `split` then splits; or rectangles [N, 4], (left, top, right,
      bottom) in pixels of one large image, which must not touch (`split_regions`). A run raises
      where training and evaluation share a group. "": none.

  Raises:
    ValueError: an array is empty or of another length; ids are not integers 0 to 2^31 - 1 or
      repeat; a number is not finite; with classes, 'label' is missing or holds another number, or a
      box is of another format or outside of its image; groups are none. The error names the field
      and the example's id.

  >>> targets = Source({"x": np.ones((2, 3)), "label": np.array([0.5, -1.5])})
  >>> targets.arrays["label"].dtype, targets.class_names
  (dtype('float32'), ())
  """

  arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
  classes: int | None = None
  class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)
  name: str = "custom"
  ignore_label: int | None = None
  vocabulary: str = ""
  groups: str = ""

  def __post_init__(self):
    arrays = {name: to_array(name, values) for name, values in self.arrays.items()}
    for name in ("view", "where"):
      if name in arrays:
        raise ValueError(
          f"{name}: expected no entry in {self.name}, it belongs to a batch: leave it out"
        )
    rows = count_rows(arrays)
    arrays = {"id": np.arange(rows)} | arrays
    _check_ids(arrays["id"], self.name)
    if self.classes is None:
      self._check_no_classes()
    else:
      arrays["label"] = self._checked_labels(arrays, self.classes)
    check_boxes(arrays, arrays["id"])
    read_only = {
      name: _as_stored(name, values, arrays["id"], self.classes) for name, values in arrays.items()
    }
    self._set("arrays", types.MappingProxyType(read_only))
    if self.groups:
      check_groups(self.groups, self._entry("groups", self.groups), self.name)

  def __len__(self) -> int:
    return len(self.arrays["id"])

  @property
  def ids(self) -> np.ndarray:
    """The examples' ids, int32 [N]."""
    return self.arrays["id"]

  @property
  def labeled(self) -> np.ndarray:
    """Bool [N]: which examples have a label, of tokens or pixels at least one."""
    label = self.arrays.get("label")
    if label is None:
      return np.zeros(len(self), bool)
    if self.classes is None:
      is_label = np.ones(label.shape, bool)
    elif np.issubdtype(label.dtype, np.integer):
      is_label = label >= 0
    else:
      is_label = label != 0 if label.ndim > 1 else np.ones(label.shape, bool)
    return np.asarray(is_label.reshape(len(self), -1).any(axis=1))

  @functools.cached_property
  def digest(self) -> str:
    """32 hexadecimal digits of all arrays, their names, shapes and dtypes; computed once."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(self.arrays):
      values = np.ascontiguousarray(self.arrays[name])
      digest.update(f"{name} {values.shape} {values.dtype}\n".encode())
      digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

  def take(self, rows: Any) -> "Source":
    """Returns the examples at these rows (indices, a mask or a slice) with their ids."""
    arrays = {name: values[rows] for name, values in self.arrays.items()}
    return dataclasses.replace(self, arrays=arrays)

  def integers(self, argument: str, name: str) -> np.ndarray:
    """Returns an entry of integers [N], such as class numbers or the numbers of groups.

    Args:
      argument: what an error names.
      name: the entry.

    Raises:
      ValueError: it does not exist, or holds anything else.
    """
    values = self._entry(argument, name)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
      raise ValueError(
        f"{argument}: expected integers [N] in {name!r}, got {values.dtype} {list(values.shape)}: "
        "number the classes or groups, e.g. with np.unique(values, return_inverse=True)[1]"
      )
    return values

  def _entry(self, argument: str, name: str) -> np.ndarray:
    if name not in self.arrays:
      raise ValueError(
        f"{argument}: expected an entry of {self.name}, one of {sorted(self.arrays)}, got {name!r}"
      )
    return self.arrays[name]

  def _checked_labels(self, arrays: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    """Returns checked labels with `UNLABELED` for the ignore label; sets `class_names`."""
    check_integer("classes", classes, 1)
    if "label" not in arrays:
      raise ValueError(
        f"label: expected an array in {self.name}, got only {sorted(arrays)}: for examples without "
        "labels give no classes (classes=None)"
      )
    label = arrays["label"]
    check_ignore_label(self.ignore_label)
    check_label_entry("label", label, classes, arrays["id"], self.ignore_label)
    if self.ignore_label is not None:
      label = mark_unlabeled(label, self.ignore_label)
      self._set("ignore_label", UNLABELED)
    names = tuple(self.class_names) or tuple(map(str, range(classes)))
    if len(names) != classes:
      raise ValueError(f"class_names: expected one for each of {classes} classes, got {len(names)}")
    self._set("class_names", names)
    return label

  def _check_no_classes(self) -> None:
    if len(self.class_names):
      raise ValueError("class_names: expected () without classes, got names: give classes too")
    if self.ignore_label is not None:
      raise ValueError(
        f"ignore_label: expected None without classes, got {self.ignore_label}: give classes too"
      )

  def _set(self, field: str, value: Any) -> None:
    # The class is frozen for all other callers.
    object.__setattr__(self, field, value)


def _check_ids(ids: np.ndarray, source: str) -> None:
  limit = np.iinfo(np.int32).max
  if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"id: expected one integer per example of {source}, got {ids.dtype} {list(ids.shape)}"
    )
  if ids.min() < 0 or ids.max() > limit:
    raise ValueError(
      f"id: expected 0 to {limit} (int32) in {source}, got {ids.min()} to {ids.max()}"
    )
  values, counts = np.unique(ids, return_counts=True)
  if len(values) < len(ids):
    repeated = values[counts > 1]
    raise ValueError(
      f"id: expected unique ids in {source}, got {len(repeated)} that repeat, the first is "
      f"{repeated[0]}"
    )


def _as_stored(name: str, values: np.ndarray, ids: np.ndarray, classes: int | None) -> np.ndarray:
  """Returns checked, read-only values in the dtype that they have on the device."""
  check_values(name, values, ids)
  is_class = name == "label" and classes is not None
  is_index = name == "id" or (is_class and not jnp.issubdtype(values.dtype, jnp.floating))
  dtype = np.int32 if is_index else jax.dtypes.canonicalize_dtype(values.dtype)
  if values.dtype != dtype:
    with np.errstate(over="ignore"):
      values = values.astype(dtype)
    # 1e300 is finite only in float64.
    check_values(name, values, ids)
  values = values.view()
  values.flags.writeable = False
  return values
