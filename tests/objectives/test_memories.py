"""Terms with a memory: what enters it, on one device and eight, in the step and in checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from learned_cases import CASES, EXAMPLES, KEY, QUEUE, ROWS, WHERE, outputs, problem

from distill_jax import compat, losses, objectives, reduce
from distill_jax.models import from_apply
from distill_jax.objectives import weighted
from distill_jax.objectives.memories import _sample_negatives
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.train import StepOptions, make_init, make_train_step


def test_batch_longer_than_the_queue_leaves_its_last_rows():
  term = objectives.queue_similarity("flat", "flat", size=5)
  student, teacher, batch = outputs()
  params, state = jax.jit(term.init)(KEY, student, teacher)

  @jax.jit
  def push(state, where):
    batch = {"where": where}
    return term.apply(params, state, student, teacher, batch, step=0, key=KEY)[1]

  for _ in range(2):
    state = push(state, batch["where"])
  rows = teacher["flat"][WHERE]
  np.testing.assert_array_equal(np.roll(state["queue"], -int(state["next"]), 0), rows[-5:])
  assert state["next"] == 2 * len(rows) % 5
  # A batch without a valid row leaves it unchanged.
  jax.tree.map(np.testing.assert_array_equal, push(state, np.zeros(ROWS, bool)), state)


def test_ids_outside_the_memory_give_nan_and_leave_it_unchanged():
  term, params, state, _ = problem("crd")
  student, teacher, batch = outputs()
  student, teacher = (jax.tree.map(np.nan_to_num, x) for x in (student, teacher))
  inside = np.arange(ROWS) % 4 != 0
  outside = np.array([EXAMPLES, -1])[np.arange(ROWS) // 4 % 2]
  ids = np.where(inside, batch["id"], outside)
  apply = jax.jit(functools.partial(term.apply, step=0, key=KEY))
  (values, _), new_state = apply(params, state, student, teacher, {"id": ids})
  np.testing.assert_array_equal(np.isfinite(values), inside)
  changed = (np.asarray(new_state.student) != state.student).any(1)
  np.testing.assert_array_equal(changed, np.isin(np.arange(EXAMPLES), ids[inside]))


def test_negatives_cover_all_but_the_positive():
  sample = functools.partial(_sample_negatives, KEY, count=500, examples=5)
  samples = np.asarray(jax.jit(jax.vmap(sample))(np.arange(5)))
  for positive, row in enumerate(samples):
    assert set(row) == set(range(5)) - {positive}
  counts = np.bincount(samples.ravel(), minlength=5)
  assert (abs(counts - 500) < 100).all()


GOAL = weighted(
  **{name: (1.0, CASES[name][0]()) for name in ("crd", "queue_similarity", "dino", "srd", "ofd")}
)


def evaluate_goal(replicated, rows, *, axis_name):
  """Returns values, gradients and state, and how far the devices' states are apart.

  Their mean would hide a difference.
  """
  params, state = replicated
  student, teacher, batch = rows
  count = reduce.total(batch["where"], axis_name=axis_name)[0]
  devices = 1
  if axis_name is not None:
    params = compat.pcast_varying(params, axis_name)
    devices = jax.lax.axis_size(axis_name)

  def loss(params):
    terms, new_state = GOAL.apply(
      params, state, student, teacher, batch, step=0, key=KEY, axis_name=axis_name
    )
    values = {
      name: devices * reduce.total(*value)[0] / count if isinstance(value, tuple) else value
      for name, (_, value) in terms.items()
    }
    return sum(values.values()), (values, new_state)

  gradients, (values, new_state) = jax.grad(loss, has_aux=True)(params)
  if axis_name is None:
    return (values, gradients, new_state), ()
  low = jax.lax.pmin(new_state, axis_name)
  high = jax.lax.pmax(new_state, axis_name)
  spread = jax.tree.map(lambda a, b: (b - a).max(), low, high)
  return jax.lax.pmean((values, gradients, new_state), axis_name), spread


@functools.cache
def goal_on_one_device():
  student, teacher, batch = outputs()
  variables = jax.jit(GOAL.init)(jax.random.key(1), student, teacher)
  arguments = tuple(variables), (student, teacher, batch)
  results, _ = jax.jit(functools.partial(evaluate_goal, axis_name=None))(*arguments)
  return arguments, results


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_device_and_eight_agree(mesh, check_vma):
  """With one key for all devices: value, gradient and state of terms that relate rows."""
  arguments, expected = goal_on_one_device()
  specs = {"in_specs": (P(), P("data")), "out_specs": P()}
  mapped = functools.partial(evaluate_goal, axis_name="data")
  mapped = jax.shard_map(mapped, mesh=mesh, check_vma=check_vma, **specs)
  results, spread = jax.jit(mapped)(*arguments)
  assert not any(jax.tree.leaves(spread))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, results, expected)


# In the train step


def network(sizes):
  """A tiny network of two 1x1 convolutions with the outputs that the terms name."""

  def init(key, x):
    shapes = {
      "one": (2, sizes["one"]),
      "two": (sizes["one"], sizes["two"]),
      "flat": (sizes["two"], sizes["flat"]),
    }
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), shape) / shape[0] ** 0.5
      for i, (name, shape) in enumerate(shapes.items())
    }

  def apply(p, x):
    one = x @ p["one"]
    two = jax.nn.relu(one)[:, ::2, ::2] @ p["two"]
    flat = two.mean((1, 2)) @ p["flat"]
    return {"one": one, "two": two, "flat": flat, "logits": flat}

  return from_apply(init, apply)


STUDENT = network({"one": 3, "two": 4, "flat": 4})
TEACHER = network({"one": 4, "two": 5, "flat": 6})
QUEUE_TERM = {"queue": (0.1, objectives.queue_similarity("flat", "flat", size=QUEUE))}


def images(seed):
  rng = np.random.default_rng(seed)
  return {
    "id": rng.permutation(EXAMPLES)[:ROWS].astype(np.int32),
    "image": rng.normal(size=(ROWS, 4, 4, 2)).astype(np.float32),
    "where": rng.permutation(WHERE),
  }


def setup(terms, learning_rate, **options):
  """Returns the first state, the step and the teacher's variables."""
  parts = STUDENT, TEACHER, weighted(**terms), optax.sgd(learning_rate)
  state = jax.jit(make_init(*parts))(jax.random.key(0), images(0))
  teacher = jax.jit(TEACHER.init)(jax.random.key(5), images(0))
  return state, make_train_step(*parts, StepOptions(**options)), teacher


