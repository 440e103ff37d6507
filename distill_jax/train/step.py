"""The train step: teacher inference and the student's update in one pure function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax import compat, reduce
from distill_jax.models.input_errors import name_network
from distill_jax.models.variables import check_trainable
from distill_jax.teachers.host_function import warn_of_host_calls
from distill_jax.train.gradients import accumulated_gradients, full_gradients
from distill_jax.train.loss_fn import (
  apply_teacher,
  as_dict,
  check_key,
  check_models,
  make_loss_of_outputs,
  with_shared_outputs,
)
from distill_jax.train.optimizers import as_optimizer, init_optimizer
from distill_jax.train.options import StepOptions
from distill_jax.train.replay import Replay
from distill_jax.train.step_batch import prepare_batch
from distill_jax.train.update import make_update
from distill_jax.trees import named_leaves
from distill_jax.types import (
  Batch,
  Model,
  Objective,
  OnPolicy,
  Outputs,
  Skips,
  TrainState,
  Variables,
)

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]


def make_init(
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  on_policy: OnPolicy | Replay | None = None,
) -> Callable[[jax.Array, Batch], TrainState]:
  """Returns `init(key, batch) -> TrainState`.

  Of the batch only shapes are used, and of the teacher only its outputs' shapes.

  Args:
    student, teacher, objective, optimizer: as in `make_train_step`.
    on_policy: as in `StepOptions`; a `Replay` keeps its buffer in the train state.

  Raises (in init):
    ValueError: the objective cannot compare the two networks, or the optimizer does not fit the
      parameters.

  >>> import optax
  >>> from distill_jax import models, objectives, train
  >>> student = models.from_apply(lambda key, x: jnp.eye(2), lambda w, x: x @ w, inputs="x")
  >>> objective = objectives.weighted(hard=(1.0, objectives.labels()))
  >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
  >>> init = train.make_init(student, None, objective, optax.adam(0.1))
  >>> jax.eval_shape(init, jax.random.key(0), batch).params["student"].shape
  (2, 2)
  """

  optimizer = as_optimizer(optimizer)
  check_models(student, teacher)

  def init(key: jax.Array, batch: Batch) -> TrainState:
    batch = as_dict(batch)
    check_key(key)
    with name_network("student", batch, functools.partial(_new_output_shapes, student, key)):
      variables = student.init(jax.random.fold_in(key, 0), batch)
      outputs = _output_shapes(student, variables, batch)
    check_trainable("student", variables.params)
    teacher_outputs: Outputs = {}
    if teacher is not None:
      with name_network("teacher", batch, functools.partial(_new_output_shapes, teacher, key)):
        teacher_variables = teacher.variables or jax.eval_shape(teacher.init, key, batch)
        if teacher.ema_update is not None:
          _check_average(variables, teacher_variables)
        teacher_outputs = _output_shapes(teacher, teacher_variables, batch)
    if student.reads:
      inputs = with_shared_outputs(student, teacher_outputs, batch)
      outputs = _output_shapes(student, variables, inputs)
    learned = objective.init(jax.random.fold_in(key, 1), outputs, teacher_outputs)
    params = _drop_weak_types({"student": variables.params, "objective": learned.params})
    model_state = _drop_weak_types({"student": variables.state, "objective": learned.state})
    if isinstance(on_policy, Replay):
      model_state["replay"] = on_policy.init(batch)
    if not jax.tree.leaves(params):
      raise ValueError(
        "student: expected parameters to train, got none: set trainable = True in Keras, or choose "
        "variables that the network has in from_nnx(trainable=...)"
      )
    average: Any = ()
    if teacher is not None and teacher.ema_update is not None:
      # A copy: the average and the student are donated together, and a shared buffer cannot be
      # donated twice.
      average = Variables(*jax.tree.map(_copy_wide, tuple(variables)))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      step=zero,
      key=jax.random.fold_in(key, 2),
      params=params,
      model_state=model_state,
      opt_state=_drop_weak_types(init_optimizer(optimizer, params)),
      average=average,
      skips=Skips(zero + 0, zero + 0, zero + 0),
    )

  return init


def _check_average(student: Variables, average: Variables) -> None:
  """Checks that an EMA teacher is one of the student."""
  expected, actual = (
    {name: jnp.shape(leaf) for name, leaf in named_leaves(tuple(variables))}
    for variables in (student, average)
  )
  if expected != actual:
    raise ValueError(
      "teacher: expected a moving average of the student, got one of a network with other arrays: "
      "write teachers.moving_average(student); a trained teacher is passed as it is"
    )


def make_train_step(
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  options: StepOptions = StepOptions(),  # noqa: B008 (frozen)
) -> Step:
  """Returns a pure step `(state, teacher_variables, batch) -> (state, metrics)`; jit it, donating
  the state.

  Args:
    student, teacher: Models. teacher None trains the student without one (or trains a teacher).
    objective: what to minimize.
    optimizer: an optax transformation, over `{'student': ..., 'objective': ...}` parameters. Its
      update gets `value=`, the loss, and `grad=` where it takes them
      (`optax.contrib.reduce_on_plateau`).
    options: augmentation, accumulation, on-policy rows and a mapped axis.

  Arguments of the step:
    state: from `make_init`.
    teacher_variables: the frozen teacher's `Variables`; `()` without a teacher and for an EMA
      teacher.
    batch: arrays, rows first, their number a multiple of `options.microbatches`.

  Returns:
    The step function. Its metrics are (sum, count) pairs, the same on every device: 'loss', every
    term by name (unweighted), those of `options.metrics`, 'grad_norm' (global, L2), 'nonfinite'
    (the update was skipped because the loss or the gradient's norm was not finite, or entries of it
    that were not finite were left out; then the other metrics count nothing) and 'empty' (a term
    had no valid value).

  Raises:
    ValueError: on-policy rows without a teacher to score them; in a step, what does not fit the
      batch.

  >>> import optax
  >>> from distill_jax import models, objectives, train
  >>> student = models.from_apply(lambda key, x: jnp.eye(2), lambda w, x: x @ w, inputs="x")
  >>> objective = objectives.weighted(hard=(1.0, objectives.labels()))
  >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
  >>> networks = student, None, objective, optax.sgd(0.1)
  >>> state = train.make_init(*networks)(jax.random.key(0), batch)
  >>> state, metrics = jax.jit(train.make_train_step(*networks), donate_argnums=0)(state, (), batch)
  >>> int(state.step), sorted(metrics)
  (1, ['empty', 'grad_norm', 'hard', 'loss', 'nonfinite'])
  """
  check_models(student, teacher)
  warn_of_host_calls(teacher)
  if options.on_policy is not None and teacher is None:
    raise ValueError(
      "on_policy: expected a teacher that scores generated rows, got none: pass the teacher's Model"
    )
  axis_name, microbatches = options.axis_name, options.microbatches
  loss_of_outputs = make_loss_of_outputs(
    student, objective, axis_name=axis_name, microbatches=microbatches
  )
  make_gradients = full_gradients if microbatches == 1 else accumulated_gradients
  update = make_update(teacher, optimizer)

  def step(state: TrainState, teacher_variables, batch: Batch):
    batch = as_dict(batch)
    if not isinstance(state, TrainState):
      raise ValueError(
        f"state: expected a TrainState, got {type(state).__name__}: write state = make_init("
        "student, teacher, objective, optimizer)(key, batch)"
      )
    _check_rows(batch, microbatches)
    if teacher is not None and teacher.ema_update is not None:
      teacher_variables = state.average
    batch, keys, replay = prepare_batch(state, batch, options)
    params = state.params
    if axis_name is not None:
      # Otherwise shard_map sums their gradients over devices when it checks replication.
      params = compat.pcast_varying(params, axis_name)
    gradients = make_gradients(
      loss_of_outputs, lambda rows: apply_teacher(teacher, teacher_variables, rows), options
    )
    model_state = {name: state.model_state[name] for name in ("student", "objective")}
    sums, model_state = gradients(params, model_state, batch, step=state.step, keys=keys)
    if axis_name is not None:
      sums, model_state = _reduce(sums, model_state, axis_name)
    return update(state, sums, model_state | replay)

  return step


def _reduce(sums, model_state, axis_name: str):
  """Returns sums and model state of all devices of a mapped axis."""
  loss, grads = jax.lax.pmean((sums.loss, sums.grads), axis_name)
  terms, metrics = jax.lax.psum((sums.terms, sums.metrics), axis_name)
  sums = sums._replace(loss=loss, grads=grads, terms=terms, metrics=metrics)
  return sums, _average_states(model_state, axis_name)


def _drop_weak_types(tree):
  """Returns the tree with strong types: a weak one (`jnp.full(3, 0.5)`) is lost in a checkpoint."""
  return jax.tree.map(
    lambda x: jnp.array(x, x.dtype) if getattr(x, "weak_type", False) else x, tree
  )


def _copy_wide(x: jax.Array) -> jax.Array:
  """Returns a copy in float32 or wider: an average in bfloat16 would not move by a thousandth of a
  difference.
  """
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  dtype = reduce.common_dtype(x.dtype, jnp.float32) if floating else x.dtype
  return jnp.array(x, dtype, copy=True)


def _new_output_shapes(model: Model, key: jax.Array, batch: Batch) -> Outputs:
  """Returns the shapes of a network's outputs with the weights that it has or would get."""
  variables = model.variables or jax.eval_shape(model.init, key, batch)
  return _output_shapes(model, variables, batch)


def _output_shapes(model: Model, variables: Variables, batch: Batch) -> Outputs:
  return jax.eval_shape(lambda v, b: model.apply(*v, b, train=False, key=None)[0], variables, batch)


def _check_rows(batch: Batch, microbatches: int) -> None:
  rows = {name: x.shape[0] for name, x in batch.items()}
  if not rows or len(set(rows.values())) > 1 or 0 in rows.values():
    raise ValueError(
      f"batch: expected entries with the same number of rows, at least 1, got {rows}"
    )
  n = next(iter(rows.values()))
  if n % microbatches:
    nearest = n // microbatches * microbatches
    raise ValueError(
      f"microbatches: expected a divisor of the batch's {n} rows, got {microbatches}; nearest "
      f"batch sizes: {nearest or microbatches}, {nearest + microbatches}"
    )


def _average_states(model_state, axis_name: str):
  """Returns one value for all devices: the mean of floating states, the maximum of counters."""

  def average(x):
    reduce_fn = jax.lax.pmean if jnp.issubdtype(x.dtype, jnp.floating) else jax.lax.pmax
    return reduce_fn(x, axis_name)

  return jax.tree.map(average, model_state)
