"""Joins several networks in one Model: an ensemble of teachers, or students that teach one
another."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.adapters.kinds import check_model
from distill_jax.models.adapters.outputs import AUXILIARY_LOSS
from distill_jax.types import Batch, Model, Outputs, Sample, Variables


def cohort(models: Sequence[Model]) -> Model:
  """Returns a Model of several networks, each with its own weights and random numbers.

  As a student it trains all of them in one step, each with the others as teachers by
  `objectives.mutual` (deep mutual learning, Zhang et al. 2018). `member` extracts one network's
  weights.

  Args:
    models: at least one.

  Returns:
    A Model that outputs every output of network i as 'i/name', and network 0's also as 'name'. It
    generates as network 0 does.

  Raises:
    ValueError: no models, or one that is no Model or an EMA of the student.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import models
  >>> linear = lambda w, x: x @ w
  >>> networks = [models.from_apply(None, linear, variables=jnp.eye(2), inputs="x")] * 2
  >>> model = models.cohort(networks)
  >>> outputs, _ = model.apply(*model.variables, {"x": jnp.ones((1, 2))}, train=False, key=None)
  >>> sorted(outputs)
  ['0/logits', '1/logits', 'logits']
  """
  if not models:
    raise ValueError("models: expected at least one, got none")
  for i, model in enumerate(models):
    check_model(f"models[{i}]", model)
    if model.ema_update is not None:
      raise ValueError(
        f"models: expected networks with weights, got an EMA of the student at index {i}"
      )

  def init(key, batch) -> Variables:
    keys = [jax.random.fold_in(key, i) for i in range(len(models))]
    return _join([_start(m, k, batch) for m, k in zip(models, keys, strict=True)])

  def apply(params, state, batch, *, train, key) -> tuple[Outputs, Any]:
    outputs: dict[str, Any] = {}
    new_state = {}
    auxiliary_losses: list[Any] = []
    for i, model in enumerate(models):
      member_key = None if key is None else jax.random.fold_in(key, i)
      member_outputs, new_state[str(i)] = model.apply(
        params[str(i)], state[str(i)], batch, train=train, key=member_key
      )
      member_outputs = dict(member_outputs)
      if AUXILIARY_LOSS in member_outputs:
        auxiliary_losses.append(member_outputs.pop(AUXILIARY_LOSS))
      outputs |= {f"{i}/{name}": x for name, x in member_outputs.items()}
      if i == 0:
        outputs |= member_outputs
    if auxiliary_losses:
      outputs[AUXILIARY_LOSS] = sum(auxiliary_losses)
    return outputs, new_state

  variables = [m.variables for m in models if m.variables is not None]
  return Model(
    init,
    apply,
    _join(variables) if len(variables) == len(models) else None,
    reads=tuple(dict.fromkeys(name for model in models for name in model.reads)),
    sample=_first_sample(models[0]),
  )


def member(variables: Variables, i: int) -> Variables:
  """Returns the variables of network i of a `cohort`.

  >>> from distill_jax import models
  >>> linear = lambda w, x: x @ w
  >>> networks = [models.from_apply(None, linear, variables=i * jnp.eye(2)) for i in (1, 2)]
  >>> models.member(models.cohort(networks).variables, 1).params
  Array([[2., 0.],
         [0., 2.]], dtype=float32)
  """
  return Variables(variables.params[str(i)], variables.state[str(i)])


def _first_sample(model: Model) -> Sample | None:
  """Returns what generates by the weights of network 0 among those of all."""
  sample = model.sample
  return sample and (lambda variables, key, batch: sample(member(variables, 0), key, batch))


def _start(model: Model, key: jax.Array, batch: Batch) -> Variables:
  """Returns a copy of the weights that a member carries, else those of its init."""
  if model.variables is None:
    return model.init(key, batch)
  return Variables(*jax.tree.map(jnp.copy, tuple(model.variables)))


def _join(variables: Sequence[Variables]) -> Variables:
  params = {str(i): v.params for i, v in enumerate(variables)}
  state = {str(i): v.state for i, v in enumerate(variables)}
  return Variables(params, state)
