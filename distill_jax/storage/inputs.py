"""Describes the inputs that a student was trained on, and compares new ones with them.

An exported student computes with pixels of 0 to 255 where it was trained on 0 to 1, and with
channels first where it was trained on channels last. Its description holds what tells them apart.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.trees import describe_leaf
from distill_jax.types import Batch, Model, Variables, input_names

_NARROW = 0.01  # of the range: pixels of 0 to 1 where 0 to 255 was trained


def describe_inputs(examples: Any, class_names: Iterable[str] | None = None) -> dict[str, Any]:
  """Returns the description of a student's inputs for `export_student`.

      export_student(result.variables, folder, description={}, inputs=describe_inputs(train))

  Args:
    examples: those that the student was trained on, augmentation left out: a `data.Source`, or a
      batch of many (a mapping of arrays [N, ...]). Ids and labels are left out.
    class_names: one name per class; None: those of the `Source`.

  Returns:
    `{'entries': {name: {'shape': without rows, 'dtype', 'min', 'max'}}, 'class_names': [...]}`.

  >>> from distill_jax import describe_inputs
  >>> train = {"image": np.linspace(0, 1, 32).reshape(2, 4, 4, 1), "label": np.array([0, 1])}
  >>> description = describe_inputs(train, class_names=["cat", "dog"])
  >>> description["entries"]["image"]
  {'shape': [4, 4, 1], 'dtype': 'float64', 'min': 0.0, 'max': 1.0}
  """
  arrays = getattr(examples, "arrays", examples)
  if class_names is None:
    class_names = getattr(examples, "class_names", ())
  entries = {}
  for name in sorted(input_names(arrays)):
    values = np.asarray(arrays[name])
    low, high = _range(values)
    shape = list(values.shape[1:])
    entries[name] = {"shape": shape, "dtype": values.dtype.name, "min": low, "max": high}
  return {"entries": entries, "class_names": list(class_names)}


def check_description(inputs: Any) -> None:
  """Checks that `inputs` is a description of inputs, empty or None.

  Raises:
    ValueError: it is something else, such as the examples.
  """
  if inputs is None or (isinstance(inputs, Mapping) and (not inputs or "entries" in inputs)):
    return
  raise ValueError(
    f"inputs: expected a description of the inputs, got {type(inputs).__name__}: write "
    "inputs=describe_inputs(train)"
  )


def check_inputs(inputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
  """Checks a batch against the inputs that a student was trained on.

  Other values only warn, since no set holds all that may come: a range that is wider on one side by
  more than the trained one, or a hundredth of it.

  Args:
    inputs: of `describe_inputs`.
    batch: arrays [N, ...]; entries that are not described are left out, and so are those that are
      no arrays (`ShapeDtypeStruct`).

  Raises:
    ValueError: an entry has its channels at another place, or numbers of another kind.
  """
  for name, expected in inputs.get("entries", {}).items():
    values = batch.get(name)
    if values is None or not hasattr(values, "__array__"):
      continue
    values = np.asarray(values)
    _check_kind(name, expected, values)
    _check_channels(name, expected, values)
    _warn_of_range(name, expected, values)


def check_network(
  inputs: Mapping[str, Any], model: Model, variables: Variables, batch: Batch
) -> None:
  """Checks that a network takes a batch, and that its rows have the shapes of training.

  A convolutional network takes rows of other sizes, which only warn.

  Args:
    inputs: of `describe_inputs`; empty: nothing is checked.
    model, variables: the network.
    batch: arrays or `ShapeDtypeStruct`s [N, ...].

  Raises:
    ValueError: an entry has another rank, or the network does not take the batch because of an
      entry that is missing or has another size; the message names the entry.
  """
  entries = inputs.get("entries", {})
  if not entries:
    return
  shapes = {name: list(np.shape(batch[name])[1:]) for name in entries if name in batch}
  changes = {name: shape for name, shape in shapes.items() if shape != entries[name]["shape"]}
  lines = {
    name: f"{name}: expected {entries[name]['shape']} in each row, as in training, got {shape}"
    for name, shape in changes.items()
  }
  for name, shape in changes.items():
    if len(shape) != len(entries[name]["shape"]):
      raise ValueError(f"{lines[name]}: prepare it as the training examples")
  try:
    jax.eval_shape(lambda v, b: model.apply(*v, b, train=False, key=None)[0], variables, batch)
  # Each library raises types of its own.
  except Exception as error:
    for name in entries:
      if name not in batch:
        lines[name] = f"{name}: expected an entry of the batch, as in training, got {sorted(batch)}"
    # A network of other sizes than its weights (`allow_shrunk`) takes no batch at all.
    if not lines:
      return
    raise ValueError(
      f"{next(iter(lines.values()))}: prepare it as the training examples"
    ) from error
  for line in lines.values():
    warnings.warn(f"{line}: check that it is meant", UserWarning, stacklevel=3)


def _check_kind(name: str, expected: Mapping[str, Any], values: np.ndarray) -> None:
  is_integer = not jnp.issubdtype(values.dtype, jnp.floating)
  if is_integer != (not jnp.issubdtype(jnp.dtype(expected["dtype"]), jnp.floating)):
    raise ValueError(
      f"{name}: expected {expected['dtype']} of {_format(expected['min'], expected['max'])}, as in "
      f"training, got {values.dtype}: prepare it as the training examples"
    )


def _check_channels(name: str, expected: Mapping[str, Any], values: np.ndarray) -> None:
  shape, trained = list(values.shape[1:]), expected["shape"]
  if len(shape) < 3 or len(shape) != len(trained) or shape == trained:
    return
  for axes in ((0, -1), (-1, 0)):
    if list(np.moveaxis(np.empty(shape, bool), *axes).shape) == trained:
      source, destination = (axis + 1 if axis == 0 else axis for axis in axes)
      raise ValueError(
        f"{name}: expected {trained} in each row, as in training, got {shape}: write "
        f"np.moveaxis({name}, {source}, {destination})"
      )


def _warn_of_range(name: str, expected: Mapping[str, Any], values: np.ndarray) -> None:
  if not values.size or not jnp.issubdtype(values.dtype, jnp.floating):
    return
  low, high = _range(values)
  span = expected["max"] - expected["min"]
  is_wide = low < expected["min"] - span or high > expected["max"] + span
  if is_wide or 0 < high - low < _NARROW * span:
    warnings.warn(
      f"{name}: expected {_format(expected['min'], expected['max'])}, as in training, got "
      f"{_format(low, high)}: scale it as the training examples",
      UserWarning,
      stacklevel=3,
    )


def check_shapes(expected: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
  """Checks that a batch has a program's arrays, of any number of rows.

  Args:
    expected: arrays or shapes by name.
    batch: arrays by name, with all of these.

  Raises:
    ValueError: one has another shape or dtype; the message names it.
  """
  for name, spec in expected.items():
    dtype = jnp.result_type(batch[name])
    shape = np.shape(batch[name])
    if shape[1:] != spec.shape[1:] or len(shape) != len(spec.shape) or dtype != spec.dtype:
      raise ValueError(
        f"{name}: expected {describe_leaf(spec.shape, spec.dtype)}, got "
        f"{describe_leaf(shape, dtype)}: prepare it as the training examples"
      )


def _range(values: np.ndarray) -> tuple[float, float]:
  if not values.size:
    return 0.0, 0.0
  return float(values.min()), float(values.max())


def _format(low: float, high: float) -> str:
  return f"{low:.4g} to {high:.4g}"
