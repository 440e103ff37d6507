"""The weighted sum of terms, and objectives and terms that a user writes as documented."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax import objectives, reduce
from distill_jax.models import from_apply
from distill_jax.objectives import Term, labels, weighted
from distill_jax.train import StepOptions, make_init, make_train_step
from distill_jax.types import Objective, Variables

KEY = jax.random.key(0)


def test_weights_are_numbers_or_schedules(rng):
  z = rng.normal(size=(4, 3)).astype(np.float32)
  batch = {"label": np.arange(4) % 3}
  goal = weighted(
    a=(0.3, labels()),
    b=(np.float32(0), labels()),
    c=(optax.linear_schedule(1.0, 0.0, 10), labels()),
  )
  empty = {name: {} for name in "abc"}

  @jax.jit
  def apply(step):
    return goal.apply(empty, empty, {"logits": z}, {}, batch, step=step, key=KEY)

  for step, expected in ((0, 1.0), (5, 0.5), (20, 0.0)):
    terms, state = apply(jnp.int32(step))
    np.testing.assert_allclose([float(w) for w, _ in terms.values()], [0.3, 0, expected], atol=1e-6)
    assert state == empty


@pytest.mark.parametrize(
  "weight", [-0.1, float("nan"), float("inf"), "0.1", True, None, [1.0], np.ones(2), np.float32(-1)]
)
def test_weight_out_of_range_raises(weight):
  with pytest.raises(ValueError, match="hard: weight: expected"):
    weighted(hard=(weight, labels()))


@pytest.mark.parametrize("name", ["loss", "accuracy", "grad_norm", "nonfinite", "step", "phase"])
def test_reserved_term_name_raises(name):
  with pytest.raises(ValueError, match=f"^{name}: "):
    weighted(**{name: (1.0, labels())})


@pytest.mark.parametrize(
  ("value", "kind"),
  [
    (labels(), "Term"),
    (1.0, "float"),
    ((1.0, labels(), 2), "tuple"),
    ((1.0, labels), "function"),
    ((labels(), 1.0), "float"),
  ],
)
def test_value_that_is_no_weighted_term_raises(value, kind):
  with pytest.raises(ValueError, match=f"^hard: .*got {kind}"):
    weighted(hard=value)


def test_no_terms_or_only_weights_of_zero_raise():
  with pytest.raises(ValueError, match="^terms: "):
    weighted()
  with pytest.raises(ValueError, match="^terms: .*'hard'"):
    weighted(hard=(0.0, labels()))


@pytest.mark.parametrize(
  ("error", "expected", "message"),
  [
    (TypeError("float() argument"), ValueError, "^term 'soft': TypeError: float"),
    (KeyError("logits"), ValueError, "^term 'soft': KeyError: 'logits'"),
    (ValueError("no rows"), ValueError, "^term 'soft': no rows"),
    (MemoryError("too large"), MemoryError, "too large"),
  ],
)
def test_errors_of_any_type_name_the_term(error, expected, message):
  def fail(*args, **context):
    raise error

  goal = weighted(soft=(1.0, Term(fail, fail)))
  with pytest.raises(expected, match=message) as of_init:
    goal.init(KEY, {}, {})
  with pytest.raises(expected, match=message) as of_apply:
    goal.apply({"soft": {}}, {"soft": {}}, {}, {}, {}, step=0, key=KEY)
  if expected is MemoryError:
    assert of_init.value.__notes__[0] == of_apply.value.__notes__[0] == "term 'soft'"


@pytest.mark.parametrize("result", [1.0, jnp.ones(3), (jnp.ones(3), None, {}), None])
def test_term_that_returns_no_value_and_state_raises(result):
  goal = weighted(soft=(1.0, Term(lambda *args: Variables({}, {}), lambda *args, **named: result)))
  with pytest.raises(ValueError, match="^term 'soft': apply: "):
    goal.apply({"soft": {}}, {"soft": {}}, {}, {}, {}, step=0, key=KEY)


def test_each_term_has_its_own_key_parameters_and_state():
  samples = []

  def init(key, student, teacher):
    return Variables({"w": jax.random.normal(key)}, {"n": jnp.int32(0)})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    samples.append(float(jax.random.normal(key)))
    return params["w"], {"n": state["n"] + 1}

  goal = weighted(a=(1.0, objectives.Term(init, apply)), b=(1.0, objectives.Term(init, apply)))
  params, state = goal.init(KEY, {}, {})
  terms, new_state = goal.apply(params, state, {}, {}, {}, step=0, key=KEY)
  assert params["a"]["w"] != params["b"]["w"] and samples[0] != samples[1]
  values = {name: value for name, (_, value) in terms.items()}
  assert values == {name: p["w"] for name, p in params.items()}
  assert new_state == {"a": {"n": 1}, "b": {"n": 1}}


def user_objective():
  """An objective with the signature that `types.Objective` documents, and both kinds of values."""

  def init(key, student_outputs, teacher_outputs):
    return Variables({"shift": jnp.zeros(student_outputs["logits"].shape[-1])}, {"steps": 0})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    gap = student["logits"] + params["shift"] - teacher["logits"]
    mean = reduce.mean(gap**2, batch["where"], axis_name=axis_name)
    terms = {"rows": (1.0, (jnp.abs(gap).mean(-1), batch["where"])), "batch": (0.5, mean)}
    return terms, {"steps": state["steps"] + 1}

  return Objective(init, apply)


def user_term():
  """The same loss as a term with the signature that `Term` documents."""

  def init(key, student_outputs, teacher_outputs):
    return Variables({"shift": jnp.zeros(student_outputs["logits"].shape[-1])}, {"steps": 0})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    gap = student["logits"] + params["shift"] - teacher["logits"]
    mean = reduce.mean(gap**2, batch["where"], axis_name=axis_name)
    return 0.5 * mean, {"steps": state["steps"] + 1}

  return Term(init, apply)


@pytest.mark.parametrize("goal", [user_objective(), weighted(batch=(1.0, user_term()))])
def test_objective_of_a_user_trains_on_one_device_and_eight(rng, mesh, goal):
  student = from_apply(lambda key, x: jnp.ones((3, 2)), lambda w, x: x @ w)
  teacher = from_apply(None, lambda w, x: x @ w, variables=np.eye(3, 2, dtype=np.float32))
  batch = {
    "image": rng.normal(size=(16, 3)).astype(np.float32),
    "where": np.arange(16) % 5 != 2,
  }
  parts = student, teacher, goal, optax.sgd(0.1)
  state = make_init(*parts)(KEY, batch)
  expected, metrics = jax.jit(make_train_step(*parts))(state, teacher.variables, batch)
  x = batch["image"][batch["where"]]
  gap = np.float64(x) @ (np.ones((3, 2)) - np.eye(3, 2))
  value = reduce.value(metrics["batch"])
  np.testing.assert_allclose(value, (1 if "rows" in metrics else 0.5) * (gap**2).mean(), rtol=1e-5)
  if "rows" in metrics:
    np.testing.assert_allclose(reduce.value(metrics["rows"]), np.abs(gap).mean(), rtol=1e-5)
  specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
  mapped = make_train_step(*parts, StepOptions(axis_name="data"))
  got, _ = jax.jit(jax.shard_map(mapped, mesh=mesh, **specs))(state, teacher.variables, batch)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, got.params, expected.params)
  jax.tree.map(close, got.model_state, expected.model_state)
