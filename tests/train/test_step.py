"""The train step against hand-written JAX, and its invariances: devices, mapping, accumulation."""

import types

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import losses, objectives, reduce, tasks, teachers
from distill_jax.models import from_apply, from_linen, from_nnx
from distill_jax.train import StepOptions, make_eval_step, make_init, make_loss_fn, make_train_step
from distill_jax.types import Variables

CLASSES = 5


class Student(nnx.Module):
  def __init__(self, rngs, norm=None, dropout=0.0):
    self.hidden = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, axis_name=norm or None, rngs=rngs) if norm is not None else None
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.head = nnx.Linear(8, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = self.hidden(x)
    x = x if self.norm is None else self.norm(x)
    x = self.dropout(nnx.relu(x))
    return {"logits": self.head(x), "hidden": x}


class Teacher(linen.Module):
  @linen.compact
  def __call__(self, x, train: bool):
    x = linen.Dense(12)(x)
    x = linen.BatchNorm(use_running_average=not train)(x)
    x = linen.Dropout(0.5, deterministic=not train)(linen.relu(x))
    return linen.Dense(CLASSES)(x)


def teacher_model(features=()):
  variables = Teacher().init(jax.random.key(7), jnp.ones((1, 6)), train=False)
  stats = jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])
  return from_linen(Teacher(), {**variables, "batch_stats": stats}, features=features)


METRICS = tasks.classification().train_metrics


def batch(rng, rows=16, masked=True):
  where = rng.random(rows) > 0.4 if masked else np.ones(rows, bool)
  return {
    "id": np.arange(rows, dtype=np.int32),
    "image": rng.normal(size=(rows, 6)).astype(np.float32),
    "label": rng.integers(0, CLASSES, rows).astype(np.int32),
    "where": where,
  }


def objective():
  return objectives.weighted(
    hard=(0.3, objectives.labels()),
    soft=(
      optax.linear_schedule(1.0, 0.2, 10),
      objectives.logits(losses.kl_divergence, temperature=3.0),
    ),
    hint=(0.5, objectives.features("hidden", "Dense_0", losses.hint)),
  )


def setup(rng, student=None, teacher=None, goal=None, optimizer=None, **kwargs):
  student = student or from_nnx(Student(nnx.Rngs(0)))
  teacher = teacher or teacher_model(["Dense_0"])
  goal, optimizer = goal or objective(), optimizer or optax.sgd(0.1, momentum=0.9)
  init = make_init(student, teacher, goal, optimizer)
  step = make_train_step(student, teacher, goal, optimizer, StepOptions(**kwargs))
  return init(jax.random.key(0), batch(rng)), step, teacher.variables


def run(state, step, teacher_outputs, batches):
  step = jax.jit(step)
  for b in batches:
    state, measured = step(state, teacher_outputs, b)
  return state, measured


