"""Terms: hard labels, soft targets, features, mutual learning; and their weighted sum."""

import contextlib
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.objectives.calls import (
  Names,
  has_true_label,
  label_of,
  outputs_of,
  prepare,
  valid_rows,
)
from distill_jax.objectives.parts import align, align_init, shape_mismatch
from distill_jax.types import Objective, Outputs, Variables

Weight = float | Callable[[jax.Array], jax.Array]
RESERVED = ("loss", "accuracy", "grad_norm", "nonfinite", "empty")  # the step's own metrics


class Term(NamedTuple):
  """One loss over (student, teacher, batch); the shape that `weighted` takes.

  Attributes:
    init: `(key, student_outputs, teacher_outputs) -> Variables`, the term's learned parts; it raises a
      `ValueError` where the two do not fit. The outputs may be `ShapeDtypeStruct`s.
    apply: `(params, state, student, teacher, batch, *, step, key, axis_name) -> (value, state)`; the value is
      `(values, where)`, unreduced with the valid ones (None: all), or a scalar that relates rows.
  """

  init: Callable[..., Variables]
  apply: Callable[..., tuple[Any, Any]]


def weighted(**terms: tuple[Weight, Term]) -> Objective:
  """The weighted sum of named terms; each term's unweighted value becomes a metric of that name.

  Args:
    **terms: `name=(weight, term)`; a weight is a finite number >= 0 or a schedule `step -> weight` (optax),
      a function of `TrainState.step`.

  Raises:
    ValueError: no terms, a name that the step's own metrics use, what is not a (weight, term), or a weight that
      is negative or not finite.
  """
  if not terms:
    raise ValueError("weighted() got no terms: give at least one, such as hard=(1.0, labels())")
  for name, weighted_term in terms.items():
    _check_term(name, weighted_term)

  def init(key, student: Outputs, teacher: Outputs) -> Variables:
    made = {}
    for i, (name, (_, term)) in enumerate(terms.items()):
      with _named(name):
        made[name] = term.init(jax.random.fold_in(key, i), student, teacher)
    return Variables(
      *({n: getattr(v, part) for n, v in made.items()} for part in ("params", "state"))
    )

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    values, new_state = {}, {}
    for i, (name, (weight, term)) in enumerate(terms.items()):
      with _named(name):
        value, new_state[name] = term.apply(
          params[name],
          state[name],
          student,
          teacher,
          batch,
          step=step,
          key=jax.random.fold_in(key, i),
          axis_name=axis_name,
        )
      values[name] = (weight(step) if callable(weight) else weight), value
    return values, new_state

  return Objective(init, apply)


