"""Size and FLOPs of models that can be counted by hand, and the batches that are timed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.cost import runtime
from distill_jax.cost.runtime import measure_cost
from distill_jax.types import Model, Variables


def apply_dense(params, state, batch, *, train, key):
  assert train is False and key is None
  logits = batch["image"].reshape(len(batch["image"]), -1) @ params["kernel"]
  return {"logits": logits, "unused": jnp.tanh(logits @ logits.T @ logits)}, state


def apply_embedding(params, state, batch, *, train, key):
  return {"embedding": batch["image"] @ params}, state


DENSE = Model(lambda key, batch: None, apply_dense)


def test_cost_of_a_dense_layer_is_known():
  params = {"kernel": np.ones((64, 10), np.float32)}
  state = {"mean": np.zeros(5, np.float32), "steps": np.int32(3)}
  batch = {"image": np.ones((32, 8, 8, 1), np.float32), "id": np.arange(32)}
  cost = measure_cost(DENSE, Variables(params, state), batch, repeats=3)
  assert cost["parameters"] == 640
  assert cost["bytes"] == 640 * 4 + 5 * 4 + 4
  # The unused feature costs nothing.
  np.testing.assert_allclose(cost["flops"], 2 * 64 * 10, rtol=0.02)
  assert cost["latency_ms"] > 0 and cost["throughput"] > 0


def test_sharded_weights_and_batches_cost_the_same(mesh):
  params = {"kernel": jnp.ones((64, 10), jnp.bfloat16)}
  state = {"key": jax.random.key(0)}
  batch = {"image": jnp.ones((16, 8, 8, 1), jnp.bfloat16)}
  sharded_batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  one = measure_cost(DENSE, Variables(params, state), batch, repeats=1)
  eight = measure_cost(DENSE, Variables(replicated, state), sharded_batch, repeats=1)
  for name in ("parameters", "bytes", "flops"):
    assert one[name] == eight[name]
  assert one["bytes"] == 2 * 640 + 8


def test_model_without_logits_is_measured_by_all_outputs():
  model = Model(lambda key, batch: None, apply_embedding)
  batch = {"image": np.ones((4, 16), np.float32)}
  cost = measure_cost(model, Variables(np.ones((16, 8), np.float32), ()), batch, repeats=1)
  np.testing.assert_allclose(cost["flops"], 2 * 16 * 8, rtol=0.02)


def test_other_batch_sizes_are_timed_with_as_many_rows(monkeypatch):
  batches = []

  def half_a_second(calls, repeats):
    batches[:] = [call.args[-1]["image"] for call in calls]
    return np.full((len(calls), repeats), 0.5)

  monkeypatch.setattr(runtime, "_time_by_turns", half_a_second)
  batch = {"image": np.arange(3 * 64, dtype=np.float32).reshape(3, 64)}
  variables = Variables({"kernel": np.ones((64, 10), np.float32)}, ())
  cost = measure_cost(DENSE, variables, batch, batch_sizes=(1, 8))
  times = {"latency_ms": 500, "throughput": 6, "throughput_1": 2, "throughput_8": 16}
  spreads = {f"{name}_spread": 1 for name in times}
  sizes = {name: cost[name] for name in ("parameters", "bytes", "flops")}
  assert cost == times | spreads | sizes
  assert [len(images) for images in batches] == [1, 3, 1, 8]
  np.testing.assert_array_equal(batches[-1], np.concatenate([batch["image"]] * 3)[:8])
  others = {name for name in cost if name.startswith(("throughput_1", "throughput_8"))}
  assert measure_cost(DENSE, variables, batch).keys() == cost.keys() - others


def test_networks_are_timed_by_turns_and_a_slow_spell_is_their_spread(monkeypatch):
  seconds = np.array([1.0, 1, 2, 4, 8])
  calls = []

  def call(number):
    return lambda: calls.append(number)

  runtime._time_by_turns([call(0), call(1)], 2)
  assert calls == [0, 1, 0, 1, 0, 1]  # The first round is not timed.
  monkeypatch.setattr(runtime, "MOST_SECONDS", 0)
  assert runtime._time_by_turns([call(0), call(1)], 20).shape == (2, runtime.FEWEST_REPEATS)
  monkeypatch.setattr(runtime, "_time_by_turns", lambda calls, repeats: [seconds] * len(calls))
  batch = {"image": np.ones((3, 64), np.float32)}
  small, large = [Variables({"kernel": np.ones((64, n), np.float32)}, ()) for n in (2, 10)]
  costs = runtime.measure_costs([(DENSE, small), (DENSE, large)], batch)
  assert [cost["parameters"] for cost in costs] == [128, 640]
  for cost in costs:
    assert (cost["latency_ms"], cost["throughput"]) == (2000, 1.5)
    assert cost["latency_ms_spread"] == cost["throughput_spread"] == 4


@pytest.mark.parametrize("options", [{"repeats": 0}, {"batch_sizes": (1, 0)}])
def test_repeats_and_batch_sizes_below_one_raise(options):
  with pytest.raises(ValueError, match=rf"^{next(iter(options))}: "):
    measure_cost(DENSE, Variables({}, {}), {}, **options)


def test_generation_is_timed_of_models_that_generate(monkeypatch):
  def half_a_second(calls, repeats):
    for call in calls:
      call()
    return np.full((len(calls), repeats), 0.5)

  monkeypatch.setattr(runtime, "_time_by_turns", half_a_second)
  batch = {"image": np.ones((3, 64), np.float32)}
  variables = Variables({"kernel": np.ones((64, 10), np.float32)}, ())
  shapes = []

  def sample(variables, key, batch):
    shapes.append(batch["image"].shape)
    return jnp.zeros((len(batch["image"]), 5), int), jnp.zeros(len(batch["image"]), int)

  networks = [(DENSE, variables), (DENSE._replace(sample=sample), variables)]
  costs = runtime.measure_costs(networks, batch, batch_sizes=(8,))
  assert [cost.get("generation_8") for cost in costs] == [None, 16]
  assert shapes == [(8, 64)]
