"""Applies the head of a language model that outputs hidden states."""

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.types import Model, Outputs


def head_logits(outputs: Outputs) -> jax.Array:
  """Returns `hidden @ kernel + bias`, capped: float32 [..., vocab_size].

  Use it for a few tokens: the `losses.linear_*` take hidden states and head, and never make all
  logits.

  Args:
    outputs: 'hidden' [..., embed_dim] and 'head' = (kernel [embed_dim, vocab_size], bias or None,
      softcap or None).
  """
  kernel, bias, softcap = outputs["head"]
  hidden = outputs["hidden"]
  dtype = reduce.common_dtype(hidden.dtype, kernel.dtype)
  z = jnp.matmul(hidden.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
  if bias is not None:
    z = z + bias.reshape((1,) * (z.ndim - 1) + bias.shape).astype(z.dtype)
  return z if softcap is None else softcap * jnp.tanh(z / softcap)


def with_vocab_size(model: Model, vocab_size: int) -> Model:
  """Returns the model with probability 0 for all tokens from `vocab_size` on.

  Use it for a released model whose head is wider than its tokenizer.

  Args:
    model: a language model that outputs 'hidden' and 'head'.
    vocab_size: number of tokens that the tokenizer has.

  Raises (in apply):
    ValueError: the head has fewer tokens, or caps its logits, which would make a bias of -inf
      finite.
  """

  def apply(params, state, batch, *, train, key):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    kernel, bias, softcap = outputs["head"]
    if not 1 <= vocab_size <= kernel.shape[1]:
      raise ValueError(
        f"vocab_size: expected 1 to {kernel.shape[1]}, the columns of the head, got {vocab_size}"
      )
    if softcap is not None:
      raise ValueError(f"softcap: expected a head without one, got {softcap}: a cap undoes -inf")
    if bias is None:
      bias = jnp.zeros(kernel.shape[1], kernel.dtype)
    bias = jnp.where(jnp.arange(len(bias)) < vocab_size, bias, -jnp.inf)
    return {**outputs, "head": (kernel, bias, None)}, state

  return model._replace(apply=apply)


def with_logits(model: Model) -> Model:
  """Returns the model with 'logits' [B, L, vocab_size] in place of hidden states and a head; other
  outputs stay.

  A model that has logits, or no head, stays as it is.
  """

  def apply(params, state, batch, *, train, key):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    if "logits" in outputs or "head" not in outputs:
      return outputs, state
    others = {name: x for name, x in outputs.items() if name not in ("hidden", "head")}
    return {**others, "logits": head_logits(outputs)}, state

  return model._replace(apply=apply)