def assert_same(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_equals_a_hand_written_step(rng):
  state, step, teacher_outputs = setup(rng)
  b = batch(rng)
  learned = state.params["objective"]["hint"]
  teacher_logits, inner = Teacher().apply(
    {"params": teacher_outputs.params, **teacher_outputs.state},
    b["image"],
    train=False,
    capture_intermediates=True,
  )
  teacher_hidden = inner["intermediates"]["Dense_0"]["__call__"][0]
  where = b["where"]

  def loss_fn(params):
    p, projection = params["student"], params["objective"]["hint"]
    hidden = jax.nn.relu(b["image"] @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    z = hidden @ p["head"]["kernel"] + p["head"]["bias"]
    hard = optax.softmax_cross_entropy_with_integer_labels(z, b["label"])
    soft = 9 * optax.losses.kl_divergence_with_log_targets(
      jax.nn.log_softmax(z / 3), jax.nn.log_softmax(teacher_logits / 3)
    )
    projected = hidden @ projection["kernel"] + projection["bias"]
    hint = ((projected - teacher_hidden) ** 2).mean(-1)
    return jnp.where(where, 0.3 * hard + 1.0 * soft + 0.5 * hint, 0).sum() / where.sum()

  assert learned["kernel"].shape == (8, 12)
  expected_loss, grads = jax.value_and_grad(loss_fn)(state.params)
  new, measured = jax.jit(step)(state, teacher_outputs, b)
  np.testing.assert_allclose(reduce.value(measured["loss"]), expected_loss, rtol=1e-5)
  np.testing.assert_allclose(reduce.value(measured["grad_norm"]), optax.tree.norm(grads), rtol=1e-5)
  assert_same(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))


def test_one_device_and_eight_devices_agree(rng, mesh):
  state, step, teacher_outputs = setup(rng)
  batches = [batch(rng) for _ in range(3)]
  expected, one = run(state, step, teacher_outputs, batches)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  everywhere = NamedSharding(mesh, PartitionSpec())
  sharded, eight = run(
    *jax.device_put((state,), everywhere),
    step,
    jax.device_put(teacher_outputs, everywhere),
    jax.device_put(batches, rows),
  )
  assert_same(expected.params, sharded.params)
  assert_same(one, eight)


OTHER_MAPPED = [
  ("pmap", None, 1),
  ("pmap", None, 2),
  ("checked", None, 1),
  ("checked", "data", 1),
  ("unchecked", None, 2),
  ("unchecked", "data", 1),
]


@pytest.mark.parametrize(
  ("how", "norm", "microbatches"),
  [
    ("pmap", "data", 1),
    ("checked", None, 2),
    ("unchecked", None, 1),
    # Batch norm sees one microbatch.
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in OTHER_MAPPED),
  ],
)
def test_mapped_steps_equal_the_jitted_one(rng, mesh, how, norm, microbatches):
  jitted = from_nnx(Student(nnx.Rngs(0), norm="" if norm else None))
  mapped = from_nnx(Student(nnx.Rngs(0), norm=norm))
  goal = objectives.weighted(
    hard=(0.3, objectives.labels()),
    soft=(1.0, objectives.logits(losses.kl_divergence, temperature=3.0)),
    gram=(0.1, objectives.features("hidden", "Dense_0", relational, project=False)),
  )
  if microbatches > 1:
    goal = objective()
  state, step, teacher_outputs = setup(rng, student=jitted, goal=goal)
  batches = [batch(rng, masked=not norm) for _ in range(10)]
  expected, measured = run(state, step, teacher_outputs, batches)
  _, step, _ = setup(rng, student=mapped, goal=goal, axis_name="data", microbatches=microbatches)
  if how == "pmap":
    step = jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    for b in batches:
      state, got = step(
        state, teacher_outputs, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), b)
      )
  else:
    spec = PartitionSpec("data")
    step = jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(), spec),
      out_specs=PartitionSpec(),
      check_vma=how == "checked",
    )
    state, got = run(state, step, teacher_outputs, batches)
  assert_same(expected.params, state.params, 1e-4)
  assert_same(expected.model_state, state.model_state, 1e-4)
  assert_same(*({k: reduce.value(v) for k, v in m.items()} for m in (measured, got)), 1e-4)


def relational(s, t, *, where=None, axis_name=None):
  """A loss that relates rows: squared difference of the Gram matrices of the valid rows."""
  where = jnp.ones(len(s), bool) if where is None else where
  if axis_name is not None:
    s, t, where = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (s, t, where))
  valid = where[:, None] & where[None]
  return jnp.where(valid, (s @ s.T - t @ t.T) ** 2, 0).sum() / jnp.maximum(valid.sum(), 1)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_equals_the_large_batch(rng, microbatches):
  state, step, teacher_outputs = setup(rng)
  batches = [batch(rng) for _ in range(3)]
  expected, one = run(state, step, teacher_outputs, batches)
  _, step, _ = setup(rng, microbatches=microbatches)
  got, several = run(state, step, teacher_outputs, batches)
  assert_same(expected.params, got.params)
  for name in one:
    np.testing.assert_allclose(reduce.value(one[name]), reduce.value(several[name]), rtol=1e-5)