def test_pmapped_steps_equal_the_jitted_ones():
  expected, step, teacher = setup(QUEUE_TERM, 0.05)
  state, mapped, _ = setup(QUEUE_TERM, 0.05, axis_name="data")
  step = jax.jit(step)
  mapped = jax.pmap(mapped, "data", in_axes=(None, None, 0), out_axes=None)
  for seed in range(3):
    batch = images(seed)
    rows = {name: x.reshape(8, -1, *x.shape[1:]) for name, x in batch.items()}
    expected, expected_metrics = step(expected, teacher, batch)
    state, metrics = mapped(state, teacher, rows)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, state.params, expected.params)
  jax.tree.map(close, state.model_state, expected.model_state)
  close(reduce.value(metrics["queue"]), reduce.value(expected_metrics["queue"]))


def test_state_passes_from_microbatch_to_microbatch():
  state, step, teacher = setup(QUEUE_TERM, 0.0, microbatches=2)
  batch = images(1)
  new, _ = jax.jit(step)(state, teacher, batch)
  rows = np.concatenate([np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)])
  valid = rows[batch["where"][rows]]
  apply = jax.jit(functools.partial(TEACHER.apply, train=False, key=None))
  embeddings = apply(*teacher, batch)[0]["flat"][valid]
  memory = new.model_state["objective"]["queue"]
  assert memory["next"] == len(valid)
  np.testing.assert_allclose(memory["queue"][: len(valid)], embeddings, rtol=1e-5)


def test_learned_parts_and_memories_are_checkpointed(tmp_path):
  goal = weighted(
    crd=(0.8, objectives.crd("flat", "flat", EXAMPLES, negatives=4, width=3)),
    **QUEUE_TERM,
    cirkd=(1.0, objectives.cirkd("one", "one", 2, pixels=3, regions=2)),
    layers=(1.0, objectives.layer_attention(("one", "two"), ("one",), width=2)),
    pairs=(1.0, objectives.features(("two", "two"), ("two", "two"), losses.fsp)),
  )
  init = make_init(STUDENT, TEACHER, goal, optax.sgd(0.1, momentum=0.9))
  shapes = jax.eval_shape(init, KEY, images(0))._replace(key=jnp.zeros(()))
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  state = state._replace(key=KEY)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    restored = checkpoints.restore(state)
  jax.tree.map(np.testing.assert_array_equal, restored._replace(key=0), state._replace(key=0))