def labels(*, label_smoothing: float = 0.0, output: str = "logits") -> Term:
  """Cross entropy of the student with the true labels, always at temperature 1.

  Args:
    label_smoothing: the share in [0, 1) that is spread evenly over all classes (Szegedy et al. 2016, section 7);
      over those that exist, where a logit is -inf.
    output: the student's output that holds the logits [..., C].

  The batch's 'label' is int [...] or probabilities [..., C] (mixup); its 'where' masks rows. A negative label,
  or a row of zeros, is unlabeled: masked here, while other terms still use the row. (`data` refuses negative
  labels that were not declared, before they get here.) So are rows that are 'generated' (`models.on_policy`).

  Raises:
    ValueError: label_smoothing outside [0, 1); labels that are neither integers nor rows of C probabilities.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")

  def init(key, student, teacher):
    del key, teacher
    outputs_of(student, output, "student")
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, teacher, step, key, axis_name
    z = outputs_of(student, output, "student")
    log_q = jax.nn.log_softmax(z.astype(jnp.promote_types(z.dtype, jnp.float32)))
    target, known = _targets(label_of(batch), log_q)
    exists = z > -jnp.inf
    evenly = exists / jnp.maximum(exists.sum(-1, keepdims=True), 1)
    target = (1 - label_smoothing) * target + label_smoothing * evenly
    values = -jnp.where(target > 0, target * log_q, 0).sum(-1)
    return (values, valid_rows(batch, has_true_label(batch, known))), state

  return Term(init, apply)


def logits(
  loss: Callable[..., jax.Array],
  *,
  output: str = "logits",
  entries: Mapping[str, str] | None = None,
  valid: str | None = None,
  **hyperparameters,
) -> Term:
  """A logit loss of `distill_jax.losses` (or any `f(student, teacher, ...)`) between the two networks' logits.

  Args:
    loss: `(student [..., C], teacher [..., C], **hyperparameters) -> [...]`. If it has an argument `labels` it
      gets the batch's integer labels; if it has `where` (it relates rows) it gets the valid rows.
    output: the output of both that holds the logits.
    entries: arguments of the loss that are entries of the batch, `{argument: entry}`, passed as they are:
      `{"labels": "tokens"}` for `losses.rnnt_three_way`. Their shapes are checked in the first step.
    valid: an entry of the batch, bool, that says which values count besides 'where': tokens [B, L], pixels
      [B, H, W], boxes [B, N], nodes of a lattice.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: at once, a hyper-parameter that the loss refuses; in init, logits whose shapes differ (both are
      shown) or that do not fit the hyper-parameters; in a step, mixed labels where the loss needs integers, or
      an entry that the batch lacks.
  """
  call = prepare(loss, hyperparameters, entries=entries, valid=valid)

  def check(student, teacher):
    s, t = outputs_of(student, output, "student"), outputs_of(teacher, output, "teacher")
    if s.shape != t.shape:
      raise ValueError(
        f"student {output!r} {tuple(s.shape)} and teacher {output!r} {tuple(t.shape)} differ: "
        "comparing logits needs the same rows and classes (features may still be distilled)"
      )
    return s, t

  def init(key, student, teacher):
    del key
    s, t = check(student, teacher)
    call.check(s, t, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, step, key
    s, t = check(student, teacher)
    return call.value(s, t, batch, axis_name), state

  return Term(init, apply)


def features(
  student: Names,
  teacher: Names,
  loss: Callable[..., jax.Array],
  *,
  project: bool = True,
  resize: bool = True,
  entries: Mapping[str, str] | None = None,
  valid: str | None = None,
  **hyperparameters,
) -> Term:
  """A feature loss between a named output of the student and one of the teacher.

  Args:
    student, teacher: names of the outputs, of the same rank: [B, C], [B, L, C] or [B, H, W, C]. As many names
      of both, in tuples, for a loss that takes several (`losses.fsp`, `losses.minilm_relations`): each pair is
      aligned by itself.
    loss: `(student, teacher, **hyperparameters)`, [B] or a scalar; `where` as in `logits`.
    project: where the channels differ, learn a linear map (on images a 1x1 convolution) from the student's to
      the teacher's, FitNets' regressor (Romero et al. 2015, section 2.2). It trains with the student and is
      not exported. False: the loss gets the channels as they are.
    resize: where heights or widths differ, resize the student's map to the teacher's size (linear
      interpolation, antialiased). False: the loss gets the maps as they are.
    entries, valid: as in `logits`; `entries={"mask": "pairs"}` for `losses.attention_kl`.

  Raises:
    ValueError: at once, a hyper-parameter that the loss refuses, or other numbers of names; in init, an unknown
      name, or a pair that cannot be aligned or compared (both shapes are shown).
  """
  call = prepare(
    loss, hyperparameters, entries=entries, valid=valid, several=not isinstance(student, str)
  )
  if isinstance(student, str) != isinstance(teacher, str) or (
    not isinstance(student, str) and len(student) != len(teacher)
  ):
    raise ValueError(f"student {student!r} and teacher {teacher!r}: expected as many names of both")

  def init(key, s_outputs, t_outputs):
    s, t = outputs_of(s_outputs, student, "student"), outputs_of(t_outputs, teacher, "teacher")
    names, structure = jax.tree.flatten(student)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(names))))
    params = jax.tree.map(init_pair, student, teacher, keys, s, t)
    call.check(jax.eval_shape(aligned, params, s, t), t, jax.tree.leaves(s)[0].shape[:1])
    return Variables(params, {})

  def init_pair(s_name, t_name, key, s, t):
    problem = shape_mismatch(s.shape, t.shape, resize=resize)
    if problem:
      raise ValueError(
        f"student {s_name!r} {tuple(s.shape)} cannot be aligned with teacher {t_name!r} {tuple(t.shape)}: {problem}"
      )
    return align_init(key, s, t) if project else {}

  def aligned(params, s, t):
    return jax.tree.map(lambda _, p, s, t: align(p, s, t, resize=resize), student, params, s, t)

  def apply(params, state, s_outputs, t_outputs, batch, *, step, key, axis_name):
    del step, key
    s, t = outputs_of(s_outputs, student, "student"), outputs_of(t_outputs, teacher, "teacher")
    return call.value(aligned(params, s, t), t, batch, axis_name), state

  return Term(init, apply)


def mutual(
  loss: Callable[..., jax.Array], students: int, *, output: str = "logits", **hyperparameters
) -> Term:
  """Deep mutual learning (Zhang et al. 2018, equations 4 and 9): the networks of a `models.cohort` teach one another.

  The sum over the students i of the mean over the others j of `loss(logits_i, logits_j)`, with j held constant;
  all are updated in one step. Add `labels(output=f"{i}/logits")` for each i.

  Args:
    loss: as in `logits`; the paper's is `losses.kl_divergence` at temperature 1.
    students: how many there are, at least 2.
    output: the output that is compared.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: fewer than 2 students; and as in `logits`.
  """
  if students < 2:
    raise ValueError(f"students: expected at least 2, got {students}")
  pairs = [(i, j) for i in range(students) for j in range(students) if i != j]
  term = logits(loss, output=output, **hyperparameters)

  def pair(outputs, i, j):
    own, other = (outputs_of(outputs, f"{k}/{output}", "student") for k in (i, j))
    return {output: own}, {output: jax.lax.stop_gradient(other)}

  def init(key, student, teacher):
    del teacher
    for i, j in pairs:
      jax.eval_shape(lambda outputs, i=i, j=j: term.init(key, *pair(outputs, i, j)), student)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, **context):
    del teacher
    values = [
      term.apply(params, state, *pair(student, i, j), batch, **context)[0] for i, j in pairs
    ]
    share = 1 / (students - 1)
    if isinstance(values[0], tuple):
      return (share * sum(value for value, _ in values), values[0][1]), state
    return share * sum(values), state

  return Term(init, apply)


def _targets(label, log_q):
  """Rows of probabilities [..., C] and which rows are labeled [...]."""
  if jnp.issubdtype(label.dtype, jnp.integer):
    if label.shape != log_q.shape[:-1]:
      raise ValueError(f"labels {label.shape} do not match the rows of the logits {log_q.shape}")
    return jax.nn.one_hot(label, log_q.shape[-1], dtype=log_q.dtype), label >= 0
  if label.shape != log_q.shape:
    raise ValueError(
      f"labels must be integers {log_q.shape[:-1]} or rows of probabilities {log_q.shape}, "
      f"got {label.dtype} {label.shape}"
    )
  return label.astype(log_q.dtype), label.sum(-1) > 0


def _check_term(name: str, weighted_term) -> None:
  if name in RESERVED:
    raise ValueError(f"a term cannot be called {name!r}: the step's own metrics are {RESERVED}")
  if type(weighted_term) is not tuple or len(weighted_term) != 2:
    raise ValueError(f"term {name!r}: expected (weight, term), got {type(weighted_term).__name__}")
  weight, term = weighted_term
  if not isinstance(term, Term):
    raise ValueError(f"term {name!r}: expected a Term such as labels(), got {type(term).__name__}")
  if callable(weight):
    return
  number = isinstance(weight, numbers.Real) or (isinstance(weight, jax.Array) and weight.ndim == 0)
  if not number or not (math.isfinite(weight) and weight >= 0):
    raise ValueError(
      f"weight of term {name!r}: expected a finite number >= 0 or a schedule, got {weight!r}"
    )


@contextlib.contextmanager
def _named(name: str):
  """Puts the term's name in front of a ValueError raised inside."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"term {name!r}: {error}") from error
