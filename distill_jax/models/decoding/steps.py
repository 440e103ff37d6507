"""Defines what decoding needs to know of a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import compat
from distill_jax.types import Batch, Tree, Variables


class DecoderSteps(NamedTuple):
  """A network that generates a sequence token by token, as pure functions.

  Attributes:
    start: `(Variables, batch, length) -> cache`, a tree of arrays, rows first. The encoder runs
      here, once. `length` is the number of decoder positions that will be needed, an int.
    step: `(Variables, tokens int32 [B], position int32 scalar, cache) -> (logits [B, V], cache)`:
      the logits of the token after `tokens`, which are those at `position`; at position 0 they are
      the start token. Rows do not depend on one another.
    start_token: the decoder's first input; it may lie outside of the vocabulary that is generated.
    end_token: token that ends a sequence, in [0, V).
    vocab_size: number V of tokens that have a logit.
    max_length: the network's largest number of decoder positions.

  A network whose next token depends on the previous one only:

  >>> from distill_jax.models.decoding import sampler
  >>> from distill_jax.types import Variables
  >>> logits = jnp.array([[-9.0, 0.0, 1.0], [-9.0, 2.0, 3.0], [5.0, 1.0, 0.0]])
  >>> def start(variables, batch, length):
  ...   return jnp.zeros((len(batch["source"]), 0))  # no cache but the number of rows
  >>> def step(variables, tokens, position, cache):
  ...   return variables.params[tokens], cache
  >>> steps = DecoderSteps(start, step, start_token=1, end_token=0, vocab_size=3, max_length=8)
  >>> tokens, lengths = sampler(steps, max_length=4)(
  ...   Variables(logits, {}), jax.random.key(0), {"source": jnp.zeros((1, 1))})
  >>> tokens.tolist(), lengths.tolist()
  ([[2, 0, 0, 0]], [1])
  """

  start: Callable[[Variables, Batch, int], Tree]
  step: Callable[[Variables, jax.Array, jax.Array, Tree], tuple[jax.Array, Tree]]
  start_token: int
  end_token: int
  vocab_size: int
  max_length: int


def check_steps(steps: DecoderSteps, max_length: int) -> None:
  """Checks the tokens of a network, and the length to decode.

  Raises:
    ValueError: there are less than two tokens, the end token is none of them, or `max_length` is
      below 1 or above the network's.
  """
  if steps.vocab_size < 2:
    raise ValueError(f"vocab_size: expected at least 2 tokens, got {steps.vocab_size}")
  if not 0 <= steps.end_token < steps.vocab_size:
    raise ValueError(
      f"end_token: expected a token in [0, {steps.vocab_size}), got {steps.end_token}: give "
      "DecoderSteps the token that ends a target, or the vocab_size that counts it"
    )
  if steps.start_token < 0:
    raise ValueError(f"start_token: expected a token >= 0, got {steps.start_token}")
  if not 1 <= max_length <= steps.max_length:
    raise ValueError(
      f"max_length: expected 1 to {steps.max_length}, the network's number of positions, got "
      f"{max_length}"
    )


def count_rows(batch: Batch) -> int:
  """Returns the number of rows of a batch."""
  return len(next(iter(batch.values())))


def valid_rows(batch: Batch) -> jax.Array:
  """Returns which rows of a batch are no padding, bool [B]."""
  # Of integers, ~ is never zero: all rows would be done before the first token.
  return jnp.asarray(batch.get("where", jnp.ones(count_rows(batch), bool))).astype(bool)


def next_logits(
  steps: DecoderSteps, variables: Variables, tokens: jax.Array, position: jax.Array, cache: Tree
) -> tuple[jax.Array, Tree]:
  """Returns `steps.step(...)` with its logits as float32.

  Raises:
    ValueError: the logits are not [B, vocab_size].
  """
  logits, cache = steps.step(variables, tokens, position, cache)
  if logits.shape != (len(tokens), steps.vocab_size):
    raise ValueError(
      f"vocab_size: expected logits {(len(tokens), steps.vocab_size)} of DecoderSteps.step, got "
      f"{logits.shape}: give DecoderSteps the number of tokens that have a logit"
    )
  return logits.astype(jnp.float32), cache


def vary_like(tree: Tree, like: Any) -> Tree:
  """Marks a tree as different along the mapped axes of another one, under `shard_map`.

  The state of a loop needs it: its values depend on the rows of the device from the first pass on.
  """
  names = set().union(*map(compat.varying_axes, jax.tree.leaves(like)))

  def leaf(x):
    missing = tuple(sorted(names - compat.varying_axes(x)))
    return compat.pcast_varying(x, missing) if missing else x

  return jax.tree.map(leaf, tree)
