"""Reads the graph of a functional Keras model: its inputs by name, and outputs of its layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from distill_jax.errors import suggest
from distill_jax.models.adapters.outputs import Features, as_mapping, merge_features, select_inputs
from distill_jax.models.logits import probabilities_error
from distill_jax.types import Batch

Inputs = str | Sequence[str] | Mapping[str, str]
_PROBABILITIES = ("softmax", "sigmoid")


def make_argument(net: keras.Model, inputs: Inputs) -> Callable[[Batch], Any]:
  """Returns `batch -> argument of the model's call`: by name where the model's inputs have names.

  Args:
    net: the model.
    inputs: as in `from_keras`.

  Raises:
    ValueError: the model has other inputs.
  """
  structure = _input_structure(net)
  names = names_of_inputs(net)
  if names is None:
    if isinstance(inputs, Mapping):
      return lambda batch: dict(zip(inputs, select_inputs(batch, list(inputs.values()))))
    one = isinstance(inputs, str)
    return lambda batch: batch_entries(batch, inputs)[0] if one else batch_entries(batch, inputs)
  named = isinstance(structure, Mapping)
  entries = _entries_of(net, names, inputs, by_position=not named)
  if named:
    return lambda batch: dict(zip(names, select_inputs(batch, entries)))
  if isinstance(structure, keras.KerasTensor):
    return lambda batch: select_inputs(batch, entries)[0]
  return lambda batch: batch_entries(batch, entries)


def names_of_inputs(net: keras.Model) -> list[str] | None:
  """Returns the names of a functional model's inputs; None of a subclassed one or one not built.

  Raises:
    ValueError: the inputs are nested.
  """
  structure = _input_structure(net)
  if structure is None:
    return None
  named = isinstance(structure, Mapping)
  members = structure.values() if named else keras.tree.flatten(structure)
  if not all(isinstance(tensor, keras.KerasTensor) for tensor in members):
    raise ValueError(
      f"model: expected one input, a list or a dict of inputs, got nested ones of {net.name!r}: "
      "build keras.Model({'name': input, ...}, outputs)"
    )
  return list(structure) if named else [tensor.name for tensor in members]


def batch_entries(batch: Batch, inputs: Inputs) -> list[Any]:
  """Returns the entries of the batch that `inputs` names, in order."""
  return list(
    select_inputs(batch, list(inputs.values()) if isinstance(inputs, Mapping) else inputs)
  )


def _input_structure(net: keras.Model) -> Any:
  """Returns the inputs of a functional model; None of a subclassed one, which lists none."""
  if isinstance(net, keras.Sequential):
    return net.inputs[0] if net.built else None
  return net.input if hasattr(net, "outputs") else None


def _entries_of(
  net: keras.Model, names: list[str], inputs: Inputs, *, by_position: bool
) -> list[str]:
  """Returns the batch entry of each of the model's inputs."""
  if isinstance(inputs, Mapping):
    if sorted(inputs) == sorted(names):
      return [inputs[name] for name in names]
  else:
    entries = [inputs] if isinstance(inputs, str) else list(inputs)
    if sorted(entries) == sorted(names):
      return names
    if len(entries) == len(names) and (by_position or len(names) == 1):
      return entries
  raise ValueError(
    f"inputs: expected the inputs {names} of {net.name!r}, got {inputs!r}: pass "
    f"{{{', '.join(f'{name!r}: batch entry' for name in names)}}}"
  )


def with_features(net: keras.Model, features: Features, output: str) -> keras.Model:
  """Returns the model, or one that shares its variables and also returns the features.

  Raises:
    ValueError: features that it does not have; or "logits" that are probabilities.
  """
  features = as_mapping(features)
  if not hasattr(net, "outputs"):
    if features:
      raise ValueError(
        f"features: expected a functional or Sequential model, got {net.name!r}: return a mapping"
        " from its call instead"
      )
    return net
  tensors = _named_tensors(net, output)
  layer_outputs = {name: _layer_output(net, name, layer) for name, layer in features.items()}
  tensors = merge_features(tensors, layer_outputs)
  if "logits" in tensors:
    _check_logits(tensors["logits"])
  return keras.Model(_input_structure(net), tensors) if features else net


def _named_tensors(net: keras.Model, output: str) -> dict[str, Any]:
  structure = net.outputs[0] if isinstance(net, keras.Sequential) else net.output
  if isinstance(structure, keras.KerasTensor):
    return {output: structure}
  if isinstance(structure, Mapping):
    return dict(structure)
  raise ValueError(
    f"model: expected one output or named ones, got {len(net.outputs)} of {net.name!r}: build"
    " keras.Model(inputs, {'logits': ...})"
  )


def _layer_output(net: keras.Model, name: str, layer: str):
  layers = {member.name: member for member in net.layers}
  if layer not in layers:
    hint = suggest(layer, layers)
    raise ValueError(f"features: expected a layer's name for {name!r}, got {layer!r}{hint}")
  # layer.output is that of the layer's first call anywhere: it may be in another model.
  nodes = [node for node in _nodes(net.outputs) if node.operation is layers[layer]]
  outputs = [tensor for node in nodes for tensor in node.output_tensors]
  if len(outputs) != 1:
    raise ValueError(
      f"features: expected a layer with one output for {name!r}, got {layer!r} with {len(outputs)}:"
      f" build keras.Model(inputs, {{'logits': ..., {name!r}: ...}})"
    )
  return outputs[0]


def _nodes(tensors) -> list[Any]:
  """Returns the calls of layers that compute these tensors."""
  # Private: Keras has no public way from a tensor to the call that computed it.
  pending = list(tensors)
  nodes: list[Any] = []
  while pending:
    operation, index, _ = pending.pop()._keras_history
    node = operation._inbound_nodes[index]
    if node not in nodes:
      nodes.append(node)
      pending += node.input_tensors
  return nodes


def _check_logits(tensor) -> None:
  """Checks that a tensor is not the result of a softmax or sigmoid."""
  operation = tensor._keras_history.operation  # Private, as in `_nodes`.
  if hasattr(operation, "outputs") and hasattr(operation, "layers"):
    # The operation is a model inside this one.
    return _check_logits(operation.outputs[tensor._keras_history.tensor_index])
  activation = getattr(operation, "activation", None)
  name = getattr(activation, "__name__", "") or type(operation).__name__.lower()
  name = type(operation).__name__.lower() if name == "linear" else name
  if name in _PROBABILITIES:
    raise probabilities_error("output", f"the {name} of {operation.name!r}")
  return None
