"""Decodes the frames of CTC networks (Graves et al. 2006): greedily, or by prefix beam search."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.errors import check_integer
from distill_jax.models.decoding.beams import Beams
from distill_jax.models.decoding.ctc_prefixes import checked_lengths, ctc_beam_search
from distill_jax.models.decoding.steps import valid_rows
from distill_jax.types import Batch, Model, Sample, Variables


def ctc_greedy(
  logits: jax.Array, lengths: jax.Array | None = None, *, blank: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens of the most probable path: equal neighbors count once, blanks are left out.

  A path is not a sequence: the most probable sequence may have other tokens (`ctc_beam_search`).

  Args:
    logits: [B, T, V]; of equal ones the lowest class wins.
    lengths: int [B], numbers of frames; more than T count as T. None: all frames.
    blank: class of no token.

  Returns:
    Tokens int32 [B, T], the blank from their number on, and their numbers int32 [B].

  Raises:
    ValueError: logits that are not [B, T, V], lengths that are not int [B], or a blank that is no
      class.

  >>> path = jnp.array([[1, 1, 0, 1, 2]])  # 0 is the blank
  >>> tokens, lengths = ctc_greedy(jax.nn.one_hot(path, 3))
  >>> tokens.tolist(), lengths.tolist()
  ([[1, 1, 2, 0, 0]], [3])
  """
  lengths = checked_lengths(logits, lengths, blank)
  rows, frames, _ = logits.shape
  path = logits.argmax(-1).astype(jnp.int32)
  previous = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
  new = (path != blank) & (path != previous)
  new &= jnp.arange(frames) < lengths[:, None]
  # The index of a frame without a token lies behind the last one, where nothing is written.
  index = jnp.where(new, new.cumsum(1) - 1, frames)
  tokens = jnp.full((rows, frames), blank, jnp.int32)
  tokens = tokens.at[jnp.arange(rows)[:, None], index].set(path, mode="drop")
  return tokens, new.sum(1, dtype=jnp.int32)


def ctc_sampler(model: Model, *, blank: int = 0, beam_size: int | None = None) -> Sample:
  """Returns a function that decodes each row of a batch: a `Model.sample` of a CTC network.

      model = model._replace(sample=ctc_sampler(model, beam_size=8))

  Args:
    model: its outputs are 'logits' [B, T, V] and 'lengths' int [B], numbers of frames (without
      it: all frames).
    blank: class of no token.
    beam_size: number of prefixes of `ctc_beam_search`; None: `ctc_greedy`.

  Returns:
    `(Variables, key, batch) -> (tokens int32 [B, T], lengths int32 [B])`, for use under jit; it
    reads no key. Rows that 'where' leaves out are empty.

  Raises:
    ValueError: a beam of less than one prefix; when called, as `ctc_greedy`.

  >>> from distill_jax.models import from_apply
  >>> model = from_apply(None, lambda w, x: w * jax.nn.one_hot(x, 3), variables=9.0, inputs="x")
  >>> sample = ctc_sampler(model, beam_size=4)
  >>> tokens, lengths = sample(model.variables, None, {"x": jnp.array([[1, 1, 0, 1, 2]])})
  >>> tokens[0, : lengths[0]].tolist()
  [1, 1, 2]
  """
  nbest = None if beam_size is None else ctc_nbest(model, beam_size=beam_size, blank=blank)

  def sample(variables: Variables, key: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    del key
    if nbest is None:
      return ctc_greedy(*_frames(model, variables, batch), blank=blank)
    beams = nbest(variables, batch)
    return beams.tokens[:, 0], beams.lengths[:, 0]

  return sample


def ctc_nbest(
  model: Model, *, beam_size: int, blank: int = 0
) -> Callable[[Variables, Batch], Beams]:
  """Returns a function that finds the best sequences of each row by `ctc_beam_search`.

  `cache.seq_kd` takes it under `jax.jit`, with `start_token=None` and `end_token=None`.

  Args:
    model, blank: as in `ctc_sampler`.
    beam_size: number of prefixes, and of sequences.

  Returns:
    `(Variables, batch) -> Beams`; rows that 'where' leaves out are empty.

  Raises:
    ValueError: as `ctc_sampler`.

  >>> from distill_jax.models import from_apply
  >>> model = from_apply(None, lambda w, x: w * jnp.log(x), variables=1.0, inputs="x")
  >>> batch = {"x": jnp.array([[[0.6, 0.4], [0.6, 0.4]]])}  # the most probable path is blank
  >>> beams = ctc_nbest(model, beam_size=2)(model.variables, batch)
  >>> [tokens[:length].tolist() for tokens, length in zip(beams.tokens[0], beams.lengths[0])]
  [[1], []]
  """
  check_integer("beam_size", beam_size, 1)

  def nbest(variables: Variables, batch: Batch) -> Beams:
    logits, lengths = _frames(model, variables, batch)
    return ctc_beam_search(logits, lengths, blank=blank, beam_size=beam_size)

  return nbest


def _frames(model: Model, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns logits [B, T, V] and numbers of frames [B], 0 of rows that are padding."""
  outputs, _ = model.apply(*variables, batch, train=False, key=None)
  if "logits" not in outputs:
    raise ValueError(
      f"model: expected the output 'logits' [B, T, V], got {sorted(outputs)}: a CTC network "
      "returns one row of logits for each frame"
    )
  logits = outputs["logits"]
  every = jnp.full(logits.shape[0], logits.shape[1])
  lengths = outputs.get("lengths", batch.get("lengths", every))
  return logits, jnp.where(valid_rows(batch), lengths, 0)
