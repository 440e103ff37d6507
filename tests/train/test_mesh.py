"""`fit` on meshes of several axes: the same student, with its arrays spread over the devices."""

import jax
import numpy as np
import optax
import pytest
from fitting import fit_with
from jax.sharding import PartitionSpec as P

from distill_jax import data, losses, objectives, teachers
from distill_jax.distributed import sharding
from distill_jax.models import from_apply
from distill_jax.types import Variables

CLASSES, WIDTH, HIDDEN = 4, 256, 256  # 2^16 elements: large enough to be spread


def source(seed=0, rows=96):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(rows, WIDTH)).astype(np.float32)
  label = image[:, :CLASSES].argmax(1).astype(np.int32)
  return data.Source(
    {"id": np.arange(rows), "image": image, "label": label}, classes=CLASSES, name="toy"
  )


def network(hidden, **kwargs):
  def init(key, x):
    del x
    keys = jax.random.split(key, 2)
    return {
      "up": 0.1 * jax.random.normal(keys[0], (WIDTH, hidden)),
      "down": 0.1 * jax.random.normal(keys[1], (hidden, CLASSES)),
    }

  def apply(w, x):
    hidden = jax.nn.relu(x @ w["up"])
    return {"logits": hidden @ w["down"], "hidden": hidden}

  return from_apply(init, apply, **kwargs)


def goal():
  return objectives.weighted(
    hard=(0.5, objectives.labels()),
    soft=(0.5, objectives.logits(losses.kl_divergence, temperature=2.0)),
    hint=(0.1, objectives.features("hidden", "hidden", losses.hint)),
    gram=(
      1.0,
      objectives.features("hidden", "hidden", losses.similarity_preserving, project=False),
    ),
  )


def run(folder=None, steps=20, batch_size=16, teacher=None, goal=goal, **kwargs):
  wide = network(HIDDEN + 64)
  weights = Variables(*wide.init(jax.random.key(5), source().arrays))
  return fit_with(
    network(HIDDEN),
    teacher or wide,
    goal(),
    optax.sgd(0.02, momentum=0.9),
    source(),
    teacher_variables=None if teacher else weights,
    batch_size=batch_size,
    steps=steps,
    folder=folder,
    validation=source(1, 30),
    eval_every=10,
    **kwargs,
  )


TENSOR = [(r"up$", P("fsdp", "tensor")), (r"down$", P("tensor"))]


@pytest.fixture(scope="module")
def one():
  """What one device trains."""
  return run(mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
  ("sizes", "rules", "where"),
  [
    pytest.param((8, 1, 1), (), P(), marks=pytest.mark.nightly),
    pytest.param((1, 8, 1), (), P("fsdp"), marks=pytest.mark.nightly),
    ((2, 2, 2), TENSOR, P("fsdp", "tensor")),
  ],
)
def test_every_mesh_trains_the_student_of_one_device(one, sizes, rules, where):
  fitted = run(mesh=sharding.make_mesh(*sizes), rules=rules, teacher_rules=rules)
  state = fitted.state
  up = state.params["student"]["up"]
  assert up.sharding.spec == where
  assert state.opt_state[0].trace["student"]["up"].sharding.is_equivalent_to(up.sharding, 2)
  assert up.addressable_shards[0].data.size == up.size // np.prod([1, *sizes[1:]] if where else 1)
  for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(state.params)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  for a, b in zip(one.history, fitted.history):
    assert a["loss" if "loss" in a else "nll"] == pytest.approx(
      b["loss" if "loss" in b else "nll"], rel=1e-4
    )


def test_a_run_is_resumed_on_another_mesh(one, tmp_path):
  run(tmp_path, steps=10, mesh=sharding.make_mesh(1, 8))
  resumed = run(tmp_path, mesh=sharding.make_mesh(2, 2, 2), rules=TENSOR)
  for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(resumed.state.params)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_accumulation_and_ema_equal_one_device():
  def trained(mesh):
    own = teachers.moving_average(network(HIDDEN), decay=0.9)
    return run(mesh=mesh, steps=5, teacher=own, microbatches=2, goal=separable)

  def separable():
    return objectives.weighted(
      hard=(0.5, objectives.labels()),
      soft=(0.5, objectives.logits(losses.kl_divergence, temperature=2.0)),
    )

  one, many = (
    trained(mesh)
    for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(2, 4))
  )
  assert many.state.average.params["up"].sharding.spec == P("fsdp")
  for a, b in zip(*(jax.tree.leaves((f.state.params, f.state.average)) for f in (one, many))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_a_rule_that_does_not_fit_is_refused_before_training():
  with pytest.raises(ValueError, match="rules"):
    run(
      mesh=sharding.make_mesh(1, 3, 2, devices=jax.devices()[:6]),
      batch_size=18,
      rules=[("up", P(("fsdp", "tensor")))],
    )
