"""The train step: teacher inference and the student's update in one pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax import metrics, reduce
from distill_jax.objectives.calls import has_true_label, valid_rows
from distill_jax.train.replay import OnPolicy, Replay
from distill_jax.types import Batch, Model, Objective, Outputs, Skips, TrainState, Variables

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]


def make_init(
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  on_policy: OnPolicy | Replay | None = None,
) -> Callable[[jax.Array, Batch], TrainState]:
  """`init(key, batch) -> TrainState`; of the batch only shapes are used, and of the teacher only its outputs'.

  Arguments as in `make_train_step`. A pair of networks that the objective cannot compare is a ValueError here.
  """

  def init(key: jax.Array, batch: Batch) -> TrainState:
    variables = student.init(jax.random.fold_in(key, 0), batch)
    outputs = _shapes(student, variables, batch)
    if teacher is None:
      teacher_outputs: Outputs = {}
    else:
      start = teacher.variables or jax.eval_shape(teacher.init, key, batch)
      teacher_outputs = _shapes(teacher, start, batch)
    learned = objective.init(jax.random.fold_in(key, 1), outputs, teacher_outputs)
    params = _drop_weak_types({"student": variables.params, "objective": learned.params})
    follows = teacher is not None and teacher.ema_update is not None
    # A copy: the average and the student are donated together, and a shared buffer cannot be donated twice.
    average = Variables(*jax.tree.map(_copy_wide, tuple(variables))) if follows else ()
    replay = {"replay": on_policy.init(batch)} if isinstance(on_policy, Replay) else {}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      step=zero,
      key=jax.random.fold_in(key, 2),
      params=params,
      model_state=_drop_weak_types({"student": variables.state, "objective": learned.state})
      | replay,
      opt_state=optimizer.init(params),
      average=average,
      skips=Skips(zero + 0, zero + 0, zero + 0),
    )

  return init


def make_train_step(
  student: Model,
  teacher: Model | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  axis_name: str | None = None,
  microbatches: int = 1,
  augment: Callable[[Batch], Batch] | None = None,
  mix: Callable[[jax.Array, Batch], Batch] | None = None,
  on_policy: OnPolicy | Replay | None = None,
) -> Step:
  """A pure step `(state, teacher_variables, batch) -> (state, metrics)`; jit it, donating the state.

  Args:
    student, teacher: Models. teacher None trains the student alone (or trains a teacher).
    objective: what to minimize.
    optimizer: an optax transformation, over `{'student': ..., 'objective': ...}` parameters.
    axis_name: the mapped axis under `pmap` or `shard_map`; the batch is then one device's share, and the
      result equals the jitted step's on the whole batch, for networks without batch norm or with batch norm
      that is given the axis name. Under `jit` over a mesh leave it None.
    microbatches: accumulate gradients over this many equal parts of the batch. Each term's denominator is
      that of the whole batch, so the result equals one large step's. Batch norm and losses that relate rows
      see one part.
    augment: `batch -> batch`, a function of ids and views (`data.augmentation`); applied first, so teacher and
      student see the same view.
    mix: `(key, batch) -> batch`, mixes rows (`data.mixup`); applied after `augment`.
    on_policy: `(student Variables, key, batch) -> batch`, puts the student's own samples in the place of some rows
      (`models.on_policy.generate_on_policy`), for the teacher to judge; applied to the whole batch, after `mix`, and not
      differentiated. The key is the same on all devices: rows are told apart by their ids. Or a `Replay`, which
      `make_init` must get too.

  The step's arguments:
    state: from `make_init`.
    teacher_variables: the frozen teacher's `Variables`; `()` where the teacher follows the student, or is None.
    batch: rows a multiple of `microbatches`.

  Returns:
    The step function. Its metrics are (sum, count) pairs, the same on every device: 'loss', every term by
    name (unweighted), 'accuracy' where labels are integers, 'grad_norm' (global, L2), 'nonfinite' (the update
    was skipped because the loss or the gradient's norm was not finite, or entries of it that were not finite
    were left out; then the other metrics count nothing) and 'empty' (a term had no valid value).
  """
  if microbatches < 1:
    raise ValueError(f"microbatches: expected an integer >= 1, got {microbatches}")
  if on_policy is not None and teacher is None:
    raise ValueError("on_policy: there is no teacher to judge what the student samples")
  if isinstance(on_policy, Replay) and axis_name is not None:
    raise ValueError(
      f"on_policy: what is replayed is not shared over axis_name {axis_name!r}: jit over a mesh"
    )

  def teach(state: TrainState, teacher_variables, batch: Batch) -> Outputs:
    if teacher is None:
      return {}
    frozen = state.average if teacher.ema_update else teacher_variables
    if not frozen:
      raise ValueError(
        "the step got no teacher variables: pass the teacher's Variables as the second argument"
      )
    return teacher.apply(*frozen, batch, train=False, key=None)[0]

  def forward(params, model_state, teacher_outputs: Outputs, batch: Batch, key, step):
    student_key, objective_key = key
    outputs, student_state = student.apply(
      params["student"], model_state["student"], batch, train=True, key=student_key
    )
    learned = params["objective"], model_state["objective"]
    terms, objective_state = objective.apply(
      *learned, outputs, teacher_outputs, batch, step=step, key=objective_key, axis_name=axis_name
    )
    return outputs, terms, {"student": student_state, "objective": objective_state}

  def gradients(params, model_state, teacher_outputs, batch, key, step, counts):
    def loss_fn(params):
      outputs, terms, new_state = forward(params, model_state, teacher_outputs, batch, key, step)
      loss, pairs = _sum_terms(terms, counts, microbatches, axis_name)
      return loss, (pairs | _accuracy(outputs, batch), new_state)

    (loss, (pairs, new_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return (loss, pairs, grads), new_state

  def accumulated(params, model_state, state: TrainState, teacher_variables, batch: Batch, key):
    parts = (
      jax.tree.map(lambda x: _interleave(x, microbatches), dict(batch)),
      tuple(jax.random.split(k, microbatches) for k in key),
    )

    def count(carry, part):
      # Only the masks' sums are used: the compiler removes what they do not need of this forward pass.
      rows, own_key = part
      teacher_outputs = teach(state, teacher_variables, rows)
      return _counts(
        forward(params, model_state, teacher_outputs, rows, own_key, state.step)[1]
      ), carry

    counts, _ = _sum_over(count, (), parts)

    def differentiate(model_state, part):
      rows, own_key = part
      teacher_outputs = teach(state, teacher_variables, rows)
      return gradients(params, model_state, teacher_outputs, rows, own_key, state.step, counts)

    return _sum_over(differentiate, model_state, parts)

  def sampled(state: TrainState, key, batch: Batch) -> tuple[Batch, dict[str, Any]]:
    if on_policy is None:
      return batch, {}
    check_no_cached_outputs(batch)
    variables = Variables(state.params["student"], state.model_state["student"])
    if not isinstance(on_policy, Replay):
      return on_policy(variables, key, batch), {}
    if "replay" not in state.model_state:
      raise ValueError(
        "the train state has no samples to replay: give make_init the same on_policy"
      )
    batch, buffer = on_policy.apply(variables, state.model_state["replay"], state.step, key, batch)
    return batch, {"replay": buffer}

  def step(state: TrainState, teacher_variables, batch: Batch):
    _check_rows(batch, microbatches)
    step_key = jax.random.fold_in(state.key, state.step)
    mix_key, student_key, objective_key = jax.random.split(step_key, 3)
    if axis_name is not None:
      # Devices draw different dropout masks; what the objective draws (negatives, masks) is the same on all.
      mix_key, student_key = (
        jax.random.fold_in(k, jax.lax.axis_index(axis_name)) for k in (mix_key, student_key)
      )
    key = student_key, objective_key
    batch = _blank_invalid(batch)
    if augment is not None:
      batch = augment(batch)
    if mix is not None:
      batch = mix(mix_key, batch)
    batch, replay = sampled(state, jax.random.fold_in(step_key, 3), batch)
    params, model_state = state.params, {n: state.model_state[n] for n in ("student", "objective")}
    if axis_name is not None:
      # Or shard_map would sum their gradients over devices behind our back when it checks replication.
      params = jax.lax.pcast(params, axis_name, to="varying")
    if microbatches == 1:
      teacher_outputs = teach(state, teacher_variables, batch)
      sums, model_state = gradients(
        params, model_state, teacher_outputs, batch, key, state.step, None
      )
    else:
      sums, model_state = accumulated(params, model_state, state, teacher_variables, batch, key)
    loss, pairs, grads = sums
    if axis_name is not None:
      loss, grads = jax.lax.pmean((loss, grads), axis_name)
      pairs, model_state = jax.lax.psum(pairs, axis_name), _average_states(model_state, axis_name)
    return _update(state, loss, pairs, grads, model_state | replay)

  def _update(state: TrainState, loss, pairs, grads, model_state):
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def updated():
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      # Finite gradients can make an update that is not (Adam with eps 0, a learning rate of NaN). Entry by entry:
      # to decide for all of them at once, all would have to be kept.
      fine = jnp.stack([jnp.isfinite(u).all() for u in jax.tree.leaves(updates)]).all()
      updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
      params = optax.apply_updates(state.params, updates)
      average = state.average
      if teacher is not None and teacher.ema_update:
        average = teacher.ema_update(
          average, Variables(params["student"], model_state["student"]), state.step
        )
      return fine, (params, model_state, opt_state, average)

    old = state.params, state.model_state, state.opt_state, state.average
    finite, (params, model_state, opt_state, average) = _if(
      finite, updated, (jnp.zeros((), bool), old)
    )
    streak = jnp.where(finite, 0, state.skips.streak + 1)
    skips = Skips(
      state.skips.total + jnp.where(finite, 0, 1), streak, jnp.maximum(state.skips.longest, streak)
    )
    one = jnp.ones(())
    empty = jnp.stack([n == 0 for name, (_, n) in pairs.items() if name != "accuracy"]).any()
    # A skipped update counts in no mean, or one would make all that are reported with it NaN.
    measured = jax.tree.map(
      lambda x: jnp.where(finite, x, 0), pairs | {"loss": (loss, one), "grad_norm": (norm, one)}
    )
    for name, flag in {"nonfinite": ~finite, "empty": empty}.items():
      measured[name] = flag.astype(jnp.float32), one
    return TrainState(
      state.step + 1, state.key, params, model_state, opt_state, average, skips
    ), measured

  return step


def check_no_cached_outputs(batch: Batch) -> None:
  """Refuses what a cached teacher said as the judgment of sequences that are sampled in the step."""
  cached = sorted(name for name in batch if name.startswith("teacher/"))
  if cached:
    raise ValueError(
      f"on_policy: {cached[0]!r} holds what the teacher said about the batch's own sequences, not about the student's "
      "samples: use a live teacher"
    )


def make_eval_step(student: Model, teacher: Model | None = None) -> Callable[..., dict[str, Any]]:
  """A pure step `(variables, teacher_variables, batch) -> counts`, what `metrics.counts` adds up.

  The batch's rows with 'where' False count nowhere. With a teacher (a frozen one) its agreement with the student
  and the KL to it are counted too. Of a language model that gives hidden states and a head in the place of logits,
  `metrics.token_counts`.
  """

  def step(variables: Variables, teacher_variables, batch: Batch):
    outputs = student.apply(*variables, batch, train=False, key=None)[0]
    if "logits" not in outputs and "head" in outputs:
      return metrics.token_counts(
        outputs["hidden"], outputs["head"], batch["label"], batch.get("where")
      )
    logits = outputs["logits"]
    teacher_outputs = None
    if teacher is not None:
      teacher_outputs = teacher.apply(*teacher_variables, batch, train=False, key=None)[0]["logits"]
    return metrics.counts(
      logits, batch["label"], batch.get("where"), teacher_logits=teacher_outputs
    )

  return step


def _drop_weak_types(tree):
  """The tree with the types that it has: a weak one (`jnp.full(3, 0.5)`) is lost in a checkpoint."""
  return jax.tree.map(
    lambda x: jnp.array(x, x.dtype) if getattr(x, "weak_type", False) else x, tree
  )


def _copy_wide(x: jax.Array) -> jax.Array:
  """A copy in float32 or wider: an average in bfloat16 would not move by a thousandth of a difference."""
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype, copy=True)


def _shapes(model: Model, variables: Variables, batch: Batch) -> Outputs:
  return jax.eval_shape(lambda v, b: model.apply(*v, b, train=False, key=None)[0], variables, batch)


def _sum_terms(terms, counts, microbatches: int, axis_name):
  """The loss of one device and microbatch, such that the mean over devices of the sum over microbatches is the
  batch's; and each term's (sum, count)."""
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  loss, pairs = jnp.zeros(()), {}
  for name, (weight, value) in terms.items():
    if isinstance(value, tuple):
      term_sum, count = reduce.total(*value)
      if counts is None:
        whole = count if axis_name is None else jax.lax.psum(count, axis_name)
      else:
        whole = counts[name] if axis_name is None else jax.lax.psum(counts[name], axis_name)
      loss += weight * devices * reduce.value((term_sum, whole))
      pairs[name] = term_sum, count
    else:
      loss += weight * value / microbatches
      pairs[name] = value, jnp.ones(())
  return loss, pairs


def _counts(terms) -> dict[str, jax.Array]:
  return {n: reduce.total(*value)[1] for n, (_, value) in terms.items() if isinstance(value, tuple)}


def _accuracy(outputs: Outputs, batch: Batch) -> dict[str, reduce.Pair]:
  logits, label = outputs.get("logits"), batch.get("label")
  if logits is None or label is None or not jnp.issubdtype(label.dtype, jnp.integer):
    return {}
  where = valid_rows(batch, has_true_label(batch, label >= 0))
  return {"accuracy": reduce.total(logits.argmax(-1) == label, where)}


def _check_rows(batch: Batch, microbatches: int) -> None:
  rows = {name: x.shape[0] for name, x in batch.items()}
  if not rows or len(set(rows.values())) > 1 or 0 in rows.values():
    raise ValueError(f"a batch needs entries with the same number of rows, at least 1; got {rows}")
  n = next(iter(rows.values()))
  if n % microbatches:
    nearest = n // microbatches * microbatches
    raise ValueError(
      f"batch of {n} rows does not divide into {microbatches} microbatches; nearest sizes: "
      f"{nearest or microbatches}, {nearest + microbatches}"
    )


def _blank_invalid(batch: Batch) -> Batch:
  """Rows that do not count become zeros: a NaN there would reach the weights' gradients as NaN times zero."""
  if "where" not in batch:
    return batch
  where = batch["where"]

  def blank(x):
    return (
      jnp.where(where.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else x
    )

  return {name: blank(x) for name, x in batch.items()}


def _interleave(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] -> [parts, B / parts, ...], every parts-th row, so that rows stay on the device that has them."""
  return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _sum_over(body, carry, parts):
  """Sums `body(carry, part) -> (values, carry)` over the leading axis of `parts`."""
  total, carry = body(carry, jax.tree.map(lambda x: x[0], parts))

  def add(state, part):
    total, carry = state
    values, carry = body(carry, part)
    return (jax.tree.map(jnp.add, total, values), carry), None

  # Convolutions inside a loop are several times slower on CPU (their weight gradient above all).
  unroll = True if jax.default_backend() == "cpu" else 1
  rest = jax.tree.map(lambda x: x[1:], parts)
  return jax.lax.scan(add, (total, carry), rest, unroll=unroll)[0]


def _if(condition, new: Callable[[], Any], old):
  """The tree `new()` where the scalar condition holds, else `old`."""
  # A select keeps the old values alive: XLA:CPU then copies Adam's moments in every step, and a conditional updates
  # in place. On a GPU a conditional makes the host wait for the gradients.
  if jax.default_backend() == "cpu":
    return jax.lax.cond(condition, new, lambda: old)
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new(), old)


def _average_states(model_state, axis_name):
  """One value on all devices: the mean of floating states, the maximum of counters."""

  def agree(x):
    return (jax.lax.pmean if jnp.issubdtype(x.dtype, jnp.floating) else jax.lax.pmax)(x, axis_name)

  return jax.tree.map(agree, model_state)
