"""Turns Keras 3 models on the JAX backend into Models. Needs the extra `keras`."""

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from distill_jax.errors import install_hint, suggest
from distill_jax.models.adapters.outputs import Features, as_mapping, as_outputs, select_inputs
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, Outputs, Tree, Variables

_BACKEND = (
  "from_keras needs Keras on the JAX backend: set KERAS_BACKEND=jax before keras is first imported"
)
try:
  import keras

  # Private: `keras.utils.clear_session` resets names and seeds, but nothing public restores them.
  from keras.src.backend.common import global_state
except ImportError as error:  # Keras imports its backend at once; the default one is TensorFlow.
  raise ImportError(f"{_BACKEND}, and {install_hint('keras')} ({error})") from error
if keras.backend.backend() != "jax":
  raise ImportError(f"{_BACKEND}; it runs on {keras.backend.backend()}")

_PROBABILITIES = ("softmax", "sigmoid")


def from_keras(
  model: keras.Model | Callable[[], keras.Model],
  *,
  inputs: str | Sequence[str] = "image",
  features: Features = (),
  output: str = "logits",
) -> Model:
  """Returns a Model of a Keras 3 model.

  Args:
    model: a built model with its weights (they are copied: training never touches yours), or a
      function `() -> model`, which builds a new one from the key of `init`. For a student pass a
      function: the automatic names of its layers ('dense_3') then do not depend on earlier models,
      so that a later process finds its weights again.
    inputs: the batch entry, or entries (passed as a list). They must be what the network was
      trained on: `keras.applications` has a `preprocess_input` for each of its families.
    features: outputs of layers, `{name: layer name}` or a list of layer names, of functional and
      Sequential models only; any other returns a mapping from its `call`.
    output: name of the output of a model that returns one array. A network without a head
      (`include_top=False`) has no logits: use "map".

  Returns:
    A Model. Its params are the trainable variables, nested by their path. Its state is all others
    (batch statistics, frozen layers) except the states of seed generators, which in training come
    from the key of the call. Losses that layers add (regularizers) are not used: add a term to the
    objective, or weight decay. `init` of a function cannot be compiled (`jax.eval_shape` is fine):
    Keras initializes weights from seeds of the host.

  Raises:
    ImportError: Keras is missing or runs on another backend (on import of this adapter).
    ValueError: the model is not built; the output named "logits" is a softmax or sigmoid; no such
      layer; two variables of one path.
  """
  has_weights = isinstance(model, keras.Model)
  net: Any = model if has_weights else _construct(model, 0)
  if not net.built:
    raise ValueError(
      f"model: expected a built one, got {net.name!r} without variables: give it an Input"
    )
  call = _with_features(net, features, output)
  groups = _groups(net)
  variables = _values(groups) if has_weights else None

  def init(key: jax.Array, batch: Batch) -> Variables:
    del batch
    if variables is not None:
      return Variables(*jax.tree.map(jnp.copy, tuple(variables)))
    if isinstance(key, jax.core.Tracer):
      return _shapes(groups)
    return _values(_groups(_construct(model, int(jax.random.bits(key)))))

  def apply(params: Tree, state: Tree, batch: Batch, *, train: bool, key) -> tuple[Outputs, Tree]:
    trainable, others, seeds = groups
    if train and key is None and seeds:
      raise ValueError("key: expected a PRNG key for the model's seed generators, got None")
    args = select_inputs(batch, inputs)
    values = dict(named_leaves(params)) | dict(named_leaves(state))
    mapping = [(variable, values[path]) for path, variable in {**trainable, **others}.items()]
    mapping += zip(seeds, _seed_values(key, len(seeds)))
    # Not stateless_call: it bypasses __call__, and then a subclassed model whose call has no
    # argument `training` runs its batch norm and dropout in evaluation mode.
    with keras.StatelessScope(state_mapping=mapping) as scope:
      result = call(args[0] if isinstance(inputs, str) else list(args), training=train)
    new_state = _nested(
      {path: scope.get_current_value(variable) for path, variable in others.items()}
    )
    return {output: result} if isinstance(result, jax.Array) else as_outputs(result), new_state

  return Model(init, apply, variables)