def test_batch_is_any_mapping_and_nothing_else():
  student = from_apply(lambda key, x: {"w": jnp.ones(3)}, lambda p, x: x * p["w"])
  goal, optimizer = objectives.weighted(hard=(1.0, objectives.labels())), optax.sgd(0.1)
  init = make_init(student, None, goal, optimizer)
  step, loss_fn = make_train_step(student, None, goal, optimizer), make_loss_fn(student, None, goal)
  rows = types.MappingProxyType({"image": jnp.ones((2, 3)), "label": jnp.zeros(2, jnp.int32)})
  key = jax.random.key(0)
  state = init(key, rows)
  _, metrics = step(state, (), rows)
  np.testing.assert_allclose(metrics["loss"][0], np.log(3), rtol=1e-6)
  for other in ((rows["image"], rows["label"]), rows["image"], None):
    for call in (
      lambda batch: init(key, batch),
      lambda batch: step(state, (), batch),
      lambda batch: loss_fn(state.params, state.model_state, (), batch, step=state.step, key=key),
    ):
      with pytest.raises(ValueError, match="^batch: expected a mapping"):
        call(other)


PARAMS = {"w": jnp.ones(3)}


@pytest.mark.parametrize(
  ("field", "change"),
  [
    ("params", {"params": PARAMS}),
    ("params", {"params": Variables(PARAMS, {})}),
    ("model_state", {"model_state": {}}),
    ("objective", {"params": {"student": PARAMS, "objective": {}}}),
    ("objective", {"model_state": {"student": {}, "objective": {}}}),
    ("teacher_variables", {"teacher_variables": {"w": 1.0}}),
    ("key", {"key": 0}),
    ("key", {"key": np.int32(0)}),
  ],
)
def test_loss_function_names_the_argument_of_another_form(field, change):
  model = from_apply(None, lambda p, x: x * p["w"], variables=PARAMS)
  loss_fn = make_loss_fn(model, model, objectives.weighted(hard=(1.0, objectives.labels())))
  parts = {"hard": {}}
  arguments = {
    "params": {"student": PARAMS, "objective": parts},
    "model_state": {"student": {}, "objective": parts},
    "teacher_variables": PARAMS,  # Params of a network without state are its variables.
    "batch": {"image": jnp.ones((2, 3)), "label": jnp.zeros(2, jnp.int32)},
    "step": 0,
    "key": jax.random.key(0),
  }

  def call(params, model_state, teacher_variables, batch, step, key):
    return loss_fn(params, model_state, teacher_variables, batch, step=step, key=key)

  assert jax.eval_shape(lambda: call(**arguments))[0].shape == ()
  assert jax.eval_shape(lambda: call(**arguments | {"key": jax.random.PRNGKey(0)}))[0].shape == ()
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    jax.eval_shape(lambda: call(**arguments | change))


@pytest.mark.parametrize("state", [PARAMS, Variables(PARAMS, {})])
def test_step_names_a_state_that_is_none(state):
  model = from_apply(None, lambda p, x: x * p["w"], variables=PARAMS)
  goal, optimizer = objectives.weighted(hard=(1.0, objectives.labels())), optax.sgd(0.1)
  rows = {"image": jnp.ones((2, 3)), "label": jnp.zeros(2, jnp.int32)}
  with pytest.raises(ValueError, match="^state: expected a TrainState.*make_init"):
    make_train_step(model, None, goal, optimizer)(state, (), rows)
  with pytest.raises(ValueError, match="^key: expected"):
    make_init(model, None, goal, optimizer)(0, rows)


def test_indivisible_microbatches_name_the_nearest_sizes(rng):
  state, step, teacher_outputs = setup(rng, microbatches=3)
  with pytest.raises(ValueError, match="15, 18"):
    step(state, teacher_outputs, batch(rng))
  with pytest.raises(ValueError, match="microbatches"):
    setup(rng, microbatches=0)


