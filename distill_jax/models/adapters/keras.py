"""Turns Keras 3 models on the JAX backend into Models. Needs the extra `keras`."""

import contextlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from distill_jax.errors import install_hint
from distill_jax.models.adapters.kinds import adapter_of, check_call, wrong_kind
from distill_jax.models.adapters.outputs import AUXILIARY_LOSS, Features, as_outputs
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

# These import Keras too, and only now it is known to be there.
from distill_jax.models.adapters.keras_graph import (  # noqa: E402
  Inputs,
  batch_entries,
  make_argument,
  with_features,
)

_KIND = "a keras.Model or a function () -> keras.Model"


def from_keras(
  model: keras.Model | Callable[[], keras.Model],
  *,
  inputs: Inputs = "image",
  features: Features = (),
  output: str = "logits",
  call: Callable[..., Any] | None = None,
) -> Model:
  """Returns a Model of a Keras 3 model.

  Layers with `trainable = False` stay as they are, batch statistics included.

  Args:
    model: a built model with its weights (they are copied: training never touches yours), or a
      function `() -> model`, which builds a new one from the key of `init`. For a student pass a
      function: the automatic names of its layers ('dense_3') then do not depend on earlier models,
      so that a later process finds its weights again.
    inputs: the batch entry or entries. `{input name: batch entry}`, and a list of the names of the
      model's inputs, are passed by name; any other list in the order of the model's list. They must
      be what the network was trained on: `keras.applications` has a `preprocess_input` for each of
      its families.
    features: outputs of layers, `{name: layer name}` or a list of layer names, of functional and
      Sequential models only; any other returns a mapping from its `call`.
    output: name of the output of a model that returns one array. A network without a head
      (`include_top=False`) has no logits: use "map".
    call: `(model, *inputs, train=bool) -> outputs`, for a model whose `call` takes its inputs in
      another way; None: `model(input or inputs, training=train)`.

  Returns:
    A Model. Its params are the trainable variables, nested by their path. Its state is all others
    (batch statistics, frozen layers) except the states of seed generators, which in training come
    from the key of the call. Losses that layers add (regularizers) are not used: add a term to the
    objective, or weight decay. `init` of a function cannot be compiled (`jax.eval_shape` is fine):
    Keras initializes weights from seeds of the host.

  Raises:
    ImportError: Keras is missing or runs on another backend (on import of this adapter).
    ValueError: the model is not built, or has other inputs; the output named "logits" is a softmax
      or sigmoid; no such layer; two variables of one path.

  >>> import keras
  >>> from distill_jax import models
  >>> make = lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(10, name="head")])
  >>> student = models.from_keras(make, inputs="x")
  >>> batch = {"x": np.ones((2, 4), np.float32)}
  >>> variables = jax.eval_shape(student.init, jax.random.key(0), batch)
  >>> jax.tree.map(jnp.shape, variables.params)
  {'sequential': {'head': {'bias': (10,), 'kernel': (4, 10)}}}
  """
  has_weights = isinstance(model, keras.Model)
  net: Any = model if has_weights else _construct(model, 0)
  if not net.built:
    raise ValueError(
      f"model: expected a built one, got {net.name!r} without variables: give it an Input, or call "
      "it once on an example"
    )
  forward = _forward(net, inputs, features, output, call)
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
    values = dict(named_leaves(params)) | dict(named_leaves(state))
    mapping = [(variable, values[path]) for path, variable in {**trainable, **others}.items()]
    mapping += zip(seeds, _seed_values(key, len(seeds)))
    # Not stateless_call: it bypasses __call__, and then a subclassed model whose call has no
    # argument `training` runs its batch norm and dropout in evaluation mode.
    with keras.StatelessScope(state_mapping=mapping, collect_losses=train) as scope:
      result = forward(batch, train)
      losses = net.losses if train else []
    new_state = _nested(
      {path: scope.get_current_value(variable) for path, variable in others.items()}
    )
    outputs = {output: result} if isinstance(result, jax.Array) else as_outputs(result)
    if losses:
      outputs[AUXILIARY_LOSS] = sum(losses)
    return outputs, new_state

  return Model(init, apply, variables)


def _forward(
  net: keras.Model, inputs: Inputs, features: Features, output: str, call: Callable | None
) -> Callable[[Batch, bool], Any]:
  """Returns `(batch, train) -> result` of calling the model."""
  if call is not None:
    if features:
      raise ValueError(
        "features: expected none beside call=, got some: return a mapping of outputs from call"
      )
    return lambda batch, train: call(net, *batch_entries(batch, inputs), train=train)
  extended = with_features(net, features, output)
  argument = make_argument(net, inputs)
  return lambda batch, train: extended(argument(batch), training=train)


def to_keras(model: keras.Model | Callable[[], keras.Model], variables: Variables) -> keras.Model:
  """Returns a Keras model with trained weights, for example to save a student.

  Args:
    model: as passed to `from_keras`; a model is changed in place, a function builds a new one.
    variables: trained variables of that model.

  Raises:
    ValueError: the variables have other names than the model's.

  >>> import keras
  >>> from distill_jax import models
  >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
  >>> teacher = models.from_keras(net, inputs="x")
  >>> doubled = jax.tree.map(lambda x: 0 * x + 2, teacher.variables)
  >>> models.to_keras(net, doubled).get_layer("head").bias.value
  Array([2.], dtype=float32)
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
  if not callable(make) or adapter_of(make) is not None:
    raise wrong_kind("model", _KIND, make)
  check_call("model", make, 0, _KIND)
  with _new_session(seed):
    net = make()
  if not isinstance(net, keras.Model):
    raise wrong_kind("model", _KIND, net)
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
