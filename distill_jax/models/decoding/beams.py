"""Finds the most probable sequences of each row of a batch, by beam search."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.models.decoding.steps import (
  DecoderSteps,
  check_steps,
  count_rows,
  next_logits,
  valid_rows,
  vary_like,
)
from distill_jax.types import Batch, Sample, Tree, Variables


class Beams(NamedTuple):
  """The best N sequences of each row, best first.

  Example in `beam_search`.

  Attributes:
    tokens: int32 [B, N, L], without the start token; from `lengths` on the end token, or the
      blank of CTC.
    lengths: int32 [B, N], numbers of tokens before the end token; L: the sequence has not ended,
      or has L tokens in CTC.
    scores: float32 [B, N]; -inf where there is no such sequence, which has length 0.
  """

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array


def beam_search(
  steps: DecoderSteps, *, max_length: int, beam_size: int, length_penalty: float = 1.0
) -> Callable[[Variables, Batch], Beams]:
  """Returns a function that finds the best sequences of each row.

  A sequence's score is the sum of its tokens' log-probabilities, divided by the number of tokens to
  the power of `length_penalty`. The end token counts in both. At each position a row keeps the
  `beam_size` most probable sequences that go on; those that end are set aside, if they are among
  the `beam_size` most probable ones of that position. A row is done when it has `beam_size` ended
  sequences, and the best of those that go on has no better score, at its length so far, than the
  worst of them; at `max_length` sequences that have not ended count as well. All this is what
  `generate(num_beams=beam_size)` of Hugging Face's transformers does, with `early_stopping=False`.

  The function is pure, for use under jit; the loop ends when all rows are done. A row's sequences
  do not depend on the other rows or on the devices. Of equal scores, the sequence that ended first
  comes first, then that of the better beam, then the lower token. Rows that 'where' leaves out
  have no sequences.

  Args:
    steps: the network. Of its cache, what `step` returns as it came (the same array, such as keys
      and values of the source) is not moved from beam to beam.
    max_length: maximum number L of tokens of a sequence.
    beam_size: number N of sequences, >= 1; it may be above the size of the vocabulary.
    length_penalty: exponent of the length; above 0 prefers longer sequences, 0 compares sums.

  Returns:
    `(Variables, batch) -> Beams`.

  Raises:
    ValueError: `max_length` is below 1 or above the network's, the end token is not in its
      vocabulary, `beam_size` is below 1, or `length_penalty` is not finite; when called, logits of
      another number of tokens.

  >>> from distill_jax.types import Variables
  >>> table = jnp.log(jnp.array([[1.0, 0, 0], [0.1, 0.5, 0.4], [0.9, 0.1, 0.0]]))  # by last token
  >>> steps = DecoderSteps(
  ...   start=lambda variables, batch, length: jnp.zeros((len(batch["source"]), 0)),
  ...   step=lambda variables, tokens, position, cache: (variables.params[tokens], cache),
  ...   start_token=1, end_token=0, vocab_size=3, max_length=8)
  >>> search = jax.jit(beam_search(steps, max_length=2, beam_size=2, length_penalty=0.0))
  >>> beams = search(Variables(table, {}), {"source": jnp.zeros((1, 1))})
  >>> beams.tokens[0].tolist(), beams.lengths[0].tolist()  # 2 and the end; 1 1, which has not ended
  ([[2, 0], [1, 1]], [1, 2])
  >>> [f"{probability:.2f}" for probability in jnp.exp(beams.scores[0])]
  ['0.36', '0.25']
  """
  check_steps(steps, max_length)
  if beam_size < 1:
    raise ValueError(f"beam_size: expected at least 1 sequence, got {beam_size}")
  if not math.isfinite(length_penalty):
    raise ValueError(f"length_penalty: expected a finite number, got {length_penalty}")

  def search(variables: Variables, batch: Batch) -> Beams:
    def unfinished(loop: _Loop) -> jax.Array:
      return (loop.position < max_length) & ~loop.done.all()

    def extend(loop: _Loop) -> _Loop:
      candidates, cache = _candidates(steps, variables, loop)
      divisor = (loop.position + 1).astype(jnp.float32) ** length_penalty
      ends = (candidates.last == steps.end_token) | (loop.position + 1 == max_length)
      live = _first(candidates._replace(sums=jnp.where(ends, -jnp.inf, candidates.sums)), beam_size)
      ended = _add_ended(loop, candidates, ends, divisor, steps.end_token)
      return _Loop(
        position=loop.position + 1,
        live=live,
        ended=ended,
        done=loop.done | (live.sums[:, 0] / divisor <= ended.scores[:, -1]),
        cache=_move(cache, loop.cache, live.parents),
      )

    start = _start(steps, variables, batch, max_length, beam_size)
    ended = jax.lax.while_loop(unfinished, extend, start).ended
    missing = jnp.isneginf(ended.scores)
    return Beams(
      tokens=jnp.where(missing[:, :, None], steps.end_token, ended.tokens),
      lengths=jnp.where(missing, 0, ended.lengths),
      scores=ended.scores,
    )

  return search


def beam_sampler(
  steps: DecoderSteps, *, max_length: int, beam_size: int, length_penalty: float = 1.0
) -> Sample:
  """Returns a function that generates the best sequence of a beam search for each row.

  Args:
    steps, max_length, beam_size, length_penalty: as in `beam_search`.

  Returns:
    `(Variables, key, batch) -> (tokens int32 [B, L], lengths int32 [B])`, a `types.Sample`; it
    reads no key.

  Raises:
    ValueError: as in `beam_search`.

  >>> from distill_jax.types import Variables
  >>> table = jnp.log(jnp.array([[1.0, 0, 0], [0.1, 0.5, 0.4], [0.9, 0.1, 0.0]]))  # by last token
  >>> steps = DecoderSteps(
  ...   start=lambda variables, batch, length: jnp.zeros((len(batch["source"]), 0)),
  ...   step=lambda variables, tokens, position, cache: (variables.params[tokens], cache),
  ...   start_token=1, end_token=0, vocab_size=3, max_length=8)
  >>> sample = beam_sampler(steps, max_length=2, beam_size=2, length_penalty=0.0)
  >>> tokens, lengths = jax.jit(sample)(Variables(table, {}), None, {"source": jnp.zeros((1, 1))})
  >>> tokens.tolist(), lengths.tolist()  # 2, then the end
  ([[2, 0]], [1])
  """
  search = beam_search(
    steps, max_length=max_length, beam_size=beam_size, length_penalty=length_penalty
  )

  def sample(variables: Variables, key: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    del key
    beams = search(variables, batch)
    return beams.tokens[:, 0], beams.lengths[:, 0]

  return sample


class _Sequences(NamedTuple):
  """Sequences that go on, or may: K of each row, best first.

  Attributes:
    tokens: int32 [B, K, L].
    last: int32 [B, K], the last token of each.
    parents: int32 [B, K], the beams that they continue.
    sums: float32 [B, K], sums of log-probabilities; -inf where there is none.
  """

  tokens: jax.Array
  last: jax.Array
  parents: jax.Array
  sums: jax.Array


class _Loop(NamedTuple):
  """State of the search; the cache has the rows of all beams, [B * N, ...]."""

  position: jax.Array
  live: _Sequences
  ended: Beams
  done: jax.Array
  cache: Tree


def _start(steps, variables: Variables, batch: Batch, max_length: int, beam_size: int) -> _Loop:
  rows = count_rows(batch)
  shape = (rows, beam_size)
  no_scores = jnp.full(shape, -jnp.inf)
  no_tokens = jnp.full((*shape, max_length), steps.end_token, jnp.int32)
  zeros = jnp.zeros(shape, jnp.int32)
  start_tokens = jnp.full(shape, steps.start_token, jnp.int32)

  def repeat(x):
    return jnp.repeat(x, beam_size, axis=0)

  state = (
    # One beam: N equal ones would stay equal.
    _Sequences(no_tokens, start_tokens, zeros, no_scores.at[:, 0].set(0)),
    Beams(no_tokens, zeros, no_scores),
    ~valid_rows(batch),
    jax.tree.map(repeat, steps.start(variables, batch, max_length)),
  )
  return _Loop(jnp.zeros((), jnp.int32), *vary_like(state, (variables, batch)))


def _candidates(steps: DecoderSteps, variables: Variables, loop: _Loop) -> tuple[_Sequences, Tree]:
  """Returns the 2 N most probable continuations of each row: N of them end at most."""
  rows, beam_size = loop.live.last.shape
  last = loop.live.last.reshape(-1)
  logits, cache = next_logits(steps, variables, last, loop.position, loop.cache)
  # The softmax of logits that are all -inf is NaN.
  log_probs = jnp.where(jnp.isneginf(logits), -jnp.inf, jax.nn.log_softmax(logits))
  log_probs = log_probs.reshape(rows, beam_size, -1)
  sums = loop.live.sums[:, :, None] + log_probs
  sums, index = jax.lax.top_k(sums.reshape(rows, -1), 2 * beam_size)
  parents, new = jnp.divmod(index.astype(jnp.int32), steps.vocab_size)
  tokens = _take(loop.live.tokens, parents).at[:, :, loop.position].set(new)
  return _Sequences(tokens, new, parents, sums), cache


def _first(sequences: _Sequences, beam_size: int) -> _Sequences:
  order = jax.lax.top_k(sequences.sums, beam_size)[1]
  return _Sequences(*(_take(x, order) for x in sequences))


def _add_ended(
  loop: _Loop, candidates: _Sequences, ends: jax.Array, divisor: jax.Array, end_token: int
) -> Beams:
  """Returns the best N of the ended sequences and of the candidates that end."""
  beam_size = loop.live.last.shape[1]
  # The candidates after the first N are there for the beams that go on only, as in transformers.
  counts = ends & (jnp.arange(ends.shape[1]) < beam_size) & ~loop.done[:, None]
  scores = jnp.where(counts, candidates.sums / divisor, -jnp.inf)
  lengths = loop.position + (candidates.last != end_token).astype(jnp.int32)
  new = Beams(candidates.tokens, lengths, scores)
  both = [jnp.concatenate(pair, 1) for pair in zip(loop.ended, new)]
  order = jax.lax.top_k(both[-1], beam_size)[1]
  return Beams(*(_take(x, order) for x in both))


def _move(cache: Tree, old_cache: Tree, parents: jax.Array) -> Tree:
  """Returns the cache with the rows of the beams' parents.

  What the step returned as it came is equal for all beams of a row: they began with it.
  """

  def move(x, old):
    if x is old:
      return x
    return _take(x.reshape(*parents.shape, *x.shape[1:]), parents).reshape(x.shape)

  return jax.tree.map(move, cache, old_cache)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns x [B, K, ...] at `index` [B, N] of the second axis."""
  return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)