def test_live_and_cached_teachers_train_the_same_student(rng):
  state, step, teacher_outputs = setup(rng)
  batches = [batch(rng) for _ in range(3)]
  expected, _ = run(state, step, teacher_outputs, batches)
  model = teacher_model(["Dense_0"])
  predict = jax.jit(lambda b: model.apply(*teacher_outputs, b, train=False, key=None)[0])
  stored = [b | {f"teacher/{name}": x for name, x in predict(b).items()} for b in batches]
  _, step, _ = setup(rng, teacher=teacher_model(["Dense_0"]))
  cached_step = make_train_step(
    from_nnx(Student(nnx.Rngs(0))), teachers.cached(), objective(), optax.sgd(0.1, momentum=0.9)
  )
  got, _ = run(state, cached_step, teachers.cached().variables, stored)
  assert_same(expected.params, got.params, 1e-6)


def test_a_teacher_is_in_eval_mode_and_does_not_change(rng):
  state, step, teacher_outputs = setup(rng)
  b = batch(rng)
  before = Teacher().apply(
    {"params": teacher_outputs.params, **teacher_outputs.state}, b["image"], train=False
  )
  copy = jax.tree.map(np.array, teacher_outputs)
  state, _ = run(state, step, teacher_outputs, [b] * 3)
  after = Teacher().apply(
    {"params": teacher_outputs.params, **teacher_outputs.state}, b["image"], train=False
  )
  np.testing.assert_array_equal(before, after)
  assert_same(copy, teacher_outputs, 0)
  # In training mode the KL would differ: batch statistics, dropout.
  in_training, _ = Teacher().apply(
    {"params": teacher_outputs.params, **teacher_outputs.state},
    b["image"],
    train=True,
    mutable=["batch_stats"],
    rngs={"dropout": jax.random.key(0)},
  )
  assert np.abs(in_training - before).max() > 0.1


def test_moving_average_follows_the_student(rng):
  student = from_nnx(Student(nnx.Rngs(0)))
  average = teachers.moving_average(student, decay=0.9)
  goal = objectives.weighted(
    hard=(1.0, objectives.labels()), soft=(1.0, objectives.logits(losses.kl_divergence))
  )
  optimizer = optax.sgd(0.1)
  state = make_init(student, average, goal, optimizer)(jax.random.key(0), batch(rng))
  step = jax.jit(make_train_step(student, average, goal, optimizer), donate_argnums=0)
  own = jax.tree.map(np.array, state.params["student"])
  for i in range(4):
    state, measured = step(state, (), batch(rng))
    d = min(0.9, (1 + i) / (10 + i))
    own = jax.tree.map(
      lambda a, p, d=d: d * a + (1 - d) * np.asarray(p), own, state.params["student"]
    )
    assert i == 0 or reduce.value(measured["soft"]) > 0
  assert_same(own, state.average.params, 1e-6)


