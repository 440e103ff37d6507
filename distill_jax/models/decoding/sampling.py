"""Generates one sequence for each row of a batch, greedily or by sampling."""

import math
from typing import NamedTuple

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
from distill_jax.models.generated_rows import row_keys
from distill_jax.types import Batch, Sample, Tree, Variables


def sampler(steps: DecoderSteps, *, max_length: int, temperature: float = 0.0) -> Sample:
  """Returns a function that generates a sequence for each row, one token after another.

  It is pure, for use under jit, where the loop ends with the longest sequence of the batch. A row's
  sequence does not depend on the other rows or on the devices: its random numbers are those of the
  key and of the row's 'id' (without one, of its number in the batch). Rows that 'where' leaves out
  are empty.

  Args:
    steps: the network.
    max_length: maximum number L of tokens of a sequence; one that has not ended by then stays as it
      is, and its length is L.
    temperature: of the samples, >= 0; 0 takes the most probable token, the first of equal ones, and
      needs no key (None).

  Returns:
    `(Variables, key, batch) -> (tokens int32 [B, L], lengths int32 [B])`, a
    `types.Sample`. `key` is a typed PRNG key, or one for each row [B].

  Raises:
    ValueError: `max_length` is below 1 or above the network's, the end token is not in its
      vocabulary, or a temperature below 0; when called, a temperature without a key, or logits of
      another number of tokens.

  >>> from distill_jax.types import Variables
  >>> logits = jnp.array([[-9.0, 0.0, 1.0], [-9.0, 2.0, 3.0], [5.0, 1.0, 0.0]])  # by last token
  >>> steps = DecoderSteps(
  ...   start=lambda variables, batch, length: jnp.zeros((len(batch["source"]), 0)),
  ...   step=lambda variables, tokens, position, cache: (variables.params[tokens], cache),
  ...   start_token=1, end_token=0, vocab_size=3, max_length=8)
  >>> sample = jax.jit(sampler(steps, max_length=3, temperature=1.0))
  >>> batch = {"id": jnp.arange(2), "source": jnp.zeros((2, 1))}
  >>> tokens, lengths = sample(Variables(logits, {}), jax.random.key(1), batch)
  >>> tokens.shape, bool((lengths <= 3).all())
  ((2, 3), True)
  """
  check_steps(steps, max_length)
  if not 0 <= temperature < math.inf:
    raise ValueError(f"temperature: expected a number >= 0, got {temperature}")

  def sample(
    variables: Variables, key: jax.Array | None, batch: Batch
  ) -> tuple[jax.Array, jax.Array]:
    keys = _row_keys(key, batch) if temperature > 0 else None

    def unfinished(loop: _Loop) -> jax.Array:
      return (loop.position < max_length) & ~loop.done.all()

    def add_token(loop: _Loop) -> _Loop:
      z, cache = next_logits(steps, variables, loop.last, loop.position, loop.cache)
      new = z.argmax(-1) if keys is None else _draw(keys, loop.position, z / temperature)
      new = jnp.where(loop.done, steps.end_token, new.astype(jnp.int32))
      done = loop.done | (new == steps.end_token)
      return _Loop(
        position=loop.position + 1,
        last=new,
        tokens=loop.tokens.at[:, loop.position].set(new),
        lengths=loop.lengths + (~done).astype(jnp.int32),
        done=done,
        cache=cache,
      )

    rows = count_rows(batch)
    cache = steps.start(variables, batch, max_length)
    state = (
      jnp.full(rows, steps.start_token, jnp.int32),
      jnp.full((rows, max_length), steps.end_token, jnp.int32),
      jnp.zeros(rows, jnp.int32),
      ~valid_rows(batch),
      cache,
    )
    loop = _Loop(jnp.zeros((), jnp.int32), *vary_like(state, (variables, batch, keys)))
    loop = jax.lax.while_loop(unfinished, add_token, loop)
    return loop.tokens, loop.lengths

  return sample


class _Loop(NamedTuple):
  """State of the loop: the sequences so far, and the last token of each, at `position`."""

  position: jax.Array
  last: jax.Array
  tokens: jax.Array
  lengths: jax.Array
  done: jax.Array
  cache: Tree


def _row_keys(key: jax.Array | None, batch: Batch) -> jax.Array:
  if key is None:
    raise ValueError("key: expected a PRNG key for samples, got None; temperature=0 needs none")
  if key.ndim == 1 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return key
  ids = batch.get("id", jnp.arange(count_rows(batch)))
  return row_keys(key, ids)


def _draw(keys: jax.Array, position: jax.Array, z: jax.Array) -> jax.Array:
  step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
  return jax.vmap(jax.random.categorical)(step_keys, z)
