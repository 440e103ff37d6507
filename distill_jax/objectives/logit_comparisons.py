"""Compares the logits of two networks, or those of students that teach one another."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from distill_jax.errors import check_integer
from distill_jax.objectives.calls import batch_entry, outputs_of, prepare
from distill_jax.objectives.label_masks import make_label_mask, resize_pair
from distill_jax.objectives.label_settings import check_class_weights, check_resize
from distill_jax.objectives.loss_checks import name_of
from distill_jax.objectives.sums import sum_values
from distill_jax.objectives.terms import Term
from distill_jax.types import Outputs, Variables


def logits(
  loss: Callable[..., jax.Array],
  *,
  output: str = "logits",
  label: str = "label",
  ignore_label: int | None = None,
  class_weights: Sequence[float] | None = None,
  resize: bool = False,
  entries: Mapping[str, str] | None = None,
  valid: str | None = None,
  **hyperparameters: Any,
) -> Term:
  """Compares the logits of both networks by a loss of `distill_jax.losses`, or any other.

      logits(losses.kl_divergence, temperature=4.0)
      logits(losses.kl_divergence, ignore_label=255, resize=True)  # segmentation
      logits(losses.uld)  # two vocabularies

  Values that do not count ('where', `valid`, a negative label) are replaced by 0 on both sides
  before the loss: a NaN there reaches neither value nor gradient.

  Args:
    loss: `(student [..., C], teacher [..., C], **hyperparameters) -> [...]`. If it has an argument
      `labels` it gets the batch's integer labels; if it has `where` (it relates rows) it gets the
      valid rows. The numbers of classes may differ where the loss accepts it.
    output: name of the output of both networks that holds the logits.
    label: name of the batch's entry with the class numbers [...] that the next two arguments read.
    ignore_label: the class number of what has no label (255, -100). What has it, or a negative
      label, does not count. None: all values count, with or without a label.
    class_weights: C numbers >= 0 by which the values of each label's class are multiplied, as in
      `labels` (`data.class_weights`); what has no label does not count.
    resize: where heights and widths differ, resize the logits of both networks
      (`losses.resize_logits`): to the grid of the labels that `ignore_label` or `class_weights`
      read, or of the entry `valid`, or else to the larger one of both. False: they are refused.
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
      shapes differ (both are shown) or cannot be resized; in a step, mixed labels where the loss
      needs integers, labels of another grid, or an entry that the batch lacks.

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
  mask = make_label_mask(call, label, ignore_label, class_weights)
  check_resize(resize)
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
    return s, t

  def on_one_grid(s, t, size=None):
    if resize:
      s, t = resize_pair(output, s, t, size)
    if s.shape[:-1] != t.shape[:-1] or (s.shape != t.shape and 1 in (s.shape[-1], t.shape[-1])):
      raise _shape_error(output, s, t)
    return s, t

  grid_entry = valid if mask is None else mask.label

  def init(key, student, teacher):
    del key
    s, t = jax.eval_shape(on_one_grid, *sides(student, teacher))
    if mask is not None:
      check_class_weights(mask.class_weights, output, s.shape)
    with _shapes_in_error(output, s, t):
      call.check(s, t, s.shape[:-1])
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key
    s, t = sides(student, teacher)
    size = None if grid_entry is None else batch_entry(batch, grid_entry).shape[1 : s.ndim - 1]
    s, t = on_one_grid(s, t, size)
    compute = call.value if mask is None else functools.partial(mask.value, call)
    with _shapes_in_error(output, s, t):
      return compute(s, t, batch, step, axis_name), state

  return Term(init, apply)


def mutual(
  loss: Callable[..., jax.Array],
  students: int,
  *,
  output: str = "logits",
  compare: Callable[..., Term] | None = None,
  **hyperparameters: Any,
) -> Term:
  """Deep mutual learning: the networks of a `models.cohort` teach one another.

  Sum over the students i of the mean over the others j of `loss(logits_i, logits_j)`, with j held
  constant (Zhang et al. 2018, equations 4 and 9); one step updates all. Add
  `labels(output=f"{i}/logits")` for each i. For CTC networks (UDML of PP-OCRv3) write
  `mutual(losses.ctc_frames, 2, compare=objectives.frames)`, and add `ctc(output=f"{i}/logits")`.

  Args:
    loss: as in `logits`; the paper's is `losses.kl_divergence` at temperature 1.
    students: number of students, at least 2.
    output: name of the output that is compared.
    compare: `(loss, output=..., **hyperparameters) -> Term`: `frames`, `ctc_mean`, or None for
      `logits`.
    **hyperparameters: passed to the loss, or to `compare`.

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
  term = (compare or logits)(loss, output=output, **hyperparameters)

  def init(key, student, teacher):
    del teacher
    for i, j in pairs:
      learner, peer = _peers(student, output, i, j)
      term.init(key, learner, peer)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del teacher
    context = {"step": step, "key": key, "axis_name": axis_name}
    values = []
    for i, j in pairs:
      learner, peer = _peers(student, output, i, j)
      value, _ = term.apply(params, state, learner, jax.lax.stop_gradient(peer), batch, **context)
      values.append(value)
    weight = 1 / (students - 1)
    if compare is not None:  # Each pair may have a mask of its own.
      total, where = sum_values(values, batch, axis_name)
      return (weight * total, where), state
    if isinstance(values[0], tuple):  # All pairs have one mask: it is the batch's.
      return (weight * sum(value for value, _ in values), values[0][1]), state
    return weight * sum(values), state

  return Term(init, apply)


@contextlib.contextmanager
def _shapes_in_error(output: str, s: Any, t: Any) -> Iterator[None]:
  """Shows both shapes where a loss rejects logits of different classes."""
  try:
    yield
  except (ValueError, TypeError) as error:
    if s.shape == t.shape:
      raise
    raise _shape_error(output, s, t) from error


def _shape_error(output: str, s: Any, t: Any) -> ValueError:
  hint = "for two vocabularies use losses.uld, or else distill features"
  if len(s.shape) == len(t.shape) > 3 and s.shape[1:-1] != t.shape[1:-1]:
    hint = "for maps of two sizes write logits(loss, resize=True)"
  return ValueError(
    f"{output}: expected one shape, got {tuple(s.shape)} of the student and {tuple(t.shape)} of "
    f"the teacher: logits are compared row by row and class by class; {hint}"
  )


def _peers(outputs: Outputs, output: str, i: int, j: int) -> tuple[Outputs, Outputs]:
  """Returns the outputs of student i and of student j, each under the plain names."""
  for number in (i, j):
    outputs_of(outputs, f"{number}/{output}", "student")
  learner, peer = (
    {name.removeprefix(f"{n}/"): x for name, x in outputs.items() if name.startswith(f"{n}/")}
    for n in (i, j)
  )
  return learner, peer
