"""Compares named outputs of two networks, with a learned projection between them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from distill_jax import losses
from distill_jax.objectives.calls import Names, blank, outputs_of, prepare
from distill_jax.objectives.parts import align, align_init, shape_mismatch
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


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


def _same_structure(student: Names, teacher: Names) -> bool:
  if isinstance(student, str) or isinstance(teacher, str):
    return isinstance(student, str) and isinstance(teacher, str)
  return len(student) == len(teacher)


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
