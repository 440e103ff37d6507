"""Finds the most probable sequences of CTC frames by prefix beam search, under jit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.errors import check_integer
from distill_jax.models.decoding.beams import Beams
from distill_jax.models.decoding.steps import vary_like


def ctc_beam_search(
  logits: jax.Array, lengths: jax.Array | None = None, *, beam_size: int, blank: int = 0
) -> Beams:
  """Returns the most probable sequences of each row, each over all of its paths.

  A sequence's score is its log-probability: the sum of the probabilities of all paths that collapse
  to it, as far as its prefixes stayed among the `beam_size` most probable ones at every frame. With
  as many prefixes as there are, it is exact. Of equal scores the earlier prefix comes first.
  Source: Hannun et al. 2014, algorithm 1, without a language model.

  It compiles once for a shape, and takes O(beam_size * (V + beam_size * T)) of memory for a row.

  Args:
    logits: [B, T, V], or log-probabilities; float32 or wider inside.
    lengths: int [B], numbers of frames; more than T count as T. None: all frames. A row of none
      has the empty sequence, of score 0.
    beam_size: number N of prefixes.
    blank: class of no token.

  Returns:
    `Beams`, best first: tokens [B, N, T], the blank from their lengths on. Where there are fewer
    than N sequences, the score is -inf and the length 0.

  Raises:
    ValueError: logits that are not [B, T, V], a blank that is no class, or a beam of less than one.

  >>> probabilities = jnp.array([[[0.6, 0.4], [0.6, 0.4]]])  # the most probable path is blank
  >>> beams = ctc_beam_search(jnp.log(probabilities), beam_size=2)
  >>> beams.tokens[0].tolist(), beams.lengths[0].tolist()
  ([[1, 0], [0, 0]], [1, 0])
  >>> [f"{probability:.2f}" for probability in jnp.exp(beams.scores[0])]
  ['0.64', '0.36']
  """
  check_integer("beam_size", beam_size, 1)
  lengths = checked_lengths(logits, lengths, blank)
  rows, frames, _ = logits.shape
  log_probs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
  start = _start(rows, beam_size, frames, log_probs.dtype, blank)

  def step(prefixes: _Prefixes, frame) -> tuple[_Prefixes, None]:
    number, frame_log_probs = frame
    extended = jax.vmap(_extend, (0, 0, None))(prefixes, frame_log_probs, blank)
    inside = number < lengths

    def choose(new, old):
      return jnp.where(inside.reshape(rows, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, extended, prefixes), None

  by_frame = jnp.arange(frames), jnp.moveaxis(log_probs, 1, 0)
  found, _ = jax.lax.scan(step, vary_like(start, (logits, lengths)), by_frame)
  return Beams(found.tokens, found.lengths, found.totals)


def checked_lengths(
  logits: jax.Array, lengths: jax.typing.ArrayLike | None, blank: int
) -> jax.Array:
  """Returns the numbers of frames, int [B], after a check of all arguments.

  Raises:
    ValueError: logits that are not [B, T, V], lengths that are not int [B], or a blank that is no
      class.
  """
  if logits.ndim != 3:
    raise ValueError(
      f"logits: expected [B, T, V], got {list(logits.shape)}: one row for each frame"
    )
  rows, frames, classes = logits.shape
  check_integer("blank", blank, 0, classes - 1)
  lengths = jnp.full(rows, frames) if lengths is None else jnp.asarray(lengths)
  if lengths.shape != (rows,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(
      f"lengths: expected integers [{rows}], one number of frames for each row, got "
      f"{lengths.dtype} {list(lengths.shape)}"
    )
  return lengths


class _Prefixes(NamedTuple):
  """N different prefixes, best first; of one row [N, ...], or of a batch [B, N, ...].

  Attributes:
    tokens: int32 [N, T], the blank from `lengths` on.
    lengths: int32 [N].
    last: int32 [N], the last token; the blank of the empty prefix.
    blank_sums: [N], log-probability of the paths that end with the blank.
    token_sums: [N], that of the paths that end with the last token.
  """

  tokens: jax.Array
  lengths: jax.Array
  last: jax.Array
  blank_sums: jax.Array
  token_sums: jax.Array

  @property
  def totals(self) -> jax.Array:
    return jnp.logaddexp(self.blank_sums, self.token_sums)


def _start(rows: int, beam_size: int, frames: int, dtype, blank: int) -> _Prefixes:
  """Returns the empty prefix, and places for the others, whose probability is 0."""
  none = jnp.full((rows, beam_size), -jnp.inf, dtype)
  return _Prefixes(
    tokens=jnp.full((rows, beam_size, frames), blank, jnp.int32),
    lengths=jnp.zeros((rows, beam_size), jnp.int32),
    last=jnp.full((rows, beam_size), blank, jnp.int32),
    blank_sums=none.at[:, 0].set(0),
    token_sums=none,
  )


def _extend(prefixes: _Prefixes, log_probs: jax.Array, blank: int) -> _Prefixes:
  """Returns the N most probable prefixes of a row after one more frame.

  Args:
    prefixes: those before it.
    log_probs: of the frame, [V].
    blank: class of no token.
  """
  tokens, lengths, last, blank_sums, token_sums = prefixes
  size = len(last)
  classes = jnp.arange(len(log_probs))
  # A token that repeats the last one is a new one only after a blank.
  before = jnp.where(classes == last[:, None], blank_sums[:, None], prefixes.totals[:, None])
  new = jnp.where(classes == blank, -jnp.inf, before + log_probs)  # [N, V]
  # The prefixes that another one becomes by its new token get that one's paths.
  at_last = jnp.arange(tokens.shape[1]) == lengths[:, None] - 1
  shortened = jnp.where(at_last, blank, tokens)
  becomes = (tokens[:, None] == shortened).all(-1) & (lengths > 0)  # [N, N], shorter by longer
  joining = jnp.where(becomes, new[:, last], -jnp.inf)
  is_joining = jnp.zeros(new.shape, bool).at[:, last].max(becomes)
  stays_blank = prefixes.totals + log_probs[blank]
  stays_token = jnp.logaddexp(token_sums + log_probs[last], jax.nn.logsumexp(joining, 0))
  stays = jnp.logaddexp(stays_blank, stays_token)
  scores = jnp.concatenate([stays, jnp.where(is_joining, -jnp.inf, new).ravel()])
  best, index = jax.lax.top_k(scores, size)
  is_new = index >= size
  parents, token = jnp.divmod(index - size, len(log_probs))
  parents = jnp.where(is_new, parents, index)
  token = token.astype(jnp.int32)
  at_end = is_new[:, None] & (jnp.arange(tokens.shape[1]) == lengths[parents, None])
  # A prefix of probability 0 becomes an empty place again: it may equal another one.
  exists = jnp.isfinite(best)
  chosen_tokens = jnp.where(at_end, token[:, None], tokens[parents])
  return _Prefixes(
    tokens=jnp.where(exists[:, None], chosen_tokens, blank),
    lengths=jnp.where(exists, lengths[parents] + is_new, 0),
    last=jnp.where(exists, jnp.where(is_new, token, last[parents]), blank),
    blank_sums=jnp.where(is_new, -jnp.inf, stays_blank[parents]),
    token_sums=jnp.where(is_new, best, stays_token[parents]),
  )