@pytest.mark.parametrize(
  "backend", ["cpu", "gpu"]
)  # they choose between old and new in different ways
def test_non_finite_updates_are_skipped_and_counted(rng, monkeypatch, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  state, step, teacher_outputs = setup(rng, optimizer=optax.adam(0.1))
  good, bad = batch(rng, masked=False), batch(rng, masked=False)
  bad["image"][3] = np.nan
  after_good, _ = run(state, step, teacher_outputs, [good])
  got, measured = run(after_good, step, teacher_outputs, [bad, bad])
  assert reduce.value(measured["nonfinite"]) == 1
  assert (got.skips.total, got.skips.streak, got.skips.longest, got.step) == (2, 2, 2, 3)
  assert_same(after_good.params, got.params, 0)
  assert_same(after_good.opt_state, got.opt_state, 0)
  recovered, measured = run(got, step, teacher_outputs, [good])
  assert (recovered.skips.total, recovered.skips.streak, recovered.skips.longest) == (2, 0, 2)
  assert np.isfinite(reduce.value(measured["loss"]))


def test_nan_in_masked_rows_changes_nothing(rng):
  state, step, teacher_outputs = setup(rng)
  b = batch(rng)
  expected, _ = run(state, step, teacher_outputs, [b])
  b["image"][~b["where"]] = np.nan
  got, measured = run(state, step, teacher_outputs, [b])
  assert reduce.value(measured["nonfinite"]) == 0
  assert_same(expected.params, got.params)


def test_an_empty_mask_is_a_loss_of_zero_and_counted(rng):
  state, step, teacher_outputs = setup(rng)
  b = batch(rng)
  b["where"][:] = False
  got, measured = run(state, step, teacher_outputs, [b])
  assert reduce.value(measured["loss"]) == 0
  assert reduce.value(measured["empty"]) == 1
  assert_same(state.params, got.params, 0)


def test_the_update_works_in_place():
  width = 1024
  student = from_apply(lambda key, x: jnp.zeros((width, width)), lambda w, x: x @ w)
  goal, optimizer = objectives.weighted(hard=(1.0, objectives.labels())), optax.adam(0.1)
  rows = {"image": np.ones((16, width), np.float32), "label": np.zeros(16, np.int32)}
  state = make_init(student, None, goal, optimizer)(jax.random.key(0), rows)
  step = jax.jit(make_train_step(student, None, goal, optimizer), donate_argnums=0)
  memory = step.lower(state, (), rows).compile().memory_analysis()
  # The gradient and the update, which is looked at before it is applied; no copy of the moments.
  assert memory.temp_size_in_bytes < 2.5 * 4 * width**2


def test_compiles_once_for_a_shape(rng):
  state, step, teacher_outputs = setup(rng)
  traces = []

  def counted(*args):
    traces.append(1)
    return step(*args)

  run(state, counted, teacher_outputs, [batch(rng) for _ in range(3)])
  assert len(traces) == 1


def test_dropout_follows_step_and_key(rng):
  student = from_nnx(Student(nnx.Rngs(0), dropout=0.5))
  state, step, teacher_outputs = setup(rng, student=student, optimizer=optax.sgd(0.0))
  b = batch(rng, masked=False)
  step = jax.jit(step)
  state1, first = step(state, teacher_outputs, b)
  _, second = step(state1, teacher_outputs, b)
  _, again = step(state, teacher_outputs, b)
  assert reduce.value(first["loss"]) != reduce.value(second["loss"])
  assert reduce.value(first["loss"]) == reduce.value(again["loss"])


def test_accuracy_leaves_out_generated_rows(rng):
  student = from_nnx(Student(nnx.Rngs(0)))

  def own_labels(variables, key, batch):
    logits = student.apply(*variables, batch, train=False, key=None)[0]["logits"]
    sampled = jnp.arange(16) % 2 == 0
    label = jnp.where(
      sampled, logits.argmax(-1), logits.argmin(-1)
    )  # its own are right, the others wrong
    return {**batch, "label": label, "generated": sampled}

  state, step, teacher_outputs = setup(rng, student, on_policy=own_labels, metrics=METRICS)
  b = batch(rng)
  measured = step(state, teacher_outputs, b)[1]["accuracy"]
  assert measured == (0, (b["where"] & (b["id"] % 2 == 1)).sum())


def test_training_without_a_teacher_is_the_same_step(rng):
  student = from_nnx(Student(nnx.Rngs(0)))
  goal = objectives.weighted(hard=(1.0, objectives.labels()))
  optimizer = optax.adam(3e-2)
  state = make_init(student, None, goal, optimizer)(jax.random.key(0), batch(rng))
  b = batch(rng)
  step = jax.jit(make_train_step(student, None, goal, optimizer))
  values = []
  for _ in range(20):
    state, measured = step(state, (), b)
    values.append(float(reduce.value(measured["loss"])))
  assert values[-1] < values[0] / 2


def test_a_plain_function_teaches(rng):
  kernel = rng.normal(size=(6, CLASSES)).astype(np.float32)
  teacher = from_apply(None, lambda w, x: x @ w, variables=kernel)
  goal = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence, temperature=2.0)))
  state, step, teacher_outputs = setup(rng, teacher=teacher, goal=goal, optimizer=optax.adam(0.05))
  b = batch(rng, 64, masked=False)
  trained, measured = run(state, step, teacher_outputs, [b] * 300)
  assert reduce.value(measured["soft"]) < 0.1
  evaluate = jax.jit(
    make_eval_step(from_nnx(Student(nnx.Rngs(0))), tasks.classification(), teacher)
  )
  statistics, _ = evaluate(trained, teacher_outputs, b)
  assert reduce.value(statistics["agreement"]) > 0.9


