"""Checks and applies optax optimizers, and returns the weights that they are evaluated with."""

import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax import reduce
from distill_jax.compression.pruning.masks import PruneState
from distill_jax.types import TrainState, Tree, Variables


class ParamsEma(NamedTuple):
  """The state of `params_ema`.

  Attributes:
    step: number of updates so far, int32.
    average: the average, like the parameters, in float32 or wider.
  """

  step: jax.Array
  average: Tree


def params_ema(decay: float) -> optax.GradientTransformation:
  """Returns a transformation that keeps an exponential moving average (EMA) of the parameters.

      optimizer = optax.chain(optax.adamw(1e-3), train.params_ema(0.999))

  It changes no update. Make it the last of a chain: it averages the parameters after the updates
  that reach it. `fit` evaluates, chooses and returns the average in place of the parameters.

  Args:
    decay: the average's weight in each update, in [0, 1); update t uses min(decay, t / (t + 9)),
      so that the first weights are soon forgotten.

  Raises:
    ValueError: `decay` is outside [0, 1).

  >>> import optax
  >>> from distill_jax import train
  >>> optimizer = optax.chain(optax.sgd(1.0), train.params_ema(0.9))
  >>> params = jnp.array([4.0])
  >>> state = optimizer.init(params)
  >>> updates, state = optimizer.update(jnp.array([4.0]), state, params)  # 4 becomes 0
  >>> f"{state[-1].average[0]:.2f}"  # the first update counts nine tenths
  '0.40'
  """
  if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
    raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}: 0.999 is usual")

  def init(params):
    return ParamsEma(jnp.zeros((), jnp.int32), jax.tree.map(_widen, params))

  def update(updates, state, params=None):
    step = optax.safe_increment(state.step)
    weight = jnp.minimum(decay, step / (step + 9))

    def move(average, param, change):
      new = _widen(param) + _widen(change)
      return average + (1 - weight).astype(average.dtype) * (new - average)

    average = jax.tree.map(move, state.average, params, updates)
    return updates, ParamsEma(step, average)

  return optax.GradientTransformation(init, update)


def as_optimizer(optimizer: Any) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer whose update takes extra arguments.

  Raises:
    ValueError: it is no optimizer.
  """
  if isinstance(optimizer, optax.MultiSteps):
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
  is_class = isinstance(optimizer, type)
  if not is_class and all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
    return optax.with_extra_args_support(optimizer)
  got = repr(optimizer) if isinstance(optimizer, (int, float, str)) else type(optimizer).__name__
  if is_class or inspect.isroutine(optimizer):
    got = f"{optimizer.__name__}, which is not called or is a schedule"
  raise ValueError(
    f"optimizer: expected an optax.GradientTransformation, got {got}: write "
    "optax.adamw(learning_rate), where the rate is a number or a schedule"
  )


def init_optimizer(optimizer: optax.GradientTransformation, params: Tree) -> Tree:
  """Returns the optimizer's initial state.

  Raises:
    ValueError: the optimizer does not fit the parameters.
  """
  try:
    return optimizer.init(params)
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    if ": expected " in str(error):  # An optimizer of this package names its own argument.
      raise
    reason = str(error).split("\n", 1)[0]
    raise ValueError(
      "optimizer: expected one for the parameters {'student': ..., 'objective': ...}, got "
      f"{type(error).__name__}: {reason}: begin the trees of masks and labels with these names"
    ) from error


def apply_optimizer(
  optimizer: optax.GradientTransformationExtraArgs,
  grads: Tree,
  opt_state: Tree,
  params: Tree,
  loss: jax.Array,
) -> tuple[Tree, Tree]:
  """Returns (updates, state); the optimizer gets the loss of the full batch as `value=`, and
  `grad=`.

  Raises:
    ValueError: it needs more than these, as line searches do (L-BFGS), or other gradients.
  """
  try:
    # Optax raises floats to integer step counts.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      return optimizer.update(grads, opt_state, params, value=loss, grad=grads)
  except (TypeError, ValueError, AttributeError) as error:
    if ": expected " in str(error):  # An optimizer of this package names its own argument.
      raise
    reason = str(error).split("\n", 1)[0]
    if isinstance(error, TypeError) and not re.search("required|unexpected keyword", reason):
      raise ValueError(
        f"optimizer: expected numbers as its hyper-parameters, got TypeError: {reason}: write "
        "optax.adamw(1e-3), where the rate is a number or a schedule step -> number"
      ) from error
    raise ValueError(
      "optimizer: expected one that needs gradients, parameters, value= and grad= only, got "
      f"{type(error).__name__}: {reason}: line searches (optax.lbfgs), sam, sophia, lookahead and "
      "dpsgd need the loss as a function, or other parameters or gradients, which a step does not "
      "have: use optax.adamw, or optax.scale_by_lbfgs without a line search"
    ) from error


def evaluation_variables(state: TrainState) -> Variables:
  """Returns the student's variables that are evaluated and exported.

  Of most optimizers these are the trained ones. In place of the parameters, schedule-free
  optimizers (`optax.contrib.schedule_free_eval_params`) and `params_ema` have averages. Batch
  statistics are always those of training.

  >>> import optax
  >>> from distill_jax import models, objectives, train
  >>> student = models.from_apply(lambda key, x: jnp.eye(2), lambda w, x: x @ w, inputs="x")
  >>> objective = objectives.weighted(hard=(1.0, objectives.labels()))
  >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
  >>> optimizer = optax.chain(optax.sgd(0.1), train.params_ema(0.99))
  >>> state = train.make_init(student, None, objective, optimizer)(jax.random.key(0), batch)
  >>> train.evaluation_variables(state).params  # the average, which starts as the parameters
  Array([[1., 0.],
         [0., 1.]], dtype=float32)
  """
  params = _evaluation_params(state.opt_state, state.params)
  return Variables(params["student"], state.model_state["student"])


def _evaluation_params(opt_state: Tree, params: Tree) -> Tree:
  for state in jax.tree.leaves(opt_state, is_leaf=_is_state):
    if isinstance(state, PruneState):
      inner = _evaluation_params(state.inner, params)
      params = params if inner is params else _hold_zeros(inner, params)
    elif _is_state(state):
      params = _average(state, params)
  return params


def _is_state(x: Any) -> bool:
  return isinstance(x, (PruneState, ParamsEma, optax.contrib.ScheduleFreeState))


@jax.jit
def _average(state: Any, params: Tree) -> Tree:
  """Returns the averages of a state in the parameters' dtypes; parameters that the optimizer does
  not see (`optax.masked`) stay as they are.
  """
  stored = state.average if isinstance(state, ParamsEma) else state.z
  seen = jax.tree.map(lambda s, p: s if _is_masked(s) else p, stored, params, is_leaf=_is_masked)
  if isinstance(state, ParamsEma):
    averages = state.average
  else:
    averages = optax.contrib.schedule_free_eval_params(state, seen)
  return jax.tree.map(
    lambda a, p: p if _is_masked(a) else a.astype(p.dtype), averages, params, is_leaf=_is_masked
  )


@jax.jit
def _hold_zeros(averages: Tree, params: Tree) -> Tree:
  """Returns the averages with zeros where a parameter is zero: the average of one that was pruned
  is not.
  """
  return jax.tree.map(lambda a, p: jnp.where(p == 0, 0, a).astype(a.dtype), averages, params)


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _widen(x: jax.Array) -> jax.Array:
  """Returns a copy in float32 or wider: in bfloat16 an average would not move."""
  return jnp.array(x, reduce.common_dtype(x.dtype, jnp.float32), copy=True)
