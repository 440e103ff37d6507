"""Several networks as one Model: an ensemble of teachers, or students that teach one another."""

from collections.abc import Sequence
from typing import Any

import jax

from distill_jax.types import Model, Variables


def cohort(models: Sequence[Model]) -> Model:
  """Networks side by side, each with its own weights and draws.

  As a student it trains all of them in one step, each teaching the others by `objectives.mutual` (deep mutual
  learning, Zhang et al. 2018). `member` takes one network's weights out of it.

  Returns:
    A Model with every output of network i as 'i/name', and the outputs of network 0 under their own names too.

  Raises:
    ValueError: no models, or one that follows the student.
  """
  if not models:
    raise ValueError("cohort() got no models")
  for i, model in enumerate(models):
    if model.ema_update is not None:
      raise ValueError(
        f"model {i} follows the student and has no weights of its own to join with others"
      )

  def init(key, batch) -> Variables:
    return _stack([m.init(jax.random.fold_in(key, i), batch) for i, m in enumerate(models)])

  def apply(params, state, batch, *, train, key):
    outputs: dict[str, Any] = {}
    new_state = {}
    for i, model in enumerate(models):
      own_key = None if key is None else jax.random.fold_in(key, i)
      own, new_state[str(i)] = model.apply(
        params[str(i)], state[str(i)], batch, train=train, key=own_key
      )
      outputs |= {f"{i}/{name}": x for name, x in own.items()} | (dict(own) if i == 0 else {})
    return outputs, new_state

  carried = [m.variables for m in models if m.variables is not None]
  return Model(init, apply, _stack(carried) if len(carried) == len(models) else None)


def member(variables: Variables, i: int) -> Variables:
  """The weights of network i of a `cohort`."""
  return Variables(variables.params[str(i)], variables.state[str(i)])


def _stack(variables: Sequence[Variables]) -> Variables:
  numbered = {str(i): v for i, v in enumerate(variables)}
  return Variables(
    *({i: getattr(v, part) for i, v in numbered.items()} for part in ("params", "state"))
  )
