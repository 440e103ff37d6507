"""Losses of arrays that need no term of their own go through `features`, `logits` and `sparse`."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses, reduce
from distill_jax.objectives import features, weighted

KEY = jax.random.key(0)
WHERE = np.array([True, False, True, True])


def values_of(terms, student, teacher, batch):
  """Returns the mean of every term: one program, in which the row that does not count is NaN."""
  objective = weighted(**{name: (1.0, term) for name, term in terms.items()})
  variables = objective.init(KEY, student, teacher)

  @jax.jit
  def apply(params, student, teacher, batch):
    step = {"step": jnp.int32(0), "key": KEY}
    values, _ = objective.apply(params, variables.state, student, teacher, batch, **step)
    return {
      name: reduce.mean(*value) if isinstance(value, tuple) else value
      for name, (_, value) in values.items()
    }

  return jax.device_get(apply(variables.params, student, teacher, batch))


def without_masked_row(x):
  return np.where(WHERE.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan).astype(np.float32)


def test_features_take_each_loss(rng):
  student = {"map": rng.normal(size=(4, 2, 3, 5)), "flat": rng.normal(size=(4, 6))}
  teacher = {
    "map": rng.normal(size=(4, 2, 3, 5)),
    "wide": rng.normal(size=(4, 2, 3, 7)),
    "flat": rng.normal(size=(4, 6)),
  }
  terms = {
    "l1": features("map", "map", losses.l1),
    "affinity": features("map", "wide", losses.affinity, project=False),
    "dark_rank": features("flat", "flat", losses.dark_rank, alpha=0.1),
    "correlation": features("flat", "flat", losses.correlation),
  }

  @jax.jit
  def expected(student, teacher):
    return {
      "l1": losses.l1(student["map"], teacher["map"]).mean(),
      "affinity": losses.affinity(student["map"], teacher["wide"]).mean(),
      "dark_rank": losses.dark_rank(student["flat"], teacher["flat"], alpha=0.1),
      "correlation": losses.correlation(student["flat"], teacher["flat"]),
    }

  sides = [{name: without_masked_row(x) for name, x in side.items()} for side in (student, teacher)]
  values = values_of(terms, *sides, {"where": WHERE})
  valid = [{name: x[WHERE] for name, x in side.items()} for side in sides]
  for name, value in expected(*valid).items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
