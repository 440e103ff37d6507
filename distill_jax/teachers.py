"""Teachers that are more than one network with its weights. Each is a Model: the step cannot tell them apart.

A frozen teacher is any Model with `variables`; what is here changes its dtype, joins several, reads outputs
that ride in the batch, or follows the student.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from distill_jax.models.cohort import cohort
from distill_jax.models.precision import cast
from distill_jax.types import Model, Variables

CACHED = "teacher/"
_COLUMNS = (".values", ".indices")  # every codec of `cache.codecs` has one of them


def with_dtype(model: Model, *, dtype) -> Model:
  """The model with its weights and inputs in a dtype of its own (a bfloat16 teacher of a float32 student).

  What it says depends on the program that it is a part of: XLA keeps some intermediate results in float32, and which
  ones changes with the batch size and with what is compiled beside it. In bfloat16 a logit then differs by a unit in
  the last place (2^-8 of its size; 0.016 of logits up to 2.4, measured on digits), so that a run from its cache and
  one with it live end farther apart than in float32: parameters by 3.2e-4, where float32 gave 0.

  Args:
    model: any Model; floating weights, states and batch entries are cast, integers stay.
    dtype: a floating dtype. Losses still compute in float32.

  Raises:
    ValueError: the dtype is not floating, or the model follows the student and so has the student's dtype.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype: expected a floating one such as jnp.bfloat16, got {dtype}")
  if model.ema_update is not None:
    raise ValueError(
      "live: a moving average lives in the train state: pass it to the step as it is"
    )

  def init(key, batch):
    return Variables(*cast(tuple(model.init(key, batch)), dtype))

  def apply(params, state, batch, *, train, key):
    return model.apply(params, state, cast(dict(batch), dtype), train=train, key=key)

  return Model(init, apply, model.variables and Variables(*cast(tuple(model.variables), dtype)))


def cached() -> Model:
  """A teacher without weights: its outputs ride in the batch as 'teacher/logits', 'teacher/block3', ...

  Raises (in apply):
    ValueError: the batch has none, or the columns of a `cache.Cache`, whose `model` decodes them.
  """

  def apply(params, state, batch, *, train, key):
    del params, train, key
    outputs = {name.removeprefix(CACHED): x for name, x in batch.items() if name.startswith(CACHED)}
    if not outputs:
      raise ValueError(
        f"the batch has no cached teacher outputs ('{CACHED}...'); it has {sorted(batch)}"
      )
    for name in outputs:
      if name.endswith(_COLUMNS):
        raise ValueError(
          f"the batch's '{CACHED}{name}' is a column of a cache: the teacher that decodes it is `Cache.model`; "
          "teachers.cached() takes whole outputs"
        )
    return outputs, state

  return Model(lambda key, batch: Variables({}, {}), apply, Variables({}, {}))


def ensemble(
  models: Sequence[Model], *, weights: Sequence[float] | None = None, mean: str
) -> Model:
  """Several teachers as one.

  Args:
    models: at least one Model that gives 'logits'.
    weights: one number >= 0 each, not all 0; normalized to sum 1. None: equal.
    mean: 'probabilities': logits = log of the weighted mean of the softmax probabilities at T = 1 (Hinton et
      al. 2015, section 3; a temperature applied later sharpens or softens that mean). 'logits': the weighted
      mean of the logits (a geometric mean of probabilities).

  Returns:
    A Model with 'logits', and every output of teacher i as 'i/name'.

  Raises:
    ValueError: no models, weights that do not fit, another `mean`, a model that follows the student; in apply,
      a teacher without 'logits', or logits of different shapes.
  """
  joined = cohort(models)
  shares = [1.0] * len(models) if weights is None else [float(w) for w in weights]
  if (
    len(shares) != len(models)
    or not all(math.isfinite(w) and w >= 0 for w in shares)
    or sum(shares) == 0
  ):
    raise ValueError(
      f"weights: expected {len(models)} finite numbers >= 0, not all 0, got {weights}"
    )
  if mean not in ("probabilities", "logits"):
    raise ValueError(f"mean: expected 'probabilities' or 'logits', got {mean!r}")
  shares = [w / sum(shares) for w in shares]

  def apply(params, state, batch, *, train, key):
    outputs, state = joined.apply(params, state, batch, train=train, key=key)
    for i in range(len(models)):
      if f"{i}/logits" not in outputs:
        raise ValueError(f"ensemble: teacher {i} gives no 'logits'; it gives {_own(outputs, i)}")
    all_logits = [outputs[f"{i}/logits"] for i in range(len(models))]
    shapes = [z.shape for z in all_logits]
    if len(set(shapes)) > 1:
      raise ValueError(f"ensemble: the teachers' logits have different shapes {shapes}")
    own = {name: x for name, x in outputs.items() if "/" in name}
    return own | {"logits": _mean(all_logits, shares, mean)}, state

  return joined._replace(apply=apply)


def moving_average(student: Model, *, decay: float = 0.999) -> Model:
  """A teacher whose weights are an exponential moving average of the student's (Tarvainen & Valpola 2017).

  After each update `own = d own + (1 - d) student`, with `d = min(decay, (1 + step) / (10 + step))` so that
  the first steps do not remember the random start; batch statistics are averaged the same way. It lives in the
  train state, in float32 or wider, hence in its checkpoints.

  Raises:
    ValueError: decay outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay: expected a number in [0, 1), got {decay}")

  def ema_update(own: Variables, current: Variables, step: jax.Array) -> Variables:
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def blend(a, b):
      floating = jnp.issubdtype(a.dtype, jnp.floating)
      return (a + (1 - d).astype(a.dtype) * (b - a)) if floating else b

    return jax.tree.map(blend, own, current)

  return Model(student.init, student.apply, None, ema_update)


def _own(outputs, i: int) -> list[str]:
  return sorted(name.removeprefix(f"{i}/") for name in outputs if name.startswith(f"{i}/"))


def _mean(all_logits, shares, mean):
  # A teacher of weight 0 is left out: its -inf or NaN times 0 would be NaN.
  used = [(z, share) for z, share in zip(all_logits, shares) if share > 0]
  stacked = jnp.stack([z for z, _ in used])
  stacked = stacked.astype(jnp.promote_types(stacked.dtype, jnp.float32))
  weight = jnp.asarray([w for _, w in used], stacked.dtype).reshape(
    (-1,) + (1,) * (stacked.ndim - 1)
  )
  if mean == "logits":
    return (weight * stacked).sum(0)
  return jax.nn.logsumexp(jax.nn.log_softmax(stacked, -1), axis=0, b=weight)