def to_keras(model: keras.Model | Callable[[], keras.Model], variables: Variables) -> keras.Model:
  """Returns a Keras model with trained weights, for example to save a student.

  Args:
    model: as passed to `from_keras`; a model is changed in place, a function builds a new one.
    variables: trained variables of that model.

  Raises:
    ValueError: the variables have other names than the model's.
  """
  net = model if isinstance(model, keras.Model) else _construct(model, 0)
  trainable, others, _ = _groups(net)
  keras_variables = trainable | others
  values = dict(named_leaves(variables.params)) | dict(named_leaves(variables.state))
  if keras_variables.keys() != values.keys():
    difference = sorted(keras_variables.keys() ^ values.keys())
    raise ValueError(f"variables: expected the names of {net.name!r}, got other ones: {difference}")
  for path, variable in keras_variables.items():
    variable.assign(jnp.copy(values[path]))
  return net


def _construct(make: Callable[[], keras.Model], seed: int) -> keras.Model:
  with _new_session(seed):
    net = make()
  if not isinstance(net, keras.Model):
    raise ValueError(
      f"model: expected a keras.Model or a function () -> keras.Model, got {type(net).__name__}"
    )
  return net


@contextlib.contextmanager
def _new_session(seed: int):
  """Sets Keras' counters of names and its source of seeds as in a new process, and restores
  them."""
  names = ("object_name_uids", "global_seed_generator")
  before = {name: global_state.get_global_attribute(name) for name in names}
  random_state = random.getstate()
  random.seed(seed)
  try:
    for name in names:
      global_state.set_global_attribute(name, None)
    yield
  finally:
    random.setstate(random_state)
    for name, value in before.items():
      global_state.set_global_attribute(name, value)


def _groups(net: keras.Model) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
  """Returns trainable and other variables by path, and the states of seed generators."""
  seeds = [v for v in net.non_trainable_variables if v.path.endswith("seed_generator_state")]
  seed_ids = {id(v) for v in seeds}
  others = [v for v in net.non_trainable_variables if id(v) not in seed_ids]
  paths = [v.path for v in (*net.trainable_variables, *others)]
  duplicates = sorted({path for path in paths if paths.count(path) > 1})
  if duplicates:
    raise ValueError(
      f"model: expected one variable a path, got several of {duplicates[0]!r}: rename the layers"
    )
  return {v.path: v for v in net.trainable_variables}, {v.path: v for v in others}, seeds


def _values(groups) -> Variables:
  params, state = ({path: jnp.copy(v.value) for path, v in group.items()} for group in groups[:2])
  return Variables(_nested(params), _nested(state))


def _shapes(groups) -> Variables:
  """Returns traced values that have the right shapes, and raise when they are computed."""

  def fail():
    raise ValueError("init: a Keras model cannot be initialized in a compiled function")

  shapes = [
    {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in group.items()} for group in groups[:2]
  ]
  return Variables(*map(_nested, jax.pure_callback(fail, shapes)))


def _seed_values(key, count: int) -> list[jax.Array]:
  key = jax.random.key(0) if key is None else key
  return [jax.random.bits(jax.random.fold_in(key, i), (2,), "uint32") for i in range(count)]


def _nested(flat: Mapping[str, Any]) -> Tree:
  return traverse_util.unflatten_dict(flat, sep="/")


def _with_features(net: keras.Model, features: Features, output: str) -> keras.Model:
  """Returns the model, or one that shares its variables and also returns the features.

  Raises:
    ValueError: features that it does not have; or "logits" that are probabilities.
  """
  if not hasattr(net, "outputs"):
    if features:
      raise ValueError(
        f"features: expected a functional or Sequential model, got {net.name!r}: return a mapping"
        " from its call instead"
      )
    return net
  tensors = _named_tensors(net, output)
  for name, layer in as_mapping(features).items():
    tensors[name] = _layer_output(net, name, layer)
  if "logits" in tensors:
    _check_logits(tensors["logits"])
  entries = net.inputs[0] if len(net.inputs) == 1 else net.inputs
  return keras.Model(entries, tensors) if features else net


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
    raise ValueError(
      f"output: expected logits, got the {name} of {operation.name!r}: build the model with"
      " classifier_activation=None (keras.applications) or activation=None in its last layer, or"
      " give the output another name"
    )
  return None
