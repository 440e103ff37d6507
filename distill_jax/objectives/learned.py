"""Terms with parameters and state: `learned`, and methods that compare two features through them.

The learned parts train with the student, are checkpointed with it and are not exported. Each
docstring gives the paper's weight; a warm-up is a schedule instead of a number,
`(optax.linear_schedule(0.0, 8.0, steps), review_kd(...))`. Methods with a network over maps are in
maps.py, those of maps before a ReLU in before_relu.py, those with a memory in memories.py.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.objectives.calls import Names, batch_entry, blank, outputs_of, valid_rows
from distill_jax.objectives.hyperparameters import Number, at_step, check_number
from distill_jax.objectives.loss_checks import check_rows, check_values
from distill_jax.objectives.parts import (
  layer,
  layer_init,
  resize_to,
  shape_mismatch,
  stack,
  stack_init,
)
from distill_jax.objectives.terms import Term
from distill_jax.types import Outputs, Variables


def learned(
  student: Names,
  teacher: Names,
  init: Callable[..., Variables],
  apply: Callable[..., tuple[jax.Array, Any]],
  *,
  entries: Mapping[str, str] | None = None,
) -> Term:
  """Builds a term with parameters (they train with the student) and state (only carried along).

  Args:
    student, teacher: names of the outputs that it compares; with a tuple of names (it may be
      empty) `init` and `apply` get a tuple of arrays.
    init: `(key, s, t) -> Variables`; s and t may be `ShapeDtypeStruct`s. It raises a `ValueError`
      where they do not fit.
    apply: `(params, state, s, t, ...) -> (values, state)`; values are [B, ...], unreduced, or a
      scalar that relates rows. It also gets those of its other arguments that are called `where`
      (the valid rows, bool [B], or None for all), `step`, `key` or `axis_name`. Rows that are not
      valid are 0 in s, t and the entries. Only valid rows may reach the state, and under an axis
      name the new state must be equal on every device (gather the rows first).
    entries: further arguments that are entries of the batch, `{argument: entry}`.

  Raises:
    ValueError: in init, an unknown name, or what `init` and `apply` raise for the shapes, with
      both of them.

  >>> def init(key, s, t):
  ...   return Variables({"scale": jnp.ones(())}, {})
  >>> def apply(params, state, s, t):
  ...   return losses.hint(params["scale"] * s, t), state
  >>> term = learned("embedding", "embedding", init, apply)
  """
  entries = dict(entries or {})
  parameters = set(inspect.signature(apply).parameters)

  def sides(s_outputs: Outputs, t_outputs: Outputs):
    return outputs_of(s_outputs, student, "student"), outputs_of(t_outputs, teacher, "teacher")

  def init_term(key, s_outputs, t_outputs):
    s, t = sides(s_outputs, t_outputs)
    try:
      variables = init(key, s, t)
      if not entries:  # The shapes of entries are not known yet: the first step checks them.
        _check_shapes(apply, parameters, variables, s, t, key)
    except ValueError as error:
      raise ValueError(
        f"student {student!r} {_shapes(s)} and teacher {teacher!r} {_shapes(t)}: {error}"
      ) from error
    return variables

  def apply_term(params, state, s_outputs, t_outputs, batch, *, step, key, axis_name=None):
    where = valid_rows(batch)
    context = {"where": where, "step": step, "key": key, "axis_name": axis_name}
    extras = {argument: batch_entry(batch, name) for argument, name in entries.items()}
    s, t, extras = blank(where, (*sides(s_outputs, t_outputs), extras))
    extras |= {name: x for name, x in context.items() if name in parameters}
    values, new_state = apply(params, state, s, t, **extras)
    check_values(apply, values, len(jax.tree.leaves((s, t))[0]))
    arrays = s, t, {name: extras[name] for name in {*entries, "where"} & set(extras)}
    check_rows(
      lambda x: apply(params, state, x[0], x[1], **extras | x[2])[0], apply, arrays, values.shape
    )
    return (values if values.ndim == 0 else (values, where)), new_state

  return Term(init_term, apply_term)


def vid(student: str, teacher: str) -> Term:
  """Variational information distillation: `losses.vid` of a learned regression of the teacher.

  The regressor is three linear maps of the channels (1x1 convolutions, no biases) with ReLUs
  between, all as wide as the teacher, as in RepDistiller and torchdistill; the variances start
  at 5. A student's map of another size is resized. Weight 1 (Ahn et al. 2019, arXiv:1904.05835);
  sum it over the stages.

  Args:
    student, teacher: names of outputs of one rank, [B, ..., C].

  Raises:
    ValueError: in init, ranks, rows or lengths differ.

  >>> from distill_jax import objectives
  >>> term = objectives.vid("block2", "block3")
  >>> student, teacher = {"block2": np.zeros((2, 4))}, {"block3": np.zeros((2, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> sorted(params), params["regressor"]["0"]["kernel"].shape
  (['raw_scale', 'regressor'], (4, 8))
  """

  def init(key, s, t):
    check_pair(s, t)
    width = t.shape[-1]
    regressor = stack_init(key, (s.shape[-1], width, width, width), bias=False)
    return Variables({"regressor": regressor, "raw_scale": losses.vid_raw_scale(width)}, {})

  def apply(params, state, s, t):
    mean = stack(params["regressor"], resize_to(s, t))
    return losses.vid(mean, t, params["raw_scale"]), state

  return learned(student, teacher, init, apply)


def srd(student: str, teacher: str, *, power: Number = 4.0) -> Term:
  """`losses.srd` of the student through a learned linear map.

  The map has no bias: the loss's batch norm would remove it. Weight 1 next to `labels` and
  `logits(losses.kl_divergence)` (Miles & Mikolajczyk 2024, arXiv:2303.11098).

  Args:
    student, teacher: names of the penultimate features, [B, ..., C].
    power: exponent >= 1, or a schedule of the step.

  Raises:
    ValueError: at once, power < 1; in init, ranks, rows or lengths differ.

  >>> from distill_jax import objectives
  >>> term = objectives.srd("pooled", "pooled")
  >>> student, teacher = {"pooled": np.zeros((2, 4))}, {"pooled": np.zeros((2, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> jax.tree.map(jnp.shape, params)
  {'kernel': (4, 8)}
  """

  def check():
    check_number("power", power, low=1)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    check_pair(s, t)
    return Variables(layer_init(key, s.shape[-1], t.shape[-1], bias=False), {})

  def apply(params, state, s, t, *, where, step, axis_name):
    projected = layer(params, resize_to(s, t))
    rows = {"where": where, "axis_name": axis_name}
    return losses.srd(projected, t, power=at_step(power, step), **rows), state

  return learned(student, teacher, init, apply)


def vkd(student: str, teacher: str) -> Term:
  """`losses.vkd` of the student through a learned orthogonal projection.

  The projection [C_s, C_t] is the corner of expm(raw - raw.T), raw [n, n] with n the larger of the
  two widths, normal with variance 1/n at first: its rows are orthonormal (its columns, for a
  student wider than its teacher). Weight 1 (Miles et al. 2024, arXiv:2403.06213).

  Args:
    student, teacher: names of outputs of one rank, [B, ..., C].

  Raises:
    ValueError: in init, ranks, rows or lengths differ.

  >>> from distill_jax import objectives
  >>> term = objectives.vkd("pooled", "pooled")
  >>> student, teacher = {"pooled": np.zeros((2, 4))}, {"pooled": np.zeros((2, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> jax.tree.map(jnp.shape, params)  # as wide as the wider network
  {'raw': (8, 8)}
  """

  def init(key, s, t):
    check_pair(s, t)
    size = max(s.shape[-1], t.shape[-1])
    return Variables({"raw": jax.random.normal(key, (size, size), jnp.float32) / size**0.5}, {})

  def apply(params, state, s, t):
    raw = params["raw"]
    # In bfloat16, a TPU's default, the projection would not be orthogonal.
    with jax.default_matmul_precision("highest"):
      kernel = jax.scipy.linalg.expm(raw - raw.T)[: s.shape[-1], : t.shape[-1]]
    return losses.vkd(layer({"kernel": kernel}, resize_to(s, t)), t), state

  return learned(student, teacher, init, apply)


def check_pair(s: jax.Array, t: jax.Array, *, ranks: tuple[int, ...] = ()) -> None:
  """Raises a `ValueError` where two features cannot be aligned, or are of none of these ranks."""
  problem = shape_mismatch(s.shape, t.shape)
  if problem is None and ranks and len(s.shape) not in ranks:
    problem = f"expected {' or '.join(map(str, ranks))} axes"
    if len(s.shape) == 5:
      problem += ": for volumes and clips use objectives.mgd, or features with losses.cwd"
  if problem:
    raise ValueError(f"cannot be aligned: {problem}")


def _check_shapes(apply, parameters: set[str], variables: Variables, s, t, key) -> None:
  """Calls `apply` on the shapes, with those of the step's arguments that it has."""
  rows = jax.tree.leaves((s, t))[0].shape[:1]
  context = {"where": jnp.ones(rows, bool), "step": jnp.zeros((), jnp.int32), "key": key}
  extras = {name: x for name, x in context.items() if name in parameters}
  static = {"axis_name": None} if "axis_name" in parameters else {}
  jax.eval_shape(lambda *args: apply(*args[:4], **args[4], **static), *variables, s, t, extras)


def _shapes(arrays):
  return jax.tree.map(lambda x: tuple(x.shape), arrays)
