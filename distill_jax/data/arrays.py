"""Turns what pipelines yield into dicts of numpy arrays: tensors of any library, tuples, lists."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

_KINDS = {"i": "integers", "u": "unsigned integers", "f": "floats", "b": "bools"}
KEYS_EXAMPLE = 'keys=("image", "label")'


def to_array(name: str, values: Any) -> np.ndarray:
  """Returns values as a numpy array of numbers or bools; it may share their memory.

  Args:
    name: the entry that an error names.
    values: anything that `numpy.asarray` takes: lists, torch, TensorFlow, pandas and JAX arrays.

  Raises:
    ValueError: strings, `None`, rows of different shapes, hidden values of a masked array, or a
      tensor that numpy cannot read (on another device, or with a gradient).
  """
  _check_no_source(name, values)
  if isinstance(values, Mapping):
    raise ValueError(
      f"{name}: expected an array, got a dict with {sorted(map(str, values))}: write its arrays as "
      "entries of their own"
    )
  if np.ma.is_masked(values):
    hidden = int(np.ma.count_masked(values))
    raise ValueError(
      f"{name}: expected an array without hidden values, got a masked array that hides {hidden}: "
      "write values.filled(0), and store the mask as an entry of its own"
    )
  try:
    array = np.asarray(values)
  # Each library raises types of its own.
  except Exception as error:
    is_tensor = hasattr(values, "detach")
    hint = "pass tensor.detach().cpu().float()" if is_tensor else "pad rows to one shape"
    raise ValueError(
      f"{name}: expected an array, got {type(values).__name__} that numpy cannot read ({error}): "
      f"{hint}"
    ) from error
  is_number = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == np.bool_
  if not is_number:
    raise ValueError(f"{name}: expected numbers, got {_describe_objects(array)}")
  return array


def to_batch(item: Any, keys: Sequence[str] | None = None, field: str = "source") -> dict:
  """Returns a batch as a dict of numpy arrays.

  Args:
    item: a mapping of arrays; or with `keys` a tuple or list of arrays, or one array. A mapping in
      place of an array, as Keras writes several inputs, gives entries by its own names.
    keys: names of the items; None: the batch has names.
    field: what an error names.

  Raises:
    ValueError: items without names, another number of names, or what `to_array` rejects.

  >>> {name: x.shape for name, x in to_batch((np.zeros((2, 3)), [0, 1]), ["x", "label"]).items()}
  {'x': (2, 3), 'label': (2,)}
  """
  return {name: to_array(name, values) for name, values in _named(item, keys, field).items()}


def layout(batch: Mapping[str, np.ndarray]) -> dict[str, str]:
  """Returns kind of numbers and number of axes of each entry; lengths may differ, as of text."""
  # 'where' may be in the last batch only.
  return {
    name: f"{_KINDS.get(x.dtype.kind, x.dtype.name)} of {x.ndim} axes"
    for name, x in batch.items()
    if name != "where"
  }


def check_layout(batch: Mapping[str, np.ndarray], expected: Mapping[str, str]) -> None:
  """Checks that a batch has the layout of the first batch.

  Raises:
    ValueError: an entry is missing, new, or of another kind.
  """
  got = layout(batch)
  for entry in sorted(got.keys() | expected.keys()):
    if got.get(entry) != expected.get(entry):
      raise ValueError(
        f"{entry}: expected {expected.get(entry, 'no such entry')} as in the first batch, got "
        f"{got.get(entry, 'no such entry')}: make the batches alike"
      )


def shape_change(batch: Mapping[str, Any], first: Mapping[str, Any]) -> str:
  """Returns a message about an entry of another shape than in the first batch; "" if none is.

  The number of rows may differ.

  >>> shape_change({"x": np.zeros((2, 3))}, {"x": np.zeros((4, 3))})
  ''
  """
  for name in sorted(batch.keys() & first.keys()):
    expected, got = (["rows", *np.shape(x[name])[1:]] for x in (first, batch))
    if got != expected:
      return f"{name}: expected {_shape(expected)} as in the first batch, got {_shape(got)}"
  return ""


def _shape(sizes: Sequence[Any]) -> str:
  return f"[{', '.join(map(str, sizes))}]"


def _named(item: Any, keys: Sequence[str] | None, field: str) -> dict[str, Any]:
  if isinstance(item, Mapping):
    if keys is not None:
      raise ValueError(
        f"keys: expected None for batches with names, got {tuple(keys)} for {sorted(item)}: leave "
        "keys out"
      )
    return {str(name): values for name, values in item.items()}
  _check_no_source(field, item)
  items = item if isinstance(item, tuple | list) else (item,)
  if keys is None:
    got = f"a {type(item).__name__}"
    if isinstance(item, tuple | list):
      got = f"a {type(item).__name__} of {len(item)} items"
    hint = f"name its items with data.from_iterable(..., {KEYS_EXAMPLE})"
    if hasattr(item, "shape"):
      hint += ', or write {"image": array} for an array of all examples'
    raise ValueError(f"{field}: expected batches that are dicts of arrays, got {got}: {hint}")
  if len(items) != len(keys):
    raise ValueError(
      f"keys: expected {len(items)} names, one for each item of a batch, got {tuple(keys)}"
    )
  named: dict[str, Any] = {}
  for key, values in zip(keys, items):
    named |= dict(values) if isinstance(values, Mapping) else {key: values}
  return named


def _check_no_source(name: str, values: Any) -> None:
  """Checks that no `Source` or `Pipeline` takes the place of a batch or an array."""
  if type(values).__module__.startswith("distill_jax.data."):
    kind = type(values).__name__
    raise ValueError(
      f"{name}: expected arrays, got a {kind} inside a list or dict: pass the {kind} itself"
    )


def _describe_objects(array: np.ndarray) -> str:
  """Returns what an array without numbers holds, and what to write instead."""
  values = array.reshape(-1)
  is_text = array.dtype.kind in "US" or (len(values) and isinstance(values[0], str | bytes))
  if is_text:
    return (
      f"text ({array.dtype}): make class numbers of names with np.unique(values, "
      "return_inverse=True)[1], or tokens with distill_jax.data.text.pack, or leave it out"
    )
  if array.dtype.kind != "O":
    return f"{array.dtype}: write them as float32 or int32"
  missing = [i for i, value in enumerate(values) if value is None]
  if missing:
    return f"None at position {missing[0]}: leave the example or the entry out"
  kinds = sorted({type(value).__name__ for value in values[:100]})
  return f"objects ({', '.join(kinds)}): write arrays of one shape and of a numeric dtype"
