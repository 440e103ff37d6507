"""Reads a detector's confidence at each location from its class logits."""

import jax
import jax.numpy as jnp

from distill_jax import reduce


def confidence(logits: jax.Array, *, background: bool) -> jax.Array:
  """Returns the largest probability of a class at each location, [B, A] of logits [B, A, C].

  Args:
    logits: of the classes; with `background` a softmax over them, else sigmoids.
    background: the last class is the background, whose probability does not count.
  """
  logits = logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))
  if background:
    return jax.nn.softmax(logits)[..., :-1].max(-1)
  return jax.nn.sigmoid(logits.max(-1))


def check_scores(
  name: str, shape: tuple[int, ...], locations: tuple[int, ...], background: bool
) -> None:
  """Checks that class logits are those of so many locations, [B, A, C]."""
  least = 2 if background else 1
  if len(shape) != 3 or shape[:2] != tuple(locations) or shape[2] < least:
    classes = "C" if least == 1 else "C + 1"
    raise ValueError(
      f"{name}: expected class logits [{', '.join(map(str, locations))}, {classes}] of the "
      f"teacher, got {tuple(shape)}: name those of the same locations in scores="
    )
