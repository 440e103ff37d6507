"""A term over the patch tokens of vision transformers, [B, N, C]."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.errors import check_integer
from distill_jax.objectives.hyperparameters import (
  Number,
  at_step,
  check_at_steps,
  check_number,
)
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.loss_checks import check_options
from distill_jax.objectives.parts import align, align_init, stack, stack_init
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def vitkd(
  student: tuple[str, ...],
  teacher: tuple[str, ...],
  *,
  mask_fraction: Number = 0.5,
  prefix_tokens: int = 0,
  **hyperparameters: Any,
) -> Term:
  """ViTKD: `losses.vitkd`, shallow layers by linear maps and the last one by a generator.

  The generator is two 3x3 convolutions over the grid of patches with a ReLU between; a learned
  token replaces the masked ones. Each step samples the mask of each row again; under an axis name
  every device samples the same ones for its rows. Weight 1 (Yang et al. 2022, arXiv:2209.02432):
  the weights are `alpha` and `beta`.

  Args:
    student, teacher: as many names of tokens [B, N, C], from shallow to deep: layers 1 and 2 and
      the last one in the paper.
    mask_fraction: fraction in (0, 1) of the patches that is masked, lambda in the paper, or a
      schedule of the step.
    prefix_tokens: number of tokens before the patches, such as a class token; they are left out.
    **hyperparameters: `alpha`, `beta` of the loss, each a number or a schedule of the step.

  Raises:
    ValueError: at once, fewer than two names or different numbers of them, mask_fraction or
      prefix_tokens out of range, or a hyper-parameter that the loss does not have; in init,
      outputs that are not tokens of as many rows and as long, shallow layers of other widths, or
      patches that are no square, or a hyper-parameter that the loss rejects.

  >>> from distill_jax import objectives
  >>> names = ("block1", "block4")
  >>> term = objectives.vitkd(names, names, prefix_tokens=1)
  >>> student = {name: np.zeros((2, 5, 4)) for name in names}  # a class token, 2 x 2 patches
  >>> teacher = {name: np.zeros((2, 5, 8)) for name in names}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> sorted(params), params["mask_token"].shape
  (['align', 'generator', 'mask_token'], (8,))
  """
  is_name = isinstance(student, str) or isinstance(teacher, str)
  if is_name or len(student) != len(teacher) or len(student) < 2:
    raise ValueError(
      "student, teacher: expected tuples of as many names, two or more, got "
      f"{student!r} and {teacher!r}"
    )

  def check():
    check_number("mask_fraction", mask_fraction, low=0, high=1, open_low=True, open_high=True)

  check()
  check_integer("prefix_tokens", prefix_tokens, 0)
  schedules = check_options(losses.vitkd, {"masked"}, hyperparameters)

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    for s_tokens, t_tokens in zip(s, t):
      check_pair(s_tokens, t_tokens, ranks=(3,))
    _check_tokens(t, prefix_tokens)
    rows, tokens, channels = t[-1].shape
    shallow = jax.ShapeDtypeStruct((rows, 1, tokens, channels), t[-1].dtype)
    sides = shallow, jax.ShapeDtypeStruct(t[-1].shape, t[-1].dtype)
    masked = jax.ShapeDtypeStruct((rows, tokens), jnp.bool_)
    check_at_steps(losses.vitkd, hyperparameters, schedules, sides, sides, masked)
    keys = jax.random.split(key, len(s) + 1)
    width = t[-1].shape[-1]
    params = {
      "align": {str(i): align_init(keys[i], *pair) for i, pair in enumerate(zip(s, t))},
      "mask_token": jnp.zeros(width, jnp.float32),
      "generator": stack_init(keys[-1], (width, width, width), window=(3, 3)),
    }
    return Variables(params, {})

  def apply(params, state, s, t, *, step, key):
    options = {name: at_step(value, step) for name, value in hyperparameters.items()}
    s = [align(params["align"][str(i)], x, t[i])[:, prefix_tokens:] for i, x in enumerate(s)]
    t = [x[:, prefix_tokens:] for x in t]
    masked = _random_mask(key, t[-1].shape[:2], at_step(mask_fraction, step))
    x = jnp.where(masked[..., None], params["mask_token"].astype(s[-1].dtype), s[-1])
    side = math.isqrt(x.shape[1])
    generated = stack(params["generator"], x.reshape(x.shape[0], side, side, -1)).reshape(x.shape)
    sides = (jnp.stack(s[:-1], 1), generated), (jnp.stack(t[:-1], 1), t[-1])
    return losses.vitkd(*sides, masked, **options), state

  return learned(student, teacher, init, apply)


def _check_tokens(t: tuple[jax.Array, ...], prefix_tokens: int) -> None:
  patches = t[-1].shape[1] - prefix_tokens
  if patches < 1 or math.isqrt(patches) ** 2 != patches:
    raise ValueError(
      f"prefix_tokens: expected a square number of patches after them, got {patches} of "
      f"{t[-1].shape[1]} tokens: a class token counts as 1"
    )
  if len({x.shape for x in t[:-1]}) > 1:
    raise ValueError(
      f"teacher: expected shallow layers of one shape, got {[tuple(x.shape) for x in t[:-1]]}"
    )


def _random_mask(key: jax.Array, shape: tuple[int, int], fraction: Any) -> jax.Array:
  """Returns bool [B, N], True at a random ceil(N fraction) tokens of each row."""
  rank = jax.random.uniform(key, shape).argsort(-1).argsort(-1)
  return rank >= jnp.floor(shape[1] * (1 - fraction)).astype(rank.dtype)
