"""Compares outputs of two networks: logits, features, and students that teach one another."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from distill_jax.objectives.calls import Names, outputs_of, prepare
from distill_jax.objectives.parts import align, align_init, shape_mismatch
from distill_jax.objectives.terms import Term
from distill_jax.types import Outputs, Variables


def logits(
  loss: Callable[..., jax.Array],
  *,
  output: str = "logits",
  entries: Mapping[str, str] | None = None,
  valid: str | None = None,
  **hyperparameters: Any,
) -> Term:
  """Compares the logits of both networks by a loss of `distill_jax.losses`, or any other.

      logits(losses.kl_divergence, temperature=4.0)

  Args:
    loss: `(student [..., C], teacher [..., C], **hyperparameters) -> [...]`. If it has an argument
      `labels` it gets the batch's integer labels; if it has `where` (it relates rows) it gets the
      valid rows.
    output: name of the output of both networks that holds the logits.
    entries: arguments of the loss that are entries of the batch, `{argument: entry}`, passed as
      they are: `{"labels": "tokens"}` for `losses.rnnt_three_way`. The first step checks their
      shapes, and then the hyper-parameters too.
    valid: name of a bool entry of the batch that marks the values that count, in addition to
      'where': tokens [B, L], pixels [B, H, W], boxes [B, N], nodes of a lattice.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have, or a missing one; in init,
      a value that the loss rejects, or logits whose shapes differ (both are shown); in a step,
      mixed labels where the loss needs integers, or an entry that the batch lacks.
  """
  call = prepare(loss, hyperparameters, entries=entries, valid=valid)

  def sides(student, teacher):
    s = outputs_of(student, output, "student")
    t = outputs_of(teacher, output, "teacher")
    if s.shape != t.shape:
      raise ValueError(
        f"{output}: expected one shape, got {tuple(s.shape)} of the student and {tuple(t.shape)} "
        "of the teacher: logits are compared row by row and class by class; distill features"
      )
    return s, t

  def init(key, student, teacher):
    del key
    s, t = sides(student, teacher)
    call.check(s, t, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, step, key
    s, t = sides(student, teacher)
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
  **hyperparameters: Any,
) -> Term:
  """Compares a named output of the student with one of the teacher.

      features("block2", "block3", losses.hint)

  Args:
    student, teacher: names of outputs of the same rank: [B, C], [B, L, C] or [B, H, W, C]. Tuples
      of as many names for a loss that takes several (`losses.fsp`, `losses.minilm_relations`):
      each pair is aligned by itself.
    loss: `(student, teacher, **hyperparameters)`, [B] or a scalar; `where` as in `logits`.
    project: where the channels differ, learn a linear map (on images a 1x1 convolution) from the
      student's to the teacher's, FitNets' regressor (Romero et al. 2015, section 2.2). It trains
      with the student and is not exported. False: the loss gets the channels as they are.
    resize: where heights or widths differ, resize the student's map to the teacher's size (linear
      interpolation, antialiased). False: the loss gets the maps as they are.
    entries, valid: as in `logits`; `entries={"mask": "pairs"}` for `losses.attention_kl`.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have, or different numbers of
      names; in init, an unknown name, a value that the loss rejects, or a pair that cannot be
      aligned or compared (both shapes are shown).
  """
  call = prepare(loss, hyperparameters, entries=entries, valid=valid)
  if not _same_structure(student, teacher):
    raise ValueError(
      f"student, teacher: expected as many names of both, got {student!r} and {teacher!r}"
    )

  def sides(s_outputs, t_outputs):
    return outputs_of(s_outputs, student, "student"), outputs_of(t_outputs, teacher, "teacher")

  def aligned(params, s, t):
    return jax.tree.map(lambda _, p, s, t: align(p, s, t, resize=resize), student, params, s, t)

  def init(key, s_outputs, t_outputs):
    s, t = sides(s_outputs, t_outputs)
    names, structure = jax.tree.flatten(student)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(names))))
    jax.tree.map(lambda *pair: _check_pair(*pair, resize=resize), student, teacher, s, t)
    params = jax.tree.map(
      lambda _, k, s, t: align_init(k, s, t) if project else {}, student, keys, s, t
    )
    call.check(jax.eval_shape(aligned, params, s, t), t, jax.tree.leaves(s)[0].shape[:1])
    return Variables(params, {})

  def apply(params, state, s_outputs, t_outputs, batch, *, step, key, axis_name=None):
    del step, key
    s, t = sides(s_outputs, t_outputs)
    return call.value(aligned(params, s, t), t, batch, axis_name), state

  return Term(init, apply)


def mutual(
  loss: Callable[..., jax.Array],
  students: int,
  *,
  output: str = "logits",
  **hyperparameters: Any,
) -> Term:
  """Deep mutual learning: the networks of a `models.cohort` teach one another.

  Sum over the students i of the mean over the others j of `loss(logits_i, logits_j)`, with j held
  constant (Zhang et al. 2018, equations 4 and 9); one step updates all. Add
  `labels(output=f"{i}/logits")` for each i.

  Args:
    loss: as in `logits`; the paper's is `losses.kl_divergence` at temperature 1.
    students: number of students, at least 2.
    output: name of the output that is compared.
    **hyperparameters: passed to the loss.

  Raises:
    ValueError: fewer than 2 students; and as in `logits`.
  """
  if students < 2:
    raise ValueError(f"students: expected at least 2, got {students}")
  pairs = [(i, j) for i in range(students) for j in range(students) if i != j]
  term = logits(loss, output=output, **hyperparameters)

  def init(key, student, teacher):
    del teacher
    for i, j in pairs:
      learner, peer = _peers(student, output, i, j)
      term.init(key, learner, peer)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, **context):
    del teacher
    values = []
    for i, j in pairs:
      learner, peer = _peers(student, output, i, j)
      value, _ = term.apply(params, state, learner, jax.lax.stop_gradient(peer), batch, **context)
      values.append(value)
    weight = 1 / (students - 1)
    if isinstance(values[0], tuple):
      return (weight * sum(value for value, _ in values), values[0][1]), state
    return weight * sum(values), state

  return Term(init, apply)


def _same_structure(student: Names, teacher: Names) -> bool:
  if isinstance(student, str) or isinstance(teacher, str):
    return isinstance(student, str) and isinstance(teacher, str)
  return len(student) == len(teacher)


def _check_pair(s_name: str, t_name: str, s, t, *, resize: bool) -> None:
  problem = shape_mismatch(s.shape, t.shape, resize=resize)
  if problem:
    raise ValueError(
      f"student {s_name!r} {tuple(s.shape)} cannot be aligned with teacher {t_name!r} "
      f"{tuple(t.shape)}: {problem}"
    )


def _peers(outputs: Outputs, output: str, i: int, j: int) -> tuple[Outputs, Outputs]:
  """Returns the outputs of student i and of student j, each under the plain name."""
  learner = outputs_of(outputs, f"{i}/{output}", "student")
  peer = outputs_of(outputs, f"{j}/{output}", "student")
  return {output: learner}, {output: peer}