def test_a_frozen_teacher_needs_its_variables(rng):
  state, step, _ = setup(rng)
  with pytest.raises(ValueError, match="teacher_variables"):
    step(state, (), batch(rng))


def test_nothing_goes_to_the_host_inside_a_step(rng):
  state, step, teacher_outputs = setup(rng)
  b = jax.device_put(batch(rng))
  step = jax.jit(step)
  state, _ = step(state, teacher_outputs, b)
  with jax.transfer_guard("disallow"):
    jax.block_until_ready(step(state, teacher_outputs, b))


def test_non_finite_update_of_finite_gradients_is_skipped(rng):
  for optimizer in (optax.adam(np.nan), optax.chain(optax.scale(jnp.inf), optax.scale(1.0))):
    state, step, teacher_outputs = setup(rng, optimizer=optimizer)
    got, measured = run(state, step, teacher_outputs, [batch(rng)])
    assert reduce.value(measured["nonfinite"]) == 1 and np.isfinite(reduce.value(measured["loss"]))
    assert got.skips.longest == 1
    assert_same(state.params, got.params, 0)


def test_a_skipped_update_counts_in_no_mean(rng):
  state, step, teacher_outputs = setup(rng, metrics=METRICS)
  bad = batch(rng, masked=False)
  bad["image"][3] = np.nan
  _, measured = run(state, step, teacher_outputs, [bad])
  for name in ("loss", "hard", "soft", "accuracy", "grad_norm"):
    assert measured[name] == (0, 0)


def test_the_average_of_a_bfloat16_student_moves():
  student = from_apply(lambda key, x: jnp.ones((6, CLASSES), jnp.bfloat16), lambda w, x: x @ w)
  average = teachers.moving_average(student, decay=0.999)
  goal = objectives.weighted(hard=(1.0, objectives.labels()))
  state = make_init(student, average, goal, optax.sgd(0.1))(
    jax.random.key(0), batch(np.random.default_rng(0))
  )
  assert state.average.params.dtype == jnp.float32 and state.params["student"].dtype == jnp.bfloat16
  own, target = state.average, Variables(jnp.full((6, CLASSES), 1.5, jnp.bfloat16), {})
  ema_update = jax.jit(average.ema_update)
  for _ in range(2000):
    own = ema_update(own, target, jnp.int32(10**6))
  np.testing.assert_allclose(own.params, 1.5 - 0.5 * 0.999**2000, rtol=1e-4)


def test_the_state_has_no_weak_types(rng):
  """They would be lost in a checkpoint, which is refused."""
  term = objectives.features("hidden", "hidden", losses.hint)
  weak = term._replace(
    init=lambda *args: Variables({"scale": jnp.full(3, 0.5)}, {"count": jnp.asarray(1.0)})
  )
  init = make_init(
    from_nnx(Student(nnx.Rngs(0))),
    teacher_model(),
    objectives.weighted(weak=(1.0, weak)),
    optax.adam(1e-3),
  )
  state = init(jax.random.key(0), batch(rng))
  assert not any(getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(state))
  assert state.params["objective"]["weak"]["scale"].dtype == jnp.float32


def test_objective_without_axis_name_trains_under_a_mapped_axis(rng, mesh):
  def apply(params, state, student, teacher, batch, *, step, key):
    return {"square": (1.0, (jnp.square(student["logits"]).sum(-1), batch["where"]))}, state

  goal = objective()._replace(init=lambda key, s, t: Variables({}, {}), apply=apply)
  state, step, teacher_outputs = setup(rng, goal=goal)
  batches = [batch(rng)]
  expected, _ = run(state, step, teacher_outputs, batches)
  _, step, _ = setup(rng, goal=goal, axis_name="data")
  replicated, rows = PartitionSpec(), PartitionSpec("data")
  specs = (replicated, replicated, rows)
  mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=replicated)
  assert_same(expected.params, run(state, mapped, teacher_outputs, batches)[0].params)
