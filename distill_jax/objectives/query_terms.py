"""Builds terms of scores [B, heads, queries, keys], with one value a query."""

import functools

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.objectives.calls import LossCall, outputs_of
from distill_jax.objectives.hyperparameters import check_at_steps
from distill_jax.objectives.layer_maps import Pairs, check_pairs, last_entries
from distill_jax.objectives.terms import Term
from distill_jax.objectives.token_masks import Entries, Masks, token_masks
from distill_jax.types import Outputs, Variables


def query_term(
  pairs: Pairs, names, scores, call: LossCall, last: int | None, entries: Entries, *, rank: int
) -> Term:
  """Returns the sum over pairs and names of a loss of scores, with one value a query.

  Args:
    pairs, names, last: as in `relations`.
    scores: `(output, side, exists, same) -> [B, heads, queries, keys]`.
    call: of a loss of scores [N, heads, 1, keys], N queries.
    entries: as in `segment_entries`.
    rank: number of axes of the outputs; 3: [B, L, C], 4: [B, heads, queries, keys].
  """
  check_pairs(pairs, last)
  s_first, t_first = (f"{names[0]}{layer}" for layer in pairs[0])
  key_axis = 3 if rank == 4 else 1

  def shapes_of(x) -> tuple[tuple[int, int], tuple[int, int]]:
    return (x.shape[0], x.shape[rank - 2]), (x.shape[0], x.shape[key_axis])

  def value(student, teacher, masks: Masks, loss):
    values = []
    for s, t in pairs:
      for name in names:
        outputs = _outputs_of_pair(student, teacher, f"{name}{s}", f"{name}{t}", last, rank)
        sides = zip(outputs, ("student", "teacher"))
        s_scores, t_scores = (scores(x, side, masks.exists, masks.same) for x, side in sides)
        values.append(_loss_per_query(loss, s_scores, t_scores, masks.counted))
    return sum(values[1:], values[0])

  def init(key, student, teacher):
    del key

    def shapes(student, teacher, **hyperparameters):
      x, _ = _outputs_of_pair(student, teacher, s_first, t_first, last, rank)
      queries, keys = (jnp.ones(shape, bool) for shape in shapes_of(x))
      loss = functools.partial(call.loss, **hyperparameters)
      return value(student, teacher, Masks(queries, keys, None), loss)

    check_at_steps(shapes, call.hyperparameters, call.schedules, student, teacher)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, key, axis_name
    x = outputs_of(student, s_first, "student")
    masks = token_masks(batch, *shapes_of(x), last, entries)
    return (value(student, teacher, masks, call.at(step)), masks.counted), state

  return Term(init, apply)


def _loss_per_query(loss, s_scores, t_scores, counted):
  """Returns the loss [B, queries] of scores [B, heads, queries, keys]."""
  scores = [jnp.where(counted[:, None, :, None], x, 0) for x in (s_scores, t_scores)]
  if s_scores.shape[1] != t_scores.shape[1]:
    scores = [_mean_of_heads(x) for x in scores]
  # [B, heads, queries, keys] -> [B queries, heads, 1, keys]
  rows = [x.swapaxes(1, 2).reshape(-1, x.shape[1], 1, x.shape[3]) for x in scores]
  values = loss(*rows)
  if jnp.shape(values) != (counted.size,):
    raise ValueError(
      f"loss: expected one value a query, {(counted.size,)}, got {jnp.shape(values)}"
    )
  return values.reshape(counted.shape)


def _outputs_of_pair(
  student: Outputs, teacher: Outputs, s_name: str, t_name: str, last: int | None, rank: int
):
  """Returns the outputs of these names, limited to the last tokens."""
  axes = (1,) if rank == 3 else (2, 3)
  s = outputs_of(student, s_name, "student")
  t = outputs_of(teacher, t_name, "teacher")
  for side, name, x in (("student", s_name, s), ("teacher", t_name, t)):
    if x.ndim != rank:
      raise ValueError(f"{name}: expected {rank} axes of the {side}'s output, got {x.shape}")
  s_last = last_entries(s, last, axes)
  t_last = last_entries(t, last, axes)
  if s.shape[0] != t.shape[0] or any(s_last.shape[a] != t_last.shape[a] for a in axes):
    raise ValueError(
      f"last: student {s_name!r} {s.shape} and teacher {t_name!r} {t.shape} differ in rows or "
      "tokens: set last to compare only the last tokens, such as the patches of images"
    )
  return s_last, t_last


def _mean_of_heads(scores):
  """Returns log of the mean over heads of softmax(scores): [B, h, q, k] -> [B, 1, q, k]."""
  log_maps = jax.nn.log_softmax(scores.astype(reduce.common_dtype(scores.dtype, jnp.float32)))
  attended = (log_maps > -jnp.inf).any(1, keepdims=True)
  log_sums = jax.nn.logsumexp(jnp.where(attended, log_maps, 0), 1, keepdims=True)
  return jnp.where(attended, log_sums - jnp.log(scores.shape[1]), -jnp.inf)
