"""Turns Haiku transforms into Models. Needs the package dm-haiku."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax

from distill_jax.models.adapters.functions import from_apply
from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.models.adapters.modes import mode, mode_arguments
from distill_jax.types import Model

try:
  import haiku as hk
except ImportError as error:
  raise ImportError(f"from_haiku needs Haiku: pip install dm-haiku ({error})") from error


def from_haiku(
  transformed: hk.Transformed | hk.TransformedWithState,
  variables: Any = None,
  *,
  inputs: str | Sequence[str] = "image",
) -> Model:
  """Returns a Model of a Haiku transform.

      net = hk.transform_with_state(lambda image, is_training: Net()(image, is_training))
      student = from_haiku(net)
      teacher = from_haiku(net, (trained_params, trained_state))

  Args:
    transformed: what `hk.transform`, `hk.transform_with_state` or `hk.without_apply_rng` returns.
      An argument of the transformed function named `train`, `training`, `is_training`,
      `deterministic` or `use_running_average` is set to the mode, by keyword.
    variables: trained params, or `(params, state)` of `hk.transform_with_state`; None: the network
      is initialized by its `init`.
    inputs: the batch entry, or entries, to pass in order.

  Raises:
    ImportError: Haiku is missing (on import of this adapter).
    ValueError: no transform, or several functions in one (`hk.multi_transform`); `variables` that
      are no pair where the network has a state.

  >>> import haiku as hk
  >>> from distill_jax import models
  >>> student = models.from_haiku(hk.transform(lambda x: hk.Linear(10)(x)), inputs="x")
  >>> batch = {"x": np.ones((2, 4), np.float32)}
  >>> variables = jax.eval_shape(student.init, jax.random.key(0), batch)
  >>> jax.tree.map(jnp.shape, variables.params)
  {'linear': {'b': (10,), 'w': (4, 10)}}
  """
  if not isinstance(transformed, (hk.Transformed, hk.TransformedWithState)):
    raise wrong_kind(
      "transformed", "the result of hk.transform or hk.transform_with_state", transformed
    )
  flags = mode_arguments(transformed.init)
  takes_key = "rng" in inspect.signature(transformed.apply).parameters

  def init(key: jax.Array, *args):
    # In training mode: only then a batch norm creates all of its state.
    return transformed.init(key, *args, **mode(flags, True))

  def call(weights: tuple, args: tuple, train: bool, key):
    keys = (key,) if takes_key else ()
    return transformed.apply(*weights, *keys, *args, **mode(flags, train))

  def apply(params, *args, train, key):
    return call((params,), args, train, key)

  def apply_with_state(params, *args, state, train, key):
    return call((params, state), args, train, key)

  has_state = isinstance(transformed, hk.TransformedWithState)
  return from_apply(
    init, apply_with_state if has_state else apply, variables=variables, inputs=inputs
  )
