"""Lets a student begin with a frozen copy of its teacher's first layers, run once for both."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.initialization.teacher import init_from_teacher
from distill_jax.errors import suggest
from distill_jax.models.adapters.kinds import check_model
from distill_jax.models.batch_dependencies import entries_read
from distill_jax.trees import named_leaves
from distill_jax.types import CACHED, Batch, Model, Outputs, Tree, Variables

_FROZEN = "shared_prefix"
_SAME_PATH = r"\g<0>"


def shared_prefix(
  student: Model,
  teacher: Model,
  prefix: str | Mapping[str, str],
  *,
  outputs: str | Sequence[str] = "encoded",
  rest: Model | None = None,
) -> Model:
  """Returns a student whose first layers are a frozen copy of the teacher's, as distil-whisper's
  encoder is (Gandhi et al. 2023, arXiv:2311.00430).

      student = models.shared_prefix(student, teacher, r"^encoder/")
      result = fit(student, teacher, objective, ...)
      whole = models.whole_variables(result.variables)  # those of the network that was passed

  In a train step the student continues from the teacher's `outputs`: the shared layers run once,
  forwards, in evaluation mode. A cache that stores these outputs has the same effect. Where no
  teacher gives them, as in evaluation and after an export, the student runs its own copy. The copy
  is part of the student's state: it has no gradient, no optimizer state and no weight decay.

  Args:
    student: the whole network. Where the batch has entries of the names in `outputs`, it continues
      from these instead of running its first layers, or `rest` does. Its own first layers are
      replaced by the teacher's in `init`; where it has `variables`, they must be equal to them.
    teacher: a network with variables. The teacher of the train step may be another Model with the
      same outputs, such as a cache of this one.
    prefix: regular expression found in the paths of all parameters (and states) from which
      `outputs` are computed; `{pattern: replacement}` where the teacher's paths differ, as in
      `compression.initialization.teacher.init_from_teacher`.
    outputs: names of the first layers' outputs, of student and teacher.
    rest: a Model of the student's variables that computes its other outputs from the batch and
      `outputs`; None: the student does.

  Raises:
    ValueError: at once, a teacher without variables, or a student whose variables are not the
      teacher's; in init, a pattern that fits nothing, arrays that differ in shape, or outputs that
      are missing or computed from parameters that would be trained.

  >>> from distill_jax import models
  >>> def decode(weights, encoded):
  ...   return {"encoded": encoded, "logits": encoded @ weights["decoder"]}
  >>> def network(weights, x):
  ...   return decode(weights, x @ weights["encoder"])
  >>> weights = {"encoder": 2 * jnp.eye(2), "decoder": jnp.eye(2)}
  >>> teacher = models.from_apply(None, network, variables=weights, inputs="x")
  >>> rest = models.from_apply(None, decode, variables=weights, inputs="encoded")
  >>> student = models.shared_prefix(teacher, teacher, "^encoder$", rest=rest)
  >>> student.variables.params["encoder"]  # None: it is not trained
  >>> batch = {"x": jnp.ones((1, 2))}
  >>> apply = lambda batch: student.apply(*student.variables, batch, train=True, key=None)[0]
  >>> apply(batch)["logits"]  # of its own encoder
  Array([[2., 2.]], dtype=float32)
  >>> apply(batch | {"teacher/encoded": jnp.array([[5.0, 6.0]])})["logits"]  # of the teacher's
  Array([[5., 6.]], dtype=float32)
  """
  check_model("student", student)
  check_model("teacher", teacher)
  if teacher.variables is None:
    raise ValueError(
      "teacher: expected a Model with variables, of which the student gets a copy, got none: write "
      "teacher._replace(variables=...)"
    )
  names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
  layers = {prefix: _SAME_PATH} if isinstance(prefix, str) else dict(prefix)
  continued = student if rest is None else rest
  source = teacher.variables
  if student.variables is not None:
    _check_equal(student.variables, _with_copy(student.variables, source, layers))

  def init(key: jax.Array, batch: Batch) -> Variables:
    if student.variables is None:
      variables = _with_copy(student.init(key, batch), source, layers)
    else:
      variables = Variables(*jax.tree.map(jnp.copy, tuple(student.variables)))
    _check_trained(student, variables, layers, names, batch)
    return _split(variables, layers)

  def apply(params, state, batch, *, train, key) -> tuple[Outputs, Any]:
    variables = whole_variables(Variables(params, state))
    shared = {name: batch[CACHED + name] for name in names if CACHED + name in batch}
    if len(shared) < len(names):
      if not train:
        return _with_state(student.apply(*variables, batch, train=False, key=key), state)
      # In evaluation mode, as for a teacher; the compiler removes all layers but the first ones.
      own = student.apply(*variables, batch, train=False, key=None)[0]
      shared = _named(own, names)
    result, inner = continued.apply(*variables, {**batch, **shared}, train=train, key=key)
    return _with_state(({**shared, **result}, inner), state)

  generate = student.sample
  sample = None
  if generate is not None:

    def sample(variables: Variables, key: Any, batch: Batch):
      return generate(whole_variables(variables), key, batch)

  variables = None if student.variables is None else _split(student.variables, layers)
  return Model(init, apply, variables, sample=sample, reads=names)


def whole_variables(variables: Variables) -> Variables:
  """Returns the variables of the network that was passed to `shared_prefix`, with the copy of the
  teacher's first layers; those of other networks stay as they are.

  >>> from distill_jax import models
  >>> from distill_jax.types import Variables
  >>> state = {"shared_prefix": {"encoder": 2.0, "decoder": None}, "state": {}}
  >>> models.whole_variables(Variables({"encoder": None, "decoder": 1.0}, state))
  Variables(params={'decoder': 1.0, 'encoder': 2.0}, state={})
  """
  state = variables.state
  if not isinstance(state, Mapping) or _FROZEN not in state:
    return variables
  params = jax.tree.map(
    lambda trained, frozen: trained if frozen is None else frozen,
    variables.params,
    state[_FROZEN],
    is_leaf=lambda x: x is None,
  )
  return Variables(params, state["state"])


def _split(variables: Variables, layers: Mapping[str, str]) -> Variables:
  """Returns the variables with the parameters of the first layers in their state."""
  leaves, structure = jax.tree.flatten(variables.params)
  frozen = _selected(variables.params, layers)
  trained = jax.tree.unflatten(structure, [None if f else x for x, f in zip(leaves, frozen)])
  copy = jax.tree.unflatten(structure, [x if f else None for x, f in zip(leaves, frozen)])
  return Variables(trained, {_FROZEN: copy, "state": variables.state})


def _with_state(result: tuple[Outputs, Any], state: Tree) -> tuple[Outputs, Tree]:
  outputs, inner = result
  return outputs, {**state, "state": inner}


def _selected(tree: Tree, layers: Mapping[str, str]) -> list[bool]:
  """Returns which leaves belong to the first layers."""
  return [any(re.search(p, name) for p in layers) for name, _ in named_leaves(tree)]


def _with_copy(student: Variables, teacher: Variables, layers: Mapping[str, str]) -> Variables:
  """Returns the student's variables with the first layers of the teacher."""
  try:
    params, _ = init_from_teacher(student.params, teacher.params, layers)
    states = {p: r for p, r in layers.items() if any(_selected(student.state, {p: r}))}
    state, _ = init_from_teacher(student.state, teacher.state, states)
  except ValueError as error:
    raise ValueError(f"prefix: {error}") from error
  return Variables(params, state)


