"""Compares outputs of two networks: logits, features, and students that teach one another."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from distill_jax import losses
from distill_jax.errors import check_integer
from distill_jax.objectives.calls import Names, blank, outputs_of, prepare
from distill_jax.objectives.loss_checks import name_of
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
      logits(losses.uld)  # two vocabularies

  Values that do not count ('where', `valid`, a negative label) are replaced by 0 on both sides
  before the loss: a NaN there reaches neither value nor gradient.

  Args:
    loss: `(student [..., C], teacher [..., C], **hyperparameters) -> [...]`. If it has an argument
      `labels` it gets the batch's integer labels; if it has `where` (it relates rows) it gets the
      valid rows. The numbers of classes may differ where the loss accepts it.
    output: name of the output of both networks that holds the logits.
    entries: arguments of the loss that are entries of the batch, `{argument: entry}`, passed as
      they are: `{"labels": "tokens"}` for `losses.rnnt_three_way`. The first step checks their
      shapes, and then the hyper-parameters too.
    valid: name of a bool entry of the batch that marks the values that count, in addition to
      'where': tokens [B, L], pixels [B, H, W], boxes [B, N], nodes of a lattice.
    **hyperparameters: passed to the loss. A function for a number is a schedule of the step,
      `temperature=optax.linear_schedule(8.0, 1.0, 1000)`.

  Raises:
    ValueError: at once, a loss that is no function, or a hyper-parameter that it does not have,
      that is missing or has another type; in init, a value that the loss rejects, or logits whose
      shapes differ (both are shown); in a step, mixed labels where the loss needs integers, or an
      entry that the batch lacks.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> student, teacher = {"logits": jnp.zeros((2, 3))}, {"logits": jnp.eye(2, 3)}
  >>> term = objectives.logits(losses.kl_divergence, temperature=4.0)
  >>> (values, where), _ = term.apply({}, {}, student, teacher, {}, step=0, key=None)
  >>> values.shape
  (2,)
  """
  call = prepare(loss, hyperparameters, entries=entries, valid=valid)
  if "targets" in list(inspect.signature(loss).parameters)[1:2]:
    raise ValueError(
      f"loss: expected one of the logits of both networks, got {name_of(loss)} of SparseTargets: "
      "use objectives.sparse"
    )

  def sides(student, teacher):
    s = outputs_of(student, output, "student")
    t = outputs_of(teacher, output, "teacher")
    for side, x in {"student": s, "teacher": t}.items():
      if len(getattr(x, "shape", ())) < 2:
        got = getattr(x, "shape", type(x).__name__)
        raise ValueError(
          f"{output}: expected logits [rows, classes] of the {side}, got {got}: one logit per row "
          "takes losses.binary_kl on [rows, 1]"
        )
    if s.shape[:-1] != t.shape[:-1] or (s.shape != t.shape and 1 in (s.shape[-1], t.shape[-1])):
      raise _shape_error(output, s, t)
    return s, t

  def init(key, student, teacher):
    del key
    s, t = sides(student, teacher)
    with _shapes_in_error(output, s, t):
      call.check(s, t, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key
    s, t = sides(student, teacher)
    with _shapes_in_error(output, s, t):
      return call.value(s, t, batch, step, axis_name), state

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
    student, teacher: names of outputs of the same rank: [B, C], [B, L, C], maps [B, H, W, C],
      volumes [B, D, H, W, C] or clips [B, T, H, W, C]. Tuples of as many names for a loss that
      takes several (`losses.fsp`, `losses.minilm_relations`): each pair is aligned by itself.
    loss: `(student, teacher, **hyperparameters)`, [B] or a scalar; `where` as in `logits`.
    project: where the channels differ, learn a linear map (on images a 1x1 convolution) from the
      student's to the teacher's, FitNets' regressor (Romero et al. 2015, section 2.2). It trains
      with the student and is not exported. False: the loss gets the channels as they are. Logits
      of two vocabularies are never projected.
    resize: where heights or widths differ, or depths or numbers of frames, resize the student's
      map to the teacher's size (linear interpolation, antialiased). False: the loss gets maps and
      sequences of any size as they are (`losses.similarity_preserving`, `inter_channel` and `pkt`
      compare them so).
    entries, valid: as in `logits`; `entries={"mask": "pairs"}` for `losses.attention_kl`.
    **hyperparameters: as in `logits`.

  Raises:
    ValueError: at once, a hyper-parameter that the loss does not have, or different numbers of
      names; in init, an unknown name, a value that the loss rejects, or a pair that cannot be
      aligned or compared (both shapes are shown).

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> term = objectives.features("block1", "block3", losses.hint)
  >>> student, teacher = {"block1": jnp.ones((2, 4, 4, 8))}, {"block3": jnp.ones((2, 4, 4, 16))}
  >>> jax.tree.map(jnp.shape, term.init(jax.random.key(0), student, teacher).params)  # a projection
  {'bias': (16,), 'kernel': (8, 16)}
  """
  call = prepare(loss, hyperparameters, entries=entries, valid=valid)
  if not _same_structure(student, teacher):
    raise ValueError(
      f"student, teacher: expected as many names of both, got {student!r} and {teacher!r}"
    )

  def sides(s_outputs, t_outputs):
    return outputs_of(s_outputs, student, "student"), outputs_of(t_outputs, teacher, "teacher")

  def check_pair(s_name, t_name, s, t):
    problem = shape_mismatch(s.shape, t.shape, resize=resize)
    if problem is None and project and s.shape[-1] != t.shape[-1]:
      problem = _projection_problem(loss, s_name, t_name)
    if problem:
      raise ValueError(
        f"student {s_name!r} {tuple(s.shape)} cannot be aligned with teacher {t_name!r} "
        f"{tuple(t.shape)}: {problem}"
      )

  def aligned(params, s, t):
    return jax.tree.map(lambda _, p, s, t: align(p, s, t, resize=resize), student, params, s, t)

  def init(key, s_outputs, t_outputs):
    s, t = sides(s_outputs, t_outputs)
    names, structure = jax.tree.flatten(student)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(names))))
    jax.tree.map(check_pair, student, teacher, s, t)
    params = jax.tree.map(
      lambda _, k, s, t: align_init(k, s, t) if project else {}, student, keys, s, t
    )
    with _sizes_in_error(resize, s, t):
      call.check(jax.eval_shape(aligned, params, s, t), t, jax.tree.leaves(s)[0].shape[:1])
    return Variables(params, {})

  def apply(params, state, s_outputs, t_outputs, batch, *, step, key, axis_name=None):
    del key
    s, t = sides(s_outputs, t_outputs)
    # Also before the projection: its gradient is the input times 0, which is NaN for a NaN.
    s = blank(call.mask(batch), s)
    return call.value(aligned(params, s, t), t, batch, step, axis_name), state

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

  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> term = objectives.mutual(losses.kl_divergence, 2)
  >>> student = {"0/logits": jnp.zeros((2, 3)), "1/logits": jnp.zeros((2, 3))}
  >>> (values, where), _ = term.apply({}, {}, student, {}, {}, step=0, key=None)
  >>> values.shape
  (2,)
  """
  check_integer("students", students, 2)
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
    if isinstance(values[0], tuple):  # All pairs have one mask: it is the batch's.
      return (weight * sum(value for value, _ in values), values[0][1]), state
    return weight * sum(values), state

  return Term(init, apply)


def _same_structure(student: Names, teacher: Names) -> bool:
  if isinstance(student, str) or isinstance(teacher, str):
    return isinstance(student, str) and isinstance(teacher, str)
  return len(student) == len(teacher)


@contextlib.contextmanager
def _shapes_in_error(output: str, s: Any, t: Any) -> Iterator[None]:
  """Shows both shapes where a loss rejects logits of different classes."""
  try:
    yield
  except (ValueError, TypeError) as error:
    if s.shape == t.shape:
      raise
    raise _shape_error(output, s, t) from error


@contextlib.contextmanager
def _sizes_in_error(resize: bool, s: Any, t: Any) -> Iterator[None]:
  """Says what to do where a loss rejects maps or sequences that were not resized."""
  try:
    yield
  except (ValueError, TypeError) as error:
    shapes = [[x.shape[1:-1] for x in jax.tree.leaves(side)] for side in (s, t)]
    if resize or shapes[0] == shapes[1]:
      raise
    raise ValueError(
      f"resize: expected True for sizes {shapes[0]} of the student and {shapes[1]} of the teacher, "
      f"got resize=False: {error}: resize them, or use a loss for any sizes such as losses.pkt"
    ) from error


def _shape_error(output: str, s: Any, t: Any) -> ValueError:
  return ValueError(
    f"{output}: expected one shape, got {tuple(s.shape)} of the student and {tuple(t.shape)} of "
    "the teacher: logits are compared row by row and class by class; for two vocabularies use "
    "losses.uld, or else distill features"
  )


def _projection_problem(loss: Callable, s_name: str, t_name: str) -> str | None:
  """Returns why no projection between these outputs is learned, or None."""
  if loss is losses.uld:
    return "losses.uld compares any two vocabularies as they are: use objectives.logits(losses.uld)"
  if s_name.split("/")[-1] == t_name.split("/")[-1] == "logits":
    return (
      "a projection of logits would learn another classifier: use objectives.logits(losses.uld) "
      "for two vocabularies, or project=False for a loss of any widths"
    )
  return None


def _peers(outputs: Outputs, output: str, i: int, j: int) -> tuple[Outputs, Outputs]:
  """Returns the outputs of student i and of student j, each under the plain name."""
  learner = outputs_of(outputs, f"{i}/{output}", "student")
  peer = outputs_of(outputs, f"{j}/{output}", "student")
  return {output: learner}, {output: peer}
