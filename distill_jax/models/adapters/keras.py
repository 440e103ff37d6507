"""Keras 3 models on the JAX backend as Models. Needs the extra `keras`."""

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from distill_jax.errors import suggest
from distill_jax.models.adapters.outputs import Features, as_mapping, as_outputs, select_inputs
from distill_jax.types import Batch, Model, Outputs, Tree, Variables

_BACKEND = (
  "from_keras needs Keras on the JAX backend: set KERAS_BACKEND=jax before keras is first imported"
)
try:
  import keras
  from keras.src.backend.common import global_state
except ImportError as error:  # Keras imports its backend at once, TensorFlow unless told otherwise
  raise ImportError(f"{_BACKEND}, and install distill-jax[keras] ({error})") from error
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
  """A Keras 3 model as a Model.

  Args:
    model: a built model with its weights (copied: training never touches yours), or a function `() -> model`
      that makes a new one from the key given to `init`. For a student give a function: the automatic names of
      its layers ('dense_3') then do not depend on what was built before, so that a later process finds its
      weights again.
    inputs: the batch entry, or entries (passed as a list). They must hold what the network was trained on:
      `keras.applications` has a `preprocess_input` for each of its families.
    features: outputs of layers, `{name: layer name}` or a list of layer names. Functional and Sequential models
      only; another one returns a mapping from its `call`.
    output: what to call the output of a model that returns one array. For a network without a head
      (`include_top=False`) it is no logits: say "map".

  Returns:
    A Model. Its params are the trainable variables, nested by their path; its state all others (batch statistics,
    frozen layers) except the states of seed generators, which in training are drawn from the key of the call.
    Losses that layers add (regularizers) are not used: add a term to the objective, or weight decay. `init`
    from a function cannot be compiled (`jax.eval_shape` is fine): Keras draws weights from seeds of the host.

  Raises:
    ImportError: Keras is missing or runs on another backend (on import of this adapter).
    ValueError: the model is not built; the output called "logits" is a softmax or sigmoid; no such layer; two
      variables of one path.
  """
  made = isinstance(model, keras.Model)
  net: Any = model if made else _make(model, 0)
  if not net.built:
    raise ValueError(
      f"the Keras model {net.name!r} has no variables yet: give it an Input, or call it once"
    )
  call = _with_features(net, features, output)
  groups = _groups(net)
  variables = _values(groups) if made else None

  def init(key: jax.Array, batch: Batch) -> Variables:
    del batch
    if variables is not None:
      return Variables(*jax.tree.map(jnp.copy, tuple(variables)))
    if isinstance(key, jax.core.Tracer):
      return _shapes_alone(groups)
    return _values(_groups(_make(model, int(jax.random.bits(key)))))

  def apply(params: Tree, state: Tree, batch: Batch, *, train: bool, key) -> tuple[Outputs, Tree]:
    trainable, others, seeds = groups
    if train and key is None and seeds:
      raise ValueError(
        "the model draws random numbers (dropout?) in training: key must not be None"
      )
    args = select_inputs(batch, inputs)
    values = {**_flat(params), **_flat(state)}
    mapping = [(variable, values[path]) for path, variable in {**trainable, **others}.items()]
    mapping += zip(seeds, _seed_values(key, len(seeds)))
    # Not stateless_call: it bypasses __call__, and then a subclassed model whose call has no argument
    # `training` runs its batch norm and dropout in evaluation mode.
    with keras.StatelessScope(state_mapping=mapping) as scope:
      result = call(args[0] if isinstance(inputs, str) else list(args), training=train)
    new_state = _nested(
      {path: scope.get_current_value(variable) for path, variable in others.items()}
    )
    return {output: result} if isinstance(result, jax.Array) else as_outputs(result), new_state

  return Model(init, apply, variables)


def to_keras(model: keras.Model | Callable[[], keras.Model], variables: Variables) -> keras.Model:
  """A Keras model with the given weights: a trained student, to save or to use as one.

  Args:
    model: as it was given to `from_keras`; a model is changed in place, a function makes a new one.
    variables: the trained ones.

  Raises:
    ValueError: they are not this model's.
  """
  net = model if isinstance(model, keras.Model) else _make(model, 0)
  trainable, others, _ = _groups(net)
  own, values = {**trainable, **others}, {**_flat(variables.params), **_flat(variables.state)}
  if own.keys() != values.keys():
    raise ValueError(f"variables of other names: {sorted(own.keys() ^ values.keys())}")
  for path, variable in own.items():
    variable.assign(jnp.copy(values[path]))
  return net


def _make(make: Callable[[], keras.Model], seed: int) -> keras.Model:
  with _fresh(seed):
    net = make()
  if not isinstance(net, keras.Model):
    raise ValueError(
      f"expected a keras.Model or a function () -> keras.Model, got {type(net).__name__}"
    )
  return net


