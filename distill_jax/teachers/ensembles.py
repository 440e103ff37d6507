"""Joins several teachers into one."""

import functools
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.models.cohort import cohort
from distill_jax.types import Model, Outputs


def ensemble(
  models: Sequence[Model],
  *,
  weights: Sequence[float] | None = None,
  mean: str | Mapping[str, str],
) -> Model:
  """Returns several teachers as one.

      ensemble(models, mean="probabilities")
      ensemble(models, mean={"logits": "probabilities", "type": "probabilities", "depth": "logits"})

  Args:
    models: at least one Model that outputs 'logits', or each output that `mean` names.
    weights: one number >= 0 each, not all 0; normalized to sum 1. None: equal weights.
    mean: of 'logits', or a mapping with that of each head. 'probabilities': log of the weighted
      mean of the softmax probabilities at T = 1 (Hinton et al. 2015, section 3; a temperature that
      is applied later sharpens or softens that mean). 'sigmoid': log-odds of the weighted mean of
      the sigmoid probabilities, for one logit or several labels. 'logits': the weighted mean of the
      output itself (a geometric mean of probabilities; the mean of numbers).

  Returns:
    A Model with 'logits', or the outputs that `mean` names, and every output of teacher i as
    'i/name'.

  Raises:
    ValueError: no models, weights that do not fit, another `mean`, a model that is an EMA of the
      student; in apply, a teacher without one of the outputs, outputs of different shapes, or
      softmax probabilities of one logit.

  >>> from distill_jax import models, teachers
  >>> scale = lambda w, x: x * w
  >>> weights = jnp.array(1.0), jnp.array(3.0)
  >>> members = [models.from_apply(None, scale, variables=w) for w in weights]
  >>> both = teachers.ensemble(members, mean="logits")
  >>> batch = {"image": jnp.array([[0.0, 1.0]])}
  >>> both.apply(*both.variables, batch, train=False, key=None)[0]["logits"]
  Array([[0., 2.]], dtype=float32)
  """
  joined = cohort(models)
  fractions = _normalize(weights, len(models))
  means = _check_means(mean)

  def apply(params, state, batch, *, train, key):
    outputs, state = joined.apply(params, state, batch, train=train, key=key)
    # The cohort also outputs those of its first network without a number.
    numbered = {name: x for name, x in outputs.items() if re.match(r"\d+/", name)}
    averages = {
      name: _mean(_of_each(numbered, name, len(models)), fractions, kind, name)
      for name, kind in means.items()
    }
    return numbered | averages, state

  return joined._replace(apply=apply)


def _normalize(weights: Sequence[float] | None, count: int) -> list[float]:
  values = [1.0] * count if weights is None else [float(w) for w in weights]
  finite = all(math.isfinite(w) and w >= 0 for w in values)
  if len(values) != count or not finite or sum(values) == 0:
    raise ValueError(f"weights: expected {count} finite numbers >= 0, not all 0, got {weights}")
  return [w / sum(values) for w in values]


def _check_means(mean: str | Mapping[str, str]) -> dict[str, str]:
  """Returns how each head is averaged, by name."""
  means = {"logits": mean} if isinstance(mean, str) else mean
  kinds = ("probabilities", "sigmoid", "logits")
  if not isinstance(means, Mapping) or not means or not set(means.values()) <= set(kinds):
    raise ValueError(f"mean: expected one of {kinds}, or one for each head by name, got {mean!r}")
  return dict(means)


def _of_each(numbered: Outputs, name: str, count: int) -> list[jax.Array]:
  """Returns one output of all members.

  Raises:
    ValueError: a member lacks it, or shapes differ.
  """
  for i in range(count):
    if f"{i}/{name}" not in numbered:
      names = sorted(n.removeprefix(f"{i}/") for n in numbered if n.startswith(f"{i}/"))
      raise ValueError(
        f"models: expected {name!r} of each, got {names} of teacher {i}: name the heads to average "
        f"in mean={{{names[0]!r}: ...}}"
      )
  values = [numbered[f"{i}/{name}"] for i in range(count)]
  shapes = [x.shape for x in values]
  if len(set(shapes)) > 1:
    raise ValueError(f"models: expected {name!r} of one shape, got {shapes}")
  return values


def _mean(values: list[jax.Array], fractions: list[float], kind: str, name: str) -> jax.Array:
  # A teacher of weight 0 is left out: its -inf or NaN times 0 would be NaN.
  used = [(x, fraction) for x, fraction in zip(values, fractions, strict=True) if fraction > 0]
  stacked = jnp.stack([x for x, _ in used])
  stacked = stacked.astype(reduce.common_dtype(stacked.dtype, jnp.float32))
  weights = jnp.asarray([fraction for _, fraction in used], stacked.dtype)
  weights = weights.reshape((-1,) + (1,) * (stacked.ndim - 1))
  if kind == "logits":
    return (weights * stacked).sum(0)
  log_mean = functools.partial(jax.nn.logsumexp, axis=0, b=weights)
  if kind == "sigmoid":
    return log_mean(jax.nn.log_sigmoid(stacked)) - log_mean(jax.nn.log_sigmoid(-stacked))
  if stacked.ndim < 3 or stacked.shape[-1] == 1:
    raise ValueError(
      f"mean: expected at least 2 classes of {name!r} for 'probabilities', got {values[0].shape}: "
      "use 'sigmoid' for one logit"
    )
  return log_mean(jax.nn.log_softmax(stacked, -1))
