"""The sum of terms, next to the same terms in `weighted` under one weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from terms_by_hand import KEY, normal

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_apply
from distill_jax.objectives import Term, summed, weighted
from distill_jax.train import StepOptions, make_init, make_train_step
from distill_jax.types import Variables

ROWS = 8
WHERE = np.arange(ROWS) % 4 != 1
TERMS = {
  "maps": objectives.features("p3", "p3", losses.hint),
  "positions": objectives.features("p4", "p4", losses.cosine, project=False),
  "pixels": objectives.logits(losses.kl_divergence, output="p3", valid="pixels"),
  "labeled": objectives.logits(losses.wsld, output="row"),
  "scalar": objectives.features("p4", "p4", losses.pearson, project=False),
}
GROUPS = [("maps", "positions"), ("scalar", "scalar"), tuple(TERMS)]
IDS = ["values", "scalars", "all"]
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


def problem(rng):
  def side():
    maps = {"p3": normal(rng, ROWS, 4, 4, 3), "p4": normal(rng, ROWS, 2, 2, 3)}
    return maps | {"row": normal(rng, ROWS, 3)}

  batch = {
    "pixels": rng.random((ROWS, 4, 4)) < 0.5,
    "label": np.array([0, 1, -1, 2, 0, 1, -1, 0], np.int32),
  }
  return side(), side(), batch


def both(names):
  """Returns the objectives of separate terms and of their sum."""
  terms = [TERMS[name] for name in names]
  apart = weighted(**{f"term_{i}": (1.0, term) for i, term in enumerate(terms)})
  return apart, weighted(neck=(1.0, summed(*terms)))


def total(student, objective, variables, teacher, batch):
  """Returns the sum of the terms' means as the step takes them, and the values."""
  terms, _ = objective.apply(*variables, student, teacher, batch, step=jnp.int32(0), key=KEY)
  values = [value for _, value in terms.values()]
  return sum(reduce.mean(*x) if isinstance(x, tuple) else x for x in values), values


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("names", GROUPS, ids=IDS)
def test_sum_equals_separate_terms(rng, names, masked):
  student, teacher, batch = problem(rng)
  if masked:
    batch["where"] = WHERE
    student["p3"] = np.where(WHERE[:, None, None, None], student["p3"], np.float32(np.nan))
  objectives_of_names = both(names)
  variables = [objective.init(KEY, student, teacher) for objective in objectives_of_names]

  @jax.jit
  def compare(student):
    f = jax.value_and_grad(total, has_aux=True)
    pairs = zip(objectives_of_names, variables)
    return [f(student, *pair, teacher, batch) for pair in pairs]

  ((expected, _), by_parts), ((value, (values,)), gradient) = compare(student)
  assert expected > 0.1
  close(value, expected)
  jax.tree.map(close, gradient, by_parts)
  if names == GROUPS[1]:
    assert values.shape == ()
  else:
    assert values[0].shape == (ROWS,) and values[0].dtype == jnp.float32


def test_nothing_that_counts_is_zero(rng):
  student, teacher, batch = problem(rng)
  batch |= {"pixels": np.zeros((ROWS, 4, 4), bool), "label": np.full(ROWS, -1, np.int32)}
  term = summed(TERMS["pixels"], TERMS["labeled"])
  state = {"0": {}, "1": {}}
  apply = jax.jit(functools.partial(term.apply, state, state, step=0, key=KEY))
  (values, _), _ = apply(student, teacher, batch)
  np.testing.assert_array_equal(values, 0)


def counting_term():
  """A term with a parameter, a state and a random number; it has no argument `axis_name`."""

  def init(key, student, teacher):
    return Variables({"scale": jax.random.normal(key)}, {"calls": 0})

  def apply(params, state, student, teacher, batch, *, step, key):
    return params["scale"] * jax.random.normal(key), {"calls": state["calls"] + 1}

  return Term(init, apply)


def test_each_part_has_its_own_key_parameters_and_state():
  term = summed(counting_term(), counting_term())
  params, state = term.init(KEY, {}, {})
  assert list(params) == list(state) == ["0", "1"]
  assert params["0"]["scale"] != params["1"]["scale"]
  values = []
  for scales in ((1, 0), (0, 1)):
    params = {str(i): {"scale": scale} for i, scale in enumerate(scales)}
    value, new_state = term.apply(params, state, {}, {}, {}, step=0, key=KEY)
    assert new_state == {"0": {"calls": 1}, "1": {"calls": 1}}
    values.append(float(value))
  assert values[0] != values[1]


def maps_of(w, x):
  """A network of two maps: p4 is the mean of p3 over windows of 2x2."""
  p3 = x @ w
  return {"p3": p3, "p4": p3.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))}


@pytest.mark.parametrize(
  ("names", "options"),
  [(("maps", "positions"), StepOptions(microbatches=2)), (tuple(TERMS)[:3], None)],
  ids=["microbatches", "eight devices"],
)
def test_sum_trains_as_separate_terms(rng, mesh, names, options):
  student = from_apply(lambda key, x: 0.5 * jnp.eye(3) + 0.1, maps_of, inputs="x")
  teacher = from_apply(None, maps_of, inputs="x", variables=np.eye(3, dtype=np.float32))
  batch = {"x": normal(rng, ROWS, 4, 4, 3), "where": WHERE, "pixels": rng.random((8, 4, 4)) < 0.5}
  apart, together = both(names)
  parts = student, teacher, apart, optax.sgd(0.1)
  state = make_init(*parts)(KEY, batch)
  expected, _ = jax.jit(make_train_step(*parts))(state, teacher.variables, batch)
  parts = student, teacher, together, optax.sgd(0.1)
  state = make_init(*parts)(KEY, batch)
  step = make_train_step(*parts, options or StepOptions(axis_name="data"))
  if options is None:
    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
  got, _ = jax.jit(step)(state, teacher.variables, batch)
  assert abs(np.asarray(state.params["student"] - expected.params["student"])).max() > 1e-3
  close(got.params["student"], expected.params["student"])


@pytest.mark.parametrize("terms", [(), (1.0,), (objectives.labels(), (1.0, objectives.labels()))])
def test_what_is_no_term_raises_at_once(terms):
  with pytest.raises(ValueError, match="^terms: expected"):
    summed(*terms)


def test_errors_name_the_part(rng):
  student, teacher, _ = problem(rng)
  objective = weighted(neck=(1.0, summed(TERMS["maps"], objectives.mgd("p5", "p5"))))
  with pytest.raises(ValueError, match="^term 'neck': term '1': p5: expected"):
    objective.init(KEY, student, teacher)