def _named(outputs: Outputs, names: Iterable[str]) -> dict[str, jax.Array]:
  """Returns the outputs of these names."""
  for name in names:
    if name not in outputs:
      raise ValueError(
        f"outputs: expected outputs of the student, got {name!r}{suggest(name, outputs)}"
      )
  return {name: outputs[name] for name in names}


def _check_trained(
  student: Model,
  variables: Variables,
  layers: Mapping[str, str],
  names: Sequence[str],
  batch: Batch,
) -> None:
  """Checks that the first layers' outputs are computed from no parameter that is trained."""
  leaves = dict(named_leaves(variables.params))
  structure = jax.tree.structure(variables.params)

  def first_layers(batch, leaves):
    params = jax.tree.unflatten(structure, list(leaves.values()))
    return _named(student.apply(params, variables.state, batch, train=False, key=None)[0], names)

  read = entries_read(lambda batch, leaves: first_layers(batch, leaves), dict(batch), leaves)
  frozen = {n for n, is_frozen in zip(leaves, _selected(variables.params, layers)) if is_frozen}
  if trained := sorted(read - frozen):
    raise ValueError(
      f"prefix: expected a pattern of all parameters from which {list(names)} are computed, got "
      f"{list(layers)}, without {trained[:3]}: add them; where a later layer shares them, they are "
      "frozen there, too"
    )


def _check_equal(student: Variables, copy: Variables) -> None:
  """Checks that a student's own first layers are the teacher's."""
  for (name, own), (_, expected) in zip(named_leaves(tuple(student)), named_leaves(tuple(copy))):
    if own is not expected and not np.array_equal(own, expected, equal_nan=True):
      raise ValueError(
        f"student: expected the teacher's first layers, got other values of {name!r}: pass a Model "
        "without variables, whose init gets the copy, or copy them with init_from_teacher"
      )