@contextlib.contextmanager
def _fresh(seed: int):
  """Keras' global counters of names and its source of seeds as in a new process, for a while."""
  names = ("object_name_uids", "global_seed_generator")
  before = {name: global_state.get_global_attribute(name) for name in names}
  drawn = random.getstate()
  random.seed(seed)
  try:
    for name in names:
      global_state.set_global_attribute(name, None)
    yield
  finally:
    random.setstate(drawn)
    for name, value in before.items():
      global_state.set_global_attribute(name, value)


def _groups(net: keras.Model) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
  """Trainable and other variables by path, and the states of seed generators."""
  seeds = [v for v in net.non_trainable_variables if v.path.endswith("seed_generator_state")]
  drawn = {id(v) for v in seeds}
  trainable, others = (
    net.trainable_variables,
    [v for v in net.non_trainable_variables if id(v) not in drawn],
  )
  paths = [v.path for v in (*trainable, *others)]
  twice = sorted({path for path in paths if paths.count(path) > 1})
  if twice:
    raise ValueError(
      f"several variables have the path {twice[0]!r}: give the layers different names"
    )
  return {v.path: v for v in trainable}, {v.path: v for v in others}, seeds


def _values(groups) -> Variables:
  return Variables(
    *(_nested({path: jnp.copy(v.value) for path, v in group.items()}) for group in groups[:2])
  )


def _shapes_alone(groups) -> Variables:
  def refuse():
    raise ValueError("init of a Keras model cannot be compiled: call it outside jit")

  shapes = [
    {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in group.items()} for group in groups[:2]
  ]
  return Variables(*map(_nested, jax.pure_callback(refuse, shapes)))


def _seed_values(key, count: int) -> list[jax.Array]:
  key = jax.random.key(0) if key is None else key
  return [jax.random.bits(jax.random.fold_in(key, i), (2,), "uint32") for i in range(count)]


def _nested(flat: Mapping[str, Any]) -> Tree:
  return traverse_util.unflatten_dict(flat, sep="/")


def _flat(tree: Tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _with_features(net: keras.Model, features: Features, output: str) -> keras.Model:
  """The model, or one that shares its variables and returns the features too. Refuses probabilities."""
  if not hasattr(net, "outputs"):
    if features:
      raise ValueError(
        f"features of {net.name!r}: only functional and Sequential models know their layers' outputs;"
        " return a mapping from its call instead"
      )
    return net
  tensors = _named_tensors(net, output)
  for name, layer in as_mapping(features).items():
    tensors[name] = _layer_output(net, name, layer)
  if "logits" in tensors:
    _refuse_probabilities(tensors["logits"])
  entries = net.inputs[0] if len(net.inputs) == 1 else net.inputs
  return keras.Model(entries, tensors) if features else net


def _named_tensors(net: keras.Model, output: str) -> dict[str, Any]:
  structure = net.outputs[0] if isinstance(net, keras.Sequential) else net.output
  if isinstance(structure, keras.KerasTensor):
    return {output: structure}
  if isinstance(structure, Mapping):
    return dict(structure)
  raise ValueError(
    f"{net.name!r} returns a list of {len(net.outputs)}: name them, keras.Model(inputs, {{'logits': ...}})"
  )


def _layer_output(net: keras.Model, name: str, layer: str):
  layers = {own.name: own for own in net.layers}
  if layer not in layers:
    raise ValueError(f"no layer {layer!r} to capture as {name!r}{suggest(layer, layers)}")
  # Not layer.output: it is that of the layer's first call anywhere, of several or in another model.
  outputs = [
    t
    for node in _nodes(net.outputs)
    if node.operation is layers[layer]
    for t in node.output_tensors
  ]
  if len(outputs) != 1:
    raise ValueError(
      f"layer {layer!r} has {len(outputs)} outputs here, so none is the one to capture as {name!r}: build the model"
      f" with the right one, keras.Model(inputs, {{'logits': ..., {name!r}: ...}})"
    )
  return outputs[0]


def _nodes(tensors) -> list[Any]:
  """The calls of layers that these tensors come from."""
  open_tensors, nodes = list(tensors), []
  while open_tensors:
    operation, index, _ = open_tensors.pop()._keras_history
    node = operation._inbound_nodes[index]
    if node not in nodes:
      nodes.append(node)
      open_tensors += node.input_tensors
  return nodes


def _refuse_probabilities(tensor) -> None:
  operation = tensor._keras_history.operation
  if hasattr(operation, "outputs") and hasattr(operation, "layers"):  # a model as a layer
    return _refuse_probabilities(operation.outputs[tensor._keras_history.tensor_index])
  activation = getattr(operation, "activation", None)
  name = getattr(activation, "__name__", "") or type(operation).__name__.lower()
  name = type(operation).__name__.lower() if name == "linear" else name
  if name in _PROBABILITIES:
    raise ValueError(
      f"{operation.name!r} ends in {name}: its outputs are probabilities, and losses take logits. Build the model"
      " with classifier_activation=None (keras.applications) or activation=None in its last layer; or, if they"
      " are not to be taken for logits, give output= another name"
    )
  return None
