"""Compares the maps of two detectors' necks: around the boxes, and where the teacher is sure."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.boxes import has_area
from distill_jax.objectives.calls import Names, batch_entry
from distill_jax.objectives.confidence import check_scores, confidence
from distill_jax.objectives.hyperparameters import at_step, check_at_steps, is_number
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.loss_checks import check_options
from distill_jax.objectives.parts import align, align_init, resize_to, stack, stack_init
from distill_jax.objectives.terms import Term
from distill_jax.types import Batch, Outputs, Variables

_COUNTED = "fgd/counted"  # An entry that the term adds to the batch.


def fgd(
  student: str,
  teacher: str,
  *,
  stride: float,
  boxes: str = "boxes",
  valid: str | None = None,
  **hyperparameters: Any,
) -> Term:
  """Focal and global distillation: `losses.fgd` with learned context blocks and the batch's boxes.

  Weight 1, for each level of the neck: the weights are the hyper-parameters (Yang et al. 2022,
  arXiv:2111.11837).

  Args:
    student, teacher: names of maps [B, H, W, C] of one level; channels and size are aligned as in
      `features`.
    stride: number of pixels per position of the teacher's map at this level. It is compared with
      the batch's 'image' [B, H, W, C], if it has one.
    boxes: name of the batch's entry of (x0, y0, x1, y1) in pixels, [B, N, 4].
    valid: name of the batch's entry that marks the boxes that exist, bool [B, N]. None: those that
      have an area (`boxes.has_area`), and of which the batch's 'label' is no negative number and
      its 'crowd' is False, where it has these entries [B, N].
    **hyperparameters: `temperature`, `alpha`, `beta`, `gamma`, `relation` of the loss, each a
      number or a schedule of the step.

  Raises:
    ValueError: at once, stride <= 0 or a hyper-parameter that the loss does not have; in init,
      outputs that are not maps of as many rows, or a hyper-parameter that the loss rejects; in a
      step, boxes that do not fit or that the batch lacks, or a stride with which the map would be
      of another image.

  >>> from distill_jax import objectives
  >>> term = objectives.fgd("p3", "p3", stride=8)  # a step's batch has 'boxes'
  >>> student, teacher = {"p3": np.zeros((2, 4, 4, 4))}, {"p3": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> params["context"][0].reduce[0].shape  # the context block of the student
  (8, 4)
  """
  if not is_number(stride) or not stride > 0:
    raise ValueError(f"stride: expected a number > 0, got {stride!r}")
  schedules = check_options(losses.fgd, {"foreground", "context"}, hyperparameters)

  def init(key, s, t):
    check_pair(s, t, ranks=(4,))
    align_key, context_key = jax.random.split(key)
    context = losses.fgd_init(context_key, t.shape[-1])
    maps = jax.ShapeDtypeStruct(t.shape, t.dtype)
    foreground = jax.ShapeDtypeStruct(t.shape[:3], jnp.float32)
    check_at_steps(losses.fgd, hyperparameters, schedules, maps, maps, foreground, context)
    return Variables({"align": align_init(align_key, s, t), "context": context}, {})

  def apply(params, state, s, t, *, step, boxes, valid):
    options = {name: at_step(value, step) for name, value in hyperparameters.items()}
    _, height, width, _ = t.shape
    foreground = losses.box_weights(boxes / stride, valid, height=height, width=width)
    aligned = align(params["align"], s, t)
    return losses.fgd(aligned, t, foreground, params["context"], **options), state

  entry = valid or _COUNTED
  term = learned(student, teacher, init, apply, entries={"boxes": boxes, "valid": entry})

  def apply_term(params, state, s_outputs, t_outputs, batch, **context):
    _check_stride(stride, teacher, t_outputs, batch)
    if valid is None:
      batch = {**batch, _COUNTED: _counted_boxes(batch, boxes)}
    return term.apply(params, state, s_outputs, t_outputs, batch, **context)

  return Term(init=term.init, apply=apply_term)


def score_weighted(
  student: Names,
  teacher: Names,
  *,
  scores: str = "class_logits",
  background: bool = False,
) -> Term:
  """Score-weighted L2: `losses.score_weighted` of the levels of a neck, summed over the levels.

      score_weighted(("p3", "p4", "p5"), ("p3", "p4", "p5"))

  The student's maps go through a learned adapter each: two 1x1 convolutions with a ReLU between, as
  wide as the teacher. The score of a position is the teacher's largest probability of a class
  there. Weight 6 (Ultralytics' guide to knowledge distillation, 2026).

  Args:
    student: name of a map [B, H, W, C], or names of all levels, in the order in which the teacher's
      head lists its locations. A map of another size is resized to the teacher's.
    teacher: as many names of maps.
    scores: name of the teacher's class logits [B, A, C]. A is the number of positions of these
      maps, level by level and row by row, or a multiple: the anchors of a position follow one
      another, and the largest score counts.
    background: as in `locations`.

  Raises:
    ValueError: at once, different numbers of names; in init, outputs that are not maps of as many
      rows, or scores that do not fit the positions.

  >>> from distill_jax import objectives
  >>> term = objectives.score_weighted(("p3", "p4"), ("p3", "p4"))
  >>> student = {"p3": np.zeros((2, 4, 4, 8)), "p4": np.zeros((2, 2, 2, 8))}
  >>> teacher = {"p3": np.zeros((2, 4, 4, 16)), "p4": np.zeros((2, 2, 2, 16))}
  >>> teacher["class_logits"] = np.zeros((2, 4 * 4 + 2 * 2, 10))
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> jax.tree.map(jnp.shape, params["0"])  # The adapter of p3.
  {'0': {'bias': (16,), 'kernel': (8, 16)}, '1': {'bias': (16,), 'kernel': (16, 16)}}
  """
  s_names = (student,) if isinstance(student, str) else tuple(student)
  t_names = (teacher,) if isinstance(teacher, str) else tuple(teacher)
  if len(s_names) != len(t_names) or not s_names:
    raise ValueError(
      f"student, teacher: expected as many names of both, got {student!r} and {teacher!r}"
    )

  def init(key, s, t):
    *maps, logits = t
    params = {}
    for i, (s_map, t_map) in enumerate(zip(s, maps)):
      check_pair(s_map, t_map, ranks=(4,))
      sizes = s_map.shape[-1], t_map.shape[-1], t_map.shape[-1]
      params[str(i)] = stack_init(jax.random.fold_in(key, i), sizes)
    _check_positions(scores, logits.shape, [x.shape for x in maps], background)
    return Variables(params, {})

  def apply(params, state, s, t, *, where, axis_name):
    *maps, logits = t
    parts = _level_scores(confidence(logits, background=background), [x.shape for x in maps])
    rows = {"where": where, "axis_name": axis_name}
    values = []
    for i, (s_map, t_map) in enumerate(zip(s, maps)):
      adapted = stack(params[str(i)], resize_to(s_map, t_map))
      values.append(losses.score_weighted(adapted, t_map, parts[i], **rows))
    return jnp.stack(values).sum(), state

  return learned(s_names, (*t_names, scores), init, apply)


def _check_stride(stride: float, name: str, outputs: Outputs, batch: Batch) -> None:
  """Checks that the teacher's map, at this stride, is about as large as the batch's 'image'.

  Convolutions without padding lose up to two positions, and padding of the image adds some. A map
  of one position fits.
  """
  shape = jnp.shape(batch.get("image", 0))
  if len(shape) != 4 or name not in outputs:
    return
  pixels = shape[1:3]
  sizes = jnp.shape(outputs[name])[1:3]
  if all(n == 1 or p - 2 * stride < n * stride < 2 * p for n, p in zip(sizes, pixels)):
    return
  likely = [round(p / n, 2) for n, p in zip(sizes, pixels)]
  raise ValueError(
    f"stride: expected the pixels per position of {name!r}, {sizes[0]} x {sizes[1]} positions of "
    f"an image of {pixels[0]} x {pixels[1]} pixels, got {stride}: about {max(likely):g} fits"
  )


def _counted_boxes(batch: Batch, boxes: str) -> jax.Array:
  """Returns which boxes count, bool [B, N]: they have an area, a class, and are no crowd."""
  counted = has_area(batch_entry(batch, boxes))
  label = batch.get("label")
  crowd = batch.get("crowd")
  if label is not None and label.shape == counted.shape:
    counted &= label >= 0
  if crowd is not None and crowd.shape == counted.shape:
    counted &= ~crowd
  return counted


def _level_scores(scores: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
  """Returns the largest score at each position, [B, H, W] of each level.

  Args:
    scores: [B, A], level by level, row by row; the anchors of a position follow one another.
    shapes: of the levels' maps, [B, H, W, C].
  """
  sizes = [height * width for _, height, width, _ in shapes]
  positions = scores.reshape(len(scores), sum(sizes), -1).max(-1)
  starts = [sum(sizes[:i]) for i in range(len(sizes))]
  return [
    positions[:, start : start + size].reshape(shape[:3])
    for start, size, shape in zip(starts, sizes, shapes)
  ]


def _check_positions(
  name: str, shape: tuple[int, ...], maps: list[tuple[int, ...]], background: bool
) -> None:
  """Checks that class logits are those of all positions of these maps, or of their anchors."""
  positions = sum(height * width for _, height, width, _ in maps)
  fits = len(shape) == 3 and shape[1] > 0 and shape[1] % positions == 0
  if not fits:
    grids = [x[1:3] for x in maps]
    raise ValueError(
      f"{name}: expected class logits [B, A, C] of the {positions} positions of {grids}, or a "
      f"multiple for anchors, got {tuple(shape)}: name all levels of the head, in its order"
    )
  check_scores(name, shape, (maps[0][0], shape[1]), background)
