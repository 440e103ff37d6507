"""Takes networks of any library as they are: calls the adapter, with the entries of the batch."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_jax import models
from distill_jax.models.adapters.kinds import adapter_of, wrong_kind
from distill_jax.models.adapters.modes import FLAGS
from distill_jax.models.variables import as_variables
from distill_jax.types import Model, Variables, input_names

_PAIRS = ("from_linen", "from_haiku", "from_equinox")
_BOXES = ("boxes", "crowd")
"""What a detector is to find: no input of a network, unless an argument has the name."""
_TAKE_CALL = ("from_linen", "from_nnx", "from_keras")
_NAMED = (
  inspect.Parameter.POSITIONAL_ONLY,
  inspect.Parameter.POSITIONAL_OR_KEYWORD,
  inspect.Parameter.KEYWORD_ONLY,
)


def as_model(field: str, network: Any, entries: Iterable[str]) -> Model:
  """Returns a network as a Model; a Model stays as it is, with `Variables` of any form.

  The network takes the batch's only input, or those with the names of its own arguments.

  Args:
    field: name of the argument, for messages.
    network: a Model; a network of a library that has an adapter, or a class or pair that the
      adapter takes: `(Linen module, variables)`, `(Haiku transform, params)`, `(Equinox module,
      state)`.
    entries: names of the batch's entries.

  Raises:
    ValueError: it is no network, or its inputs cannot be told from the batch's entries; the message
      shows the call of the adapter.
  """
  if isinstance(network, Model):
    if network.variables is None:
      return network
    return network._replace(variables=as_variables(field, network.variables))
  is_pair = adapter_of(network) is None and isinstance(network, (tuple, list)) and len(network) == 2
  module = network[0] if is_pair else network
  adapter = adapter_of(module)
  _check_single(field, network)
  if adapter is None or (is_pair and adapter not in _PAIRS):
    hint = (
      "write .model for its network with trained weights"
      if isinstance(getattr(network, "model", None), Model)
      else "from_apply(init, apply) wraps functions; from_nnx, from_keras and from_equinox also "
      "take a function that builds the network"
    )
    raise ValueError(
      f"{field}: expected a Model or a network of Flax, Keras, Equinox or Haiku, got "
      f"{type(network).__name__}: {hint}"
    )
  if isinstance(module, type) and adapter != "from_nnx":
    raise wrong_kind(field, "a Model or a network", module)
  arguments = network if is_pair and adapter != "from_equinox" else (network,)
  inputs = _inputs(field, adapter, module, input_names(entries))
  try:
    return getattr(models, adapter)(*arguments, inputs=inputs)
  except ValueError as error:
    raise ValueError(f"{field}: {error}") from error


def _check_single(field: str, network: Any) -> None:
  """Raises ValueError for a folder and for several networks, with the call that makes a Model."""
  if isinstance(network, str | os.PathLike):
    cached = (
      ", or cache.open_cache(folder) if it holds cached outputs" if field == "teacher" else ""
    )
    raise ValueError(
      f"{field}: expected a Model, got the path {os.fspath(network)!r}: pass the network, and "
      f"{_variables_argument(field)}=storage.student.load_student(path, model){cached}"
    )
  if not isinstance(network, Mapping | tuple | list):
    return
  members = list(network.values() if isinstance(network, Mapping) else network)
  if members and all(_is_network(member) for member in members):
    is_teacher = field == "teacher"
    hint = (
      "teachers.ensemble(models, mean='probabilities')" if is_teacher else "models.cohort(models)"
    )
    raise ValueError(
      f"{field}: expected one Model, got {len(members)} networks: write {hint}, of Models"
    )


def _variables_argument(field: str) -> str:
  return "variables" if field == "model" else f"{field}_variables"


def _is_network(x: Any) -> bool:
  """Returns whether an object is a network; states of Equinox, of the same library, are none."""
  if isinstance(x, Model):
    return True
  return adapter_of(x) is not None and (callable(x) or hasattr(x, "init"))


def trained_model(
  field: str, network: Any, variables: Any, entries: Iterable[str]
) -> tuple[Model, Variables]:
  """Returns a network as a Model, with its variables.

  Args:
    field, network, entries: as in `as_model`.
    variables: as in `as_variables`; None: those that the network carries.

  Raises:
    ValueError: as in `as_model`; or there are no variables.
  """
  model = as_model(field, network, entries)
  variables = model.variables if variables is None else variables
  if variables is None and field != "model":
    raise ValueError(f"{field}: expected (model, variables), got a network without variables")
  if variables is None:
    raise ValueError(
      "variables: expected the model's Variables, got none: pass those of a FitResult"
    )
  return model, as_variables("variables", variables)


def _inputs(field: str, adapter: str, module: Any, entries: list[str]) -> Sequence[str] | str:
  """Returns the entries that a network takes: the only one, or those with its arguments' names."""
  required, optional = _argument_names(adapter, module)
  others = [name for name in entries if name not in _BOXES]
  if len(required) == len(others) == 1 and required[0] not in entries:
    return others[0]
  if required and set(required) <= set(entries) and not set(optional) & set(entries):
    return required[0] if len(required) == 1 else required
  if entries and len(required) == 1 and required != ["*args"]:
    choice = repr((others or entries)[0])
    call = ""
  else:
    choice = repr(entries[0]) if len(entries) == 1 else f"({', '.join(map(repr, entries))})"
    call = ", call=lambda net, x, train: net(x)" if adapter in _TAKE_CALL else ""
  name = (module if isinstance(module, type) else type(module)).__name__
  raise ValueError(
    f"{field}: expected an entry of the batch for each of the inputs {required} of {name}, got "
    f"{entries}: choose them with models.{adapter}(network, inputs={choice}{call})"
  )


def _argument_names(adapter: str, module: Any) -> tuple[list[str], list[str]]:
  """Returns the names of a network's inputs: those that it needs, and those with defaults."""
  if adapter == "from_keras":
    from distill_jax.models.adapters.keras_graph import names_of_inputs

    names = names_of_inputs(module)
    if names is not None:
      return names, []
  parameters = _parameters(adapter, module)
  names = [p.name for p in parameters if p.default is p.empty and p.kind in _NAMED]
  if not names and any(p.kind is p.VAR_POSITIONAL for p in parameters):
    names = ["*args"]  # Such as a Sequential's.
  return names, [p.name for p in parameters if p.default is not p.empty]


def _parameters(adapter: str, module: Any) -> list[inspect.Parameter]:
  """Returns the parameters of calling a network but those that the adapter passes itself."""
  if adapter == "from_haiku":
    parameters = list(inspect.signature(module.init).parameters.values())[1:]
  elif adapter == "from_keras":
    parameters = list(inspect.signature(module.call).parameters.values())
  else:
    kind = module if isinstance(module, type) else type(module)
    call = next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), None)
    parameters = [] if call is None else list(inspect.signature(call).parameters.values())[1:]
  passed = {"key", "state"} if adapter == "from_equinox" else FLAGS
  return [p for p in parameters if p.name not in passed]
